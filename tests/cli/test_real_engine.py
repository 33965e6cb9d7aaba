"""The command line against a real engine that it starts itself: both kinds of isolation."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import AMBI, EngineUnderTest, guest_dir

SECONDS = 120.0  # what anything may take here; VMs are emulated on some machines


class OnDemand(EngineUnderTest):
    """Roots without an engine: whatever runs on them was started by the command line."""

    def start(self, *, vm: bool = True) -> None:
        self.data.mkdir(parents=True, exist_ok=True)
        if vm:
            (self.data / "guest").symlink_to(guest_dir())

    def ok(self, *args: str, **options: object) -> str:
        done = self.ambi(*args, **options)
        assert done.returncode == 0, (args, done)
        return done.stdout.decode()

    def destroy(self) -> None:
        for row in self.ok("ps", "-aq").split():
            self.ok("rm", "-f", row)
        self.ok("engine", "stop")
        super().destroy()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, busybox_tar: Path) -> Iterator[OnDemand]:
    it = OnDemand(tmp_path_factory.mktemp("cli"))
    it.start()
    it.ok("import", "-c", 'CMD ["echo", "from the image"]', str(busybox_tar), "bb")
    yield it
    it.destroy()


@pytest.fixture(params=["container", pytest.param("vm", marks=pytest.mark.needs("qemu"))])
def isolation(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def name(engine: OnDemand, request: pytest.FixtureRequest) -> Iterator[str]:
    """A name for an instance, which is removed afterwards."""
    word = "".join(c if c.isalnum() else "-" for c in request.node.name)
    yield word
    engine.ok("rm", "-f", word)


def run(engine: OnDemand, isolation: str, *args: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    return engine.ambi("run", "--rm", "--isolation", isolation, *args, **options)


class Terminal:
    """A command line of ours at a terminal."""

    def __init__(self, engine: OnDemand, *args: str, rows: int = 30, columns: int = 100) -> None:
        roots = {"AMBI_SOCKET": str(engine.socket), "AMBI_DATA_ROOT": str(engine.data), "AMBI_RUN_ROOT": str(engine.run)}
        self._theirs, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.before = termios.tcgetattr(inner)
        self._inner = inner
        self.process = subprocess.Popen(
            [*engine.entering, str(AMBI), *args],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            env={**os.environ, **roots},
            start_new_session=True,
        )
        self.seen = b""

    def expect(self, text: bytes) -> None:
        """Read until `text` has been seen."""
        self.await_(lambda: text in self.seen)
        self.seen = self.seen.partition(text)[2]

    def await_(self, happened: Callable[[], bool]) -> None:
        end = time.monotonic() + SECONDS
        while not happened():
            assert time.monotonic() < end, self.seen
            if select.select([self._theirs], [], [], 0.2)[0]:
                self.seen += os.read(self._theirs, 65536)

    def type(self, text: bytes) -> None:
        os.write(self._theirs, text)

    def interrupt(self, text: bytes) -> None:
        """Ctrl-C until `text` is seen: one that comes while a shell forks its child is lost, on any terminal."""
        end = time.monotonic() + SECONDS
        while text not in self.seen:
            assert time.monotonic() < end, self.seen
            self.type(b"\x03")
            pause = time.monotonic() + 2
            self.await_(lambda pause=pause: text in self.seen or time.monotonic() > pause)  # type: ignore[misc]
        self.seen = self.seen.partition(text)[2]

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self._theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        os.kill(self.process.pid, signal.SIGWINCH)

    def end(self) -> int:
        """Its exit status; the terminal is as it was."""
        self.await_(lambda: self.process.poll() is not None)
        assert termios.tcgetattr(self._inner) == self.before
        return self.process.wait()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._theirs)
        os.close(self._inner)


@pytest.fixture
def terminal(engine: OnDemand) -> Iterator[Callable[..., Terminal]]:
    made: list[Terminal] = []

    def make(*args: str) -> Terminal:
        made.append(Terminal(engine, *args))
        return made[-1]

    yield make
    for it in made:
        it.close()


def test_output_and_status(engine: OnDemand, isolation: str) -> None:
    done = run(engine, isolation, "bb", "sh", "-c", "echo out; echo err >&2; exit 3")
    assert (done.stdout, done.returncode) == (b"out\n", 3)
    assert done.stderr.splitlines()[-1] == b"err"
    assert run(engine, isolation, "bb").stdout == b"from the image\n"


def test_emulation_is_told_in_one_line(engine: OnDemand) -> None:
    notes = run(engine, "container", "bb", "true").stderr
    assert notes == b""
    accelerator = json.loads(engine.ok("info", "--format", "json"))["Runtimes"]["vm"]["status"].get("accelerator", "")
    told = [line for line in run(engine, "vm", "bb", "true").stderr.decode().splitlines() if "TCG" in line]
    assert len(told) == (1 if accelerator.startswith("tcg") else 0)


def test_stdin_is_half_closed(engine: OnDemand, isolation: str) -> None:
    data = os.urandom(3 << 20)
    done = run(engine, isolation, "-i", "bb", "sh", "-c", "sha256sum; echo done", input=data)
    import hashlib

    assert done.stdout.decode().split() == [hashlib.sha256(data).hexdigest(), "-", "done"]


@pytest.mark.parametrize("program,status,text", [("nope", 127, "not found"), ("/etc", 126, "")])
def test_programs_that_cannot_run(engine: OnDemand, isolation: str, program: str, status: int, text: str) -> None:
    done = run(engine, isolation, "bb", program)
    assert done.returncode == status
    error, hint = done.stderr.decode().splitlines()[-2:]
    assert error.startswith("error: ") and program in error and text in error
    assert hint.startswith("hint: ")
    assert engine.ok("ps", "-aq") == ""


def test_exec(engine: OnDemand, isolation: str, name: str) -> None:
    engine.ok("run", "-d", "--isolation", isolation, "--name", name, "bb", "sleep", "1000")
    assert engine.ok("ps", "--format", "{{.Names}} {{.Isolation}} {{.State}}") == f"{name} {isolation} running\n"
    done = engine.ambi(
        "exec",
        "-i",
        "-e",
        "A=1",
        "-w",
        "/tmp",
        "-u",
        "daemon",
        name,
        "sh",
        "-c",
        "cat; pwd; echo $A; id -un; exit 5",
        input=b"in\n",
    )
    assert (done.stdout, done.returncode) == (b"in\n/tmp\n1\ndaemon\n", 5)
    assert engine.ambi("exec", name, "nope").returncode == 127
    assert engine.ok("exec", "-d", name, "touch", "/tmp/made") == ""
    assert "sleep 1000" in engine.ok("top", name)
    assert engine.ok("stop", "-t", "0", name) == f"{name}\n"
    assert engine.ok("wait", name) == "137\n"


def test_logs(engine: OnDemand, isolation: str, name: str) -> None:
    engine.ambi(
        "run", "--isolation", isolation, "--name", name, "bb", "sh", "-c", "echo a; sleep 0.2; echo b >&2; sleep 0.2; echo c"
    )
    done = engine.ambi("logs", name)
    assert (done.stdout, done.stderr) == (b"a\nc\n", b"b\n")
    assert engine.ok("logs", "--tail", "1", "-f", name) == "c\n"
    stamp, _, line = engine.ok("logs", "-t", name).splitlines()[0].partition(" ")
    assert line == "a" and len(stamp) == len("2026-11-24T12:00:00.123456789Z")
    assert engine.ok("logs", "--since", "0s", name) == ""


def test_terminal(terminal: Callable[..., Terminal], isolation: str) -> None:
    it = terminal("run", "-it", "--rm", "--isolation", isolation, "bb", "sh")
    it.expect(b"# ")
    it.type(b"stty size; test -t 0 && echo yes-$((40 + 2))\r")
    it.expect(b"30 100")
    it.expect(b"yes-42")
    it.resize(41, 121)
    it.type(b"while [ \"$(stty size)\" != '41 121' ]; do sleep 0.2; done; echo resized-$((40 + 2))\r")
    it.expect(b"resized-42")
    it.type(b"echo asleep-$((40 + 2)); sleep 1000\r")
    it.expect(b"asleep-42")
    it.interrupt(b"# ")
    it.type(b"exit 7\r")
    assert it.end() == 7


def test_detach_and_attach_again(engine: OnDemand, terminal: Callable[..., Terminal], isolation: str, name: str) -> None:
    it = terminal("run", "-it", "--isolation", isolation, "--name", name, "--detach-keys", "ctrl-a,d", "bb", "sh")
    it.expect(b"# ")
    it.type(b"kept=yes\r\x01d")
    assert it.end() == 0
    assert engine.ok("inspect", "-f", "{{.State.Running}}", name) == "true\n"
    again = terminal("attach", name)
    again.type(b"echo $kept-$((40 + 2))\r")
    again.expect(b"yes-42")
    again.type(b"exit 9\r")
    assert again.end() == 9


@pytest.mark.parametrize("number,status", [(signal.SIGTERM, 42), (signal.SIGINT, 43)])
def test_signals_are_passed_on(engine: OnDemand, isolation: str, name: str, number: int, status: int) -> None:
    script = "trap 'exit 42' TERM; trap 'exit 43' INT; echo ready; while :; do sleep 0.2; done"
    process = subprocess.Popen(
        [*engine.entering, str(AMBI), "run", "--rm", "--isolation", isolation, "--name", name, "bb", "sh", "-c", script],
        stdout=subprocess.PIPE,
        env={
            **os.environ,
            "AMBI_SOCKET": str(engine.socket),
            "AMBI_DATA_ROOT": str(engine.data),
            "AMBI_RUN_ROOT": str(engine.run),
        },
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        assert process.wait(SECONDS) == status


def test_start_attached(engine: OnDemand, isolation: str, name: str) -> None:
    engine.ok("create", "-i", "--isolation", isolation, "--name", name, "bb", "sh", "-c", "cat; exit 6")
    done = engine.ambi("start", "-a", "-i", name, input=b"typed\n")
    assert (done.stdout, done.returncode) == (b"typed\n", 6)


def test_an_engine_that_is_killed_cuts_nobody_off(engine: OnDemand, isolation: str, name: str) -> None:
    """Output goes on, the exit status arrives, and the next command finds an engine again."""
    process = subprocess.Popen(
        [
            *engine.entering,
            str(AMBI),
            "run",
            "-i",
            "--rm",
            "--isolation",
            isolation,
            "--name",
            name,
            "bb",
            "sh",
            "-c",
            "echo ready; read x; echo got $x; exit 8",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={
            **os.environ,
            "AMBI_SOCKET": str(engine.socket),
            "AMBI_DATA_ROOT": str(engine.data),
            "AMBI_RUN_ROOT": str(engine.run),
        },
    )
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == b"ready\n"
    pid = json.loads(engine.ok("engine", "status", "--format", "json"))["pid"]
    os.kill(pid, signal.SIGKILL)
    output, _ = process.communicate(b"line\n", timeout=SECONDS)
    assert (output, process.returncode) == (b"got line\n", 8)
    end = time.monotonic() + SECONDS  # the shim has answered; the engine that comes next removes what is left
    while name in engine.ok("ps", "-a", "--format", "{{.Names}}").split():
        assert time.monotonic() < end, f"{name} has not been removed"
        time.sleep(0.2)
    assert json.loads(engine.ok("engine", "status", "--format", "json"))["pid"] != pid


def test_names_that_are_taken_or_wrong(engine: OnDemand, name: str) -> None:
    engine.ok("create", "--name", name, "bb")
    taken = engine.ambi("create", "--name", name, "bb")
    assert taken.returncode == 125 and name in taken.stderr.decode()
    wrong = engine.ambi("stop", name + "x")
    assert wrong.stderr.decode().splitlines()[1] == f"hint: did you mean {name}?"
    unknown = engine.ambi("run", "bbb")
    assert unknown.returncode == 125 and "hint: did you mean bb" in unknown.stderr.decode()
    network = engine.ambi("run", "--isolation", "vm", "--network", "host", "bb")
    assert network.returncode == 125 and "--network host" in network.stderr.decode()
    assert engine.ok("ps", "-a", "--format", "{{.Names}}") == f"{name}\n"


def test_images(engine: OnDemand, busybox_tar: Path, short_tmp: Path) -> None:
    made = engine.ok("image", "import", "-m", "why", str(busybox_tar), "team/app:1.2").strip()
    engine.ok("tag", "team/app:1.2", "registry:5000/app")
    assert "registry:5000/app" in engine.ok("images", "--format", "{{.Repository}}")
    assert engine.ok("images", "-q", "--no-trunc", "team/app").strip() == made
    assert engine.ok("image", "inspect", "-f", "{{.Id}}", made[7:19]).strip() == made
    assert "why" in engine.ok("history", "team/app:1.2")
    assert engine.ok("rmi", "team/app:1.2", "registry:5000/app").splitlines()[0] == "Untagged: team/app:1.2"
    broken = short_tmp / "broken.tar"
    broken.write_bytes(b"not an archive at all" * 100)
    done = engine.ambi("load", "-i", str(broken))
    assert done.returncode == 125 and done.stderr.startswith(b"error: ") and done.stderr.count(b"\n") <= 2
    assert engine.ok("images", "-q").count("\n") == 1


def test_events_and_completion(engine: OnDemand, name: str) -> None:
    made = engine.ok("create", "--name", name, "bb").strip()
    engine.ok("rename", name, name + "2")
    engine.ok("rename", name + "2", name)
    actions = engine.ok(
        "events", "--since", "1h", "--until", "0s", "--filter", f"container={made}", "--format", "{{.Action}}"
    ).split()
    assert actions == ["create", "rename", "rename"]
    words = {"_AMBI_COMPLETE": "bash_complete", "COMP_WORDS": f"ambi rm {name[:4]}", "COMP_CWORD": "2"}
    roots = {"AMBI_SOCKET": str(engine.socket), "AMBI_DATA_ROOT": str(engine.data), "AMBI_RUN_ROOT": str(engine.run)}
    done = subprocess.run([str(AMBI)], env={**os.environ, **roots, **words}, capture_output=True, check=True)
    assert done.stdout.decode() == f"plain,{name}\n"


def test_completion_starts_no_engine(short_tmp: Path) -> None:
    words = {"_AMBI_COMPLETE": "bash_complete", "COMP_WORDS": "ambi rm x", "COMP_CWORD": "2"}
    roots = {"AMBI_DATA_ROOT": str(short_tmp / "data"), "AMBI_RUN_ROOT": str(short_tmp / "run")}
    done = subprocess.run([str(AMBI)], env={**os.environ, **roots, **words}, capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"\n", b"") and not (short_tmp / "run").exists()


def test_several_commands_start_one_engine(short_tmp: Path) -> None:
    it = OnDemand(short_tmp / "e")
    it.start(vm=False)
    roots = {"AMBI_SOCKET": str(it.socket), "AMBI_DATA_ROOT": str(it.data), "AMBI_RUN_ROOT": str(it.run)}
    argv = [*it.entering, str(AMBI), "engine", "status", "--format", "json"]
    starting = [
        subprocess.Popen([*it.entering, str(AMBI), "images", "-q"], env={**os.environ, **roots}, stderr=subprocess.PIPE)
        for _ in range(4)
    ]
    assert [process.communicate(timeout=SECONDS)[1] for process in starting] == [b""] * 4
    assert [process.returncode for process in starting] == [0] * 4
    subprocess.run(argv, env={**os.environ, **roots}, check=True, capture_output=True)
    it.destroy()
