"""File trees of VMs of our own monitor: copies of a template that have them, and trees and disks that come and go.

`scripts/test` runs this folder inside of `scripts/kvm-lab`, where a KVM that cannot be used is a failure.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ambi.core.plan import Directory
from hyper import backends
from tests.driverkit import Rig, Running


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "variant" in metafunc.fixturenames:
        metafunc.parametrize("variant", [("vm", "erofs")], ids=["vmm"], indirect=True)


@pytest.fixture(scope="module", autouse=True)
def ours() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(backends.CHOICE, backends.OURS)
        yield


def bind(source: Path, destination: str, *options: str) -> dict[str, object]:
    return {"destination": destination, "type": "bind", "source": str(source), "options": ["rbind", "rprivate", *options]}


def started(running: Running) -> str:
    return str(running.created.inspect()["started"])  # type: ignore[attr-defined]


def memory_of(running: Running) -> list[str]:
    """The fields of /proc/PID/maps of what the guest's memory is."""
    pid = running.created._parts.monitor.child.pid  # type: ignore[attr-defined]
    lines = [line.split(maxsplit=5) for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    return [f"{line[1]} {line[5]}" for line in lines if len(line) == 6 and ("guest memory" in line[5] or "templates/" in line[5])]


def test_copies_of_one_template_with_and_without_trees(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("of the host\n")
    script = "cat /rw/file && echo of the guest > /rw/made && ! touch /ro/no && cat /one && exec sleep 1000"
    mounts = (bind(tmp_path, "/rw"), bind(tmp_path, "/ro", "ro"), bind(tmp_path / "file", "/one"))
    with rig.started(["sh", "-c", script], mounts=mounts) as running:
        running.init.until(lambda: running.init.out.count(b"\n") == 2)
        assert started(running) == "template"
        assert {line.split()[0] for line in memory_of(running)} == {"rw-s"} and "memfd" in memory_of(running)[0]
        assert (tmp_path / "made").read_text() == "of the guest\n"
        names = [name for name in running.created.inspect()["devices"] if name.startswith("fs")]  # type: ignore[attr-defined]
        assert len(names) == 1
        with rig.started(["sleep", "1000"]) as other:
            assert started(other) == "template"
            assert {line.split()[0] for line in memory_of(other)} == {"rw-p"}
    assert len([path for path in (rig.guest_dir / "templates").iterdir() if (path / "manifest.json").exists()]) == 1


def test_copy_whose_root_is_a_directory(rig: Rig, tmp_path: Path) -> None:
    plan = rig.plan(["sh", "-c", "echo from the guest > /made && cat /made /bound/file"], mounts=(bind(tmp_path, "/bound"),))
    (tmp_path / "file").write_text("bound\n")
    tree = rig.base / "tree"
    for _ in range(2):
        with rig.started_plan(plan._replace(rootfs=Directory(tree))) as running:
            done = running.init.finish()
            assert started(running) == "template"
        assert (done.code, done.out) == (0, b"from the guest\nbound\n"), done
    assert (tree / "made").read_text() == "from the guest\n"
