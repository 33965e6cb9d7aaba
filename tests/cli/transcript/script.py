"""The language of the transcript: lines of docker commands, each with what is done to it while it runs.

In a command `{run}` and `{create}` stand for the verb with the peer's runtime and without network, `{box}` for the name
of an instance that runs all the while, and `{dir}` for a directory on the host. A line cleans up what it has named.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import pexpect

SECONDS = 120.0  # for any single step


class Expect(NamedTuple):
    """Wait until the terminal shows `text`."""

    text: str


class Send(NamedTuple):
    keys: bytes


class Resize(NamedTuple):
    rows: int
    columns: int


SETTLE_SECONDS = 0.7  # docker's client starts to listen for changes of the size a moment after the program has started
Action = Expect | Send | Resize


class Run(NamedTuple):
    """One docker command. stdin is sent and then closed; `terminal` runs it on a terminal of 30 by 100 instead.

    mask: a regular expression for what is not compared.
    """

    command: str
    stdin: bytes | None = None
    terminal: tuple[Action, ...] = ()
    mask: str = ""


class Await(NamedTuple):
    """Repeat a docker command until its output has `text` in it; what it printed is not compared."""

    command: str
    text: str


Step = Run | Await


class Line(NamedTuple):
    """name: also of the instance that it uses, `{me}`, which is removed before and after it."""

    name: str
    steps: tuple[Step, ...]


class Result(NamedTuple):
    stdout: str
    stderr: str
    code: int


class Peer(NamedTuple):
    """One engine to talk to. runtime: the flags that choose the isolation; secret: words that differ by peer alone."""

    socket: Path
    runtime: str
    directory: Path
    secrets: tuple[tuple[str, str], ...] = ()


def play(line: Line, peer: Peer) -> list[Result]:
    """The results of the line's Run steps, made comparable."""
    _docker(peer, f"rm -f {line.name}")
    try:
        return [result for step in line.steps if (result := _step(line, step, peer)) is not None]
    finally:
        _docker(peer, f"rm -f {line.name}")


def _step(line: Line, step: Step, peer: Peer) -> Result | None:
    if isinstance(step, Await):
        end = time.monotonic() + SECONDS
        while True:
            result = _docker(peer, _fill(line, step.command, peer))
            if step.text in result.stdout + result.stderr:
                return None
            assert time.monotonic() < end, f"{line.name}: `{step.command}` never showed {step.text!r}: {result}"
            time.sleep(0.25)
    command = _fill(line, step.command, peer)
    result = _on_terminal(peer, command, step.terminal) if step.terminal else _docker(peer, command, step.stdin)
    stdout, stderr = (_comparable(text, step.mask, peer) for text in result[:2])
    return Result(stdout, stderr, result.code)


def _fill(line: Line, command: str, peer: Peer) -> str:
    made = f"--network none --name {line.name} {peer.runtime}"
    words = {"run": f"run {made}", "create": f"create {made}", "me": line.name, "box": "box", "dir": str(peer.directory)}
    for name, value in words.items():
        command = command.replace(f"{{{name}}}", value)
    return command


def _docker(peer: Peer, command: str, stdin: bytes | None = None) -> Result:
    done = subprocess.run(
        ["docker", "-H", f"unix://{peer.socket}", *shlex.split(command)],
        input=stdin if stdin is not None else b"",
        capture_output=True,
        timeout=SECONDS,
        check=False,
    )
    return Result(done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"), done.returncode)


def _on_terminal(peer: Peer, command: str, actions: tuple[Action, ...]) -> Result:
    """The whole of what the terminal showed, as stdout."""
    argv = ["-H", f"unix://{peer.socket}", *shlex.split(command)]
    seen = _Transcript()
    child = pexpect.spawn("docker", argv, timeout=SECONDS, dimensions=(30, 100), encoding="utf-8", codec_errors="replace")
    child.logfile_read = seen
    try:
        for action in actions:
            if isinstance(action, Expect):
                child.expect_exact(action.text)
            elif isinstance(action, Send):
                child.send(action.keys.decode("latin-1"))
            else:
                time.sleep(SETTLE_SECONDS)
                child.setwinsize(action.rows, action.columns)
        child.expect(pexpect.EOF)
        child.wait()
    finally:
        child.close(force=True)
    return Result("".join(seen.parts), "", child.exitstatus if child.exitstatus is not None else -(child.signalstatus or 0))


class _Transcript:
    """What pexpect writes its copy of the output to."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def write(self, text: str) -> None:
        self.parts.append(text)

    def flush(self) -> None:
        pass


_RULES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\b[0-9a-f]{64}\b"), "<id>"),
    (re.compile(r"\b[0-9a-f]{12}\b"), "<short id>"),
    (re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z"), "<log time>"),
    (re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z"), "<time>"),
)


def _comparable(text: str, mask: str, peer: Peer) -> str:
    if mask:
        text = re.sub(mask, "<masked>", text)
    for pattern, word in _RULES:
        text = pattern.sub(word, text)
    for secret, word in (*peer.secrets, (str(peer.directory), "<dir>"), (str(peer.socket), "<socket>")):
        text = text.replace(secret, word)
    return text


class Difference(NamedTuple):
    """A listed difference: in which step of which line, for which isolation, what we show, and why that is right.

    ours: a regular expression over `stdout|stderr|code`; the entry fails when nothing differs any more.
    """

    line: str
    step: int
    isolations: tuple[str, ...]
    ours: str
    reason: str
