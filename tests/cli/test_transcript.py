"""The transcript: the real docker CLI shows the same of Debian's dockerd, of a container and of a VM.

Same stdout, stderr and exit code, step by step, but for the listed differences (transcript/differences.py), each with its
reason. An entry whose difference has gone fails, so the list stays true.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.transcript.differences import DIFFERENCES
from tests.cli.transcript.lines import FAILURES, INPUT, OUTPUT, SIGNALS, TERMINALS
from tests.cli.transcript.more_lines import MORE
from tests.cli.transcript.script import Line, Peer, Result, play
from tests.harness import EngineUnderTest
from tests.peers import Dockerd

LINES: tuple[Line, ...] = (*OUTPUT, *FAILURES, *SIGNALS, *INPUT, *TERMINALS, *MORE)
BY_NAME = {line.name: line for line in LINES}
RUNTIMES = {"dockerd": "", "container": "--runtime container", "vm": "--runtime vm"}

pytestmark = [pytest.mark.needs("dockerd", "docker"), pytest.mark.timeout(600)]


def _prepare(peer: Peer, tar: Path) -> Peer:
    """Give the peer its images, a directory to bind, and the instance `box` that runs all the while."""
    (peer.directory / "greeting").write_text("good morning\n")
    for command in (
        ["import", str(tar), "box"],
        ["import", "-c", 'ENTRYPOINT ["echo", "hello"]', "-c", 'CMD ["world"]', str(tar), "hello"],
        ["run", "-d", "--init", "--network", "none", *peer.runtime.split(), "--name", "box", "box", "sleep", "100000"],
    ):
        done = subprocess.run(["docker", "-H", f"unix://{peer.socket}", *command], capture_output=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr.decode()}"
    return peer


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="ambi-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def peer_of(scratch: Path, busybox_tar: Path) -> Iterator[Callable[[str], Peer]]:
    """The peer of a kind, started when it is first asked for."""
    peers: dict[str, Peer] = {}
    stops: list[Callable[[], object]] = []

    def start(kind: str) -> Peer:
        directory = scratch / f"{kind}-files"
        directory.mkdir()
        if kind == "dockerd":
            daemon = Dockerd().__enter__()
            stops.append(lambda: daemon.__exit__(None, None, None))
            socket = daemon.socket
        else:
            engine = EngineUnderTest(scratch / kind)
            stops.append(engine.destroy)
            engine.start(vm=kind == "vm")
            socket = engine.socket
        return _prepare(Peer(socket, RUNTIMES[kind], directory), busybox_tar)

    def get(kind: str) -> Peer:
        if kind not in peers:
            peers[kind] = start(kind)
        return peers[kind]

    yield get
    for stop in reversed(stops):
        stop()


@pytest.fixture(scope="module")
def reference(peer_of: Callable[[str], Peer]) -> Callable[[Line], list[Result]]:
    """What dockerd shows for a line, played once."""
    known: dict[str, list[Result]] = {}

    def get(line: Line) -> list[Result]:
        if line.name not in known:
            known[line.name] = play(line, peer_of("dockerd"))
        return known[line.name]

    return get


@pytest.mark.parametrize("name", BY_NAME)
def test_line(name: str, isolation: str, reference: Callable[[Line], list[Result]], peer_of: Callable[[str], Peer]) -> None:
    line = BY_NAME[name]
    theirs, ours = reference(line), play(line, peer_of(isolation))
    listed = {entry.step: entry for entry in DIFFERENCES if entry.line == name and isolation in entry.isolations}
    for number, (their, our) in enumerate(zip(theirs, ours, strict=True)):
        entry = listed.pop(number, None)
        if entry is None:
            assert our == their, f"step {number} of {line.steps}"
        else:
            shown = f"{our.stdout}|{our.stderr}|{our.code}"
            assert our != their, f"step {number}: the listed difference has gone: {entry.reason}"
            assert re.fullmatch(entry.ours, shown, re.DOTALL), f"step {number}: {shown!r} is not what is listed"
    assert not listed, "differences are listed for steps that do not exist"


def test_the_transcript_is_long_enough_and_its_differences_name_lines() -> None:
    assert len(LINES) >= 60 and len(BY_NAME) == len(LINES)
    assert {entry.line for entry in DIFFERENCES} <= set(BY_NAME)
