"""The tree of an image is the same from inside a container, from inside a VM, and in a merge that is none of ours.

The reference extracts each layer with GNU tar and applies whiteouts over values (tests/tree.py); inside, one static program
(tests/probe/tree.c) lists every entry with type, mode, owner, size, times, device, links, target, xattrs and checksum.
"""

from __future__ import annotations

import platform
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import layercake, tree
from tests.harness import EngineUnderTest

# What the instance itself mounts or makes; nothing of the image.
OURS = ("./proc", "./sys", "./dev", "./etc/hosts", "./etc/hostname", "./etc/resolv.conf")


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("probe") / "treeprobe"
    source = Path(__file__).parents[1] / "probe" / "tree.c"
    subprocess.run(["gcc", "-static", "-O2", "-Wall", "-Wextra", "-Werror", "-o", target, source], check=True)
    return target


@pytest.fixture(scope="module")
def cake(probe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    return layercake.build(tmp_path_factory.mktemp("cake"), probe)


@pytest.fixture(scope="module")
def debian(probe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real Debian root as mmdebstrap writes it, with the probe added as one more file."""
    from images import distributions

    target = tmp_path_factory.mktemp("debian") / "debian.tar"
    suite = platform.freedesktop_os_release()["VERSION_CODENAME"]  # the host's, which its apt knows
    lines = distributions.sources(distributions.DEBIAN, suite).lines
    argv = ["mmdebstrap", "--variant=minbase", "--mode=root", suite, str(target), *lines]
    subprocess.run(argv, check=True, capture_output=True)
    subprocess.run(["tar", "-rf", target, "--transform", "s,^,./bin/,", "-C", probe.parent, probe.name], check=True)
    return target


def is_ours(line: str) -> bool:
    path = line.split(" ", 1)[0]
    return any(path == name or path.startswith(name + "/") for name in OURS)


def inside(engine: EngineUnderTest, isolation: str, image: str, probe: str) -> set[str]:
    done = engine.docker("run", "--rm", "--network", "none", "--runtime", isolation, image, probe, "/", timeout=600)
    assert done.returncode == 0, done.stderr.decode()
    return single_names([line for line in done.stdout.decode().splitlines() if not is_ours(line)])


def single_names(lines: list[str]) -> set[str]:
    """An inode of which only one name is left counts more links than there are names: the probe cannot know, this can."""
    uses = Counter(line.split(" ")[8] for line in lines)
    rows = [line.split(" ") for line in lines]
    return {" ".join([*row[:8], "-" if uses[row[8]] == 1 else row[8], *row[9:]]) for row in rows}


def reference(archives: list[Path], work: Path) -> set[str]:
    return {line for line in tree.lines(tree.merge(archives, work)) if not is_ours(line)}


def without_etc_time(lines: set[str]) -> set[str]:
    """Debian's root has no /etc/hosts: the instance makes the mount point, and so touches /etc."""
    return {
        " ".join([*line.split(" ")[:6], "*", *line.split(" ")[7:]]) if line.startswith("./etc d ") else line
        for line in lines
    }


def assert_same(found: set[str], wanted: set[str]) -> None:
    assert len(wanted) > 100
    missing, extra = sorted(wanted - found), sorted(found - wanted)
    assert not missing and not extra, "\n".join(["missing:", *missing[:20], "instead:", *extra[:20]])


@pytest.mark.needs("gcc")
@pytest.mark.timeout(900)
def test_many_layers(
    new_engine: Callable[[], EngineUnderTest], cake: tuple[Path, list[Path]], isolation: str, tmp_path: Path
) -> None:
    engine = new_engine()
    loaded = engine.docker("load", "-i", str(cake[0]))
    assert loaded.returncode == 0, loaded.stderr.decode()
    assert_same(inside(engine, isolation, "layercake", "/bin/treeprobe"), reference(cake[1], tmp_path))


@pytest.mark.needs("gcc")
@pytest.mark.timeout(900)
def test_real_distribution(new_engine: Callable[[], EngineUnderTest], debian: Path, isolation: str, tmp_path: Path) -> None:
    engine = new_engine()
    loaded = engine.docker("import", str(debian), "debian:bookworm")
    assert loaded.returncode == 0, loaded.stderr.decode()
    found = inside(engine, isolation, "debian:bookworm", "/bin/treeprobe")
    assert_same(without_etc_time(found), without_etc_time(reference([debian], tmp_path)))
