"""The prune commands: docker's question, words and requests, and what is gone afterwards."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.cli.recorder import Recorder, Request, recording
from tests.harness import AMBI, EngineUnderTest

ANSWERS = {
    ("POST", "/containers/prune"): (200, {"ContainersDeleted": ["3f2a" * 16], "SpaceReclaimed": 1_200_000}),
    ("POST", "/networks/prune"): (200, {"NetworksDeleted": ["web", "db"]}),
    ("POST", "/volumes/prune"): (200, {"VolumesDeleted": None, "SpaceReclaimed": 0}),
    ("POST", "/images/prune"): (
        200,
        {"ImagesDeleted": [{"Untagged": "a:1"}, {"Deleted": "sha256:b"}], "SpaceReclaimed": 34},
    ),
    ("POST", "/build/prune"): (200, {"CachesDeleted": None, "SpaceReclaimed": 0}),
}
LINES = [
    "container prune",
    "container prune --filter until=24h --filter label!=keep",
    "network prune",
    "volume prune",
    "volume prune -a --filter label=x",
    "image prune",
    "image prune --all --filter label=x",
    "system prune",
    "system prune -a --volumes --filter label=x --filter label!=y",
]
NOT_OURS = ("  - unused build cache\n", "  - all build cache\n")  # there is none to prune


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorder]:
    with recording(tmp_path_factory.mktemp("prune") / "s", ANSWERS) as it:
        yield it


def run(program: str | Path, line: str, answer: str, recorder: Recorder) -> tuple[str, int, list[tuple[str, object]]]:
    """What it printed, its exit status, and the prunes that it asked for: path and filters."""
    before = len(recorder.requests)
    socket = {"DOCKER_HOST": f"unix://{recorder.path}", "AMBI_SOCKET": str(recorder.path)}
    done = subprocess.run(
        [program, *line.split()], env={**os.environ, **socket}, input=answer, text=True, capture_output=True, timeout=60,
        check=False,
    )  # fmt: skip
    asked = [r for r in recorder.requests[before:] if r.path.endswith("/prune") and r.path != "/build/prune"]
    return done.stdout, done.returncode, [(r.path, filters(r)) for r in asked]


def filters(request: Request) -> object:
    """What docker's `filters` parameter says, decoded; None without."""
    query = parse_qs(urlsplit(request.target).query)
    return json.loads(query["filters"][0]) if query else None


@pytest.mark.needs("docker")
@pytest.mark.parametrize("answer", ["y\n", "n\n", "\n"])
@pytest.mark.parametrize("line", LINES)
def test_as_docker_asks_and_tells(line: str, answer: str, recorder: Recorder) -> None:
    theirs, status, asked = run("docker", line, answer, recorder)
    for words in NOT_OURS:
        theirs = theirs.replace(words, "")
    assert run(AMBI, line, answer, recorder) == (theirs, status, asked)


def test_nobody_to_ask_is_an_error(recorder: Recorder) -> None:
    done = subprocess.run(
        [AMBI, "-H", recorder.path, "system", "prune"], stdin=subprocess.DEVNULL, text=True, capture_output=True, check=False
    )
    assert done.returncode == 125
    assert done.stderr.splitlines() == [
        "error: stdin ended before an answer; nothing was removed",
        "hint: ambi system prune --force does not ask",
    ]


def test_until_says_nothing_of_volumes(recorder: Recorder) -> None:
    printed, status, asked = run(AMBI, "system prune -f --volumes --filter until=1h", "", recorder)
    assert (printed, status, asked) == ("", 125, [])


def test_everything_unused_goes_and_nothing_else(new_engine: Callable[[], EngineUnderTest], busybox_tar: Path) -> None:
    engine = new_engine()
    for name in ("used", "unused"):
        engine.load_busybox(busybox_tar, name)

    def ok(*args: str) -> list[str]:
        done = engine.ambi(*args)
        assert done.returncode == 0, (args, done.stderr)
        return done.stdout.decode().splitlines()

    for name in ("kept", "gone"):
        ok("network", "create", name)
    ok("run", "-d", "--name", "lives", "--network", "kept", "-v", "held:/v", "used", "sleep", "600")
    ok("create", "--name", "stopped", "--network", "gone", "-v", "/anonymous", "used", "true")
    ok("volume", "create", "named")
    told = ok("system", "prune", "-f", "-a", "--volumes")
    assert [line for line in told if line.startswith("Deleted ")] == [
        f"Deleted {kind}:" for kind in ("Containers", "Networks", "Volumes", "Images")
    ]
    assert told[-1].startswith("Total reclaimed space: ") and not told[-1].endswith(" 0B")
    assert ok("container", "ls", "-a", "--format", "{{.Names}}") == ["lives"]
    assert ok("network", "ls", "--filter", "type=custom", "--format", "{{.Name}}") == ["kept"]
    assert ok("volume", "ls", "-q") == ["held", "named"]
    assert ok("images", "--format", "{{.Repository}}") == ["used"]
    assert ok("system", "prune", "-f") == ["Total reclaimed space: 0B"]
