"""A zygote with a small driver of its own, for tests of the shim alone: it runs local processes, without isolation.

`ProcessDriver` meets the driver contract with fork, exec, pipes and terminals and nothing else, so that what a test sees is
the shim's doing. Its processes die with the shim.
"""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from ambi.core.deadline import Deadline
from ambi.core.driver import Features, Problem, Streams
from ambi.core.errors import CommandNotFound
from ambi.core.loop import POLLIN, Loop
from ambi.core.model import ExitStatus, InstanceId, Isolation, Status, Usage
from ambi.core.plan import Directory, LaunchPlan, Supervision
from ambi.core.undo import Undo
from ambi.linux import process, unix
from ambi.shim import client, record

ROOT = Path(__file__).parents[1]


class LocalProcess:
    """A child that waits to be told before it executes, and is watched by a pidfd."""

    def __init__(self, loop: Loop, spec: dict[str, Any], stdin: bool) -> None:
        self.exit: ExitStatus | None = None
        self.on_exit: Callable[[ExitStatus], None] | None = None
        self._loop = loop
        self._terminal = bool(spec.get("terminal"))
        self._go_read, self._go_write = os.pipe()
        self.streams, theirs = _terminal() if self._terminal else _pipes(stdin)
        self.pid = os.fork()
        if self.pid == 0:
            self._child(spec, theirs)
        os.close(self._go_read)
        for fd in set(theirs):
            os.close(fd)
        self._pidfd = os.pidfd_open(self.pid)
        loop.watch(self._pidfd, POLLIN, self._ended)

    def go(self) -> None:
        os.write(self._go_write, b"!")
        os.close(self._go_write)

    def signal(self, number: int) -> None:
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            pass

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.streams.stdout, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def _child(self, spec: dict[str, Any], theirs: tuple[int, int, int]) -> None:
        try:
            process.die_with_parent()
            os.setsid()
            for number, fd in enumerate(theirs):
                os.dup2(fd, number)
            if self._terminal:
                fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            os.close(self._go_write)
            os.read(self._go_read, 1)
            process.reset_signals()
            process.close_range(3)
            os.execvpe(spec["args"][0], spec["args"], dict(e.split("=", 1) for e in spec.get("env", [])))
        finally:
            os._exit(127)

    def _ended(self, _revents: int) -> None:
        self._loop.unwatch(self._pidfd)
        _, status = os.waitpid(self.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        self.exit = ExitStatus(code if code >= 0 else 128 - code)
        if self.on_exit is not None:
            self.on_exit(self.exit)


def _pipes(stdin: bool) -> tuple[Streams, tuple[int, int, int]]:
    in_read, in_write = os.pipe() if stdin else (os.open(os.devnull, os.O_RDONLY), None)
    out_read, out_write = os.pipe()
    err_read, err_write = os.pipe()
    for fd in (in_write, out_read, err_read):
        if fd is not None:
            os.set_blocking(fd, False)
    return Streams(in_write, out_read, err_read), (in_read, out_write, err_write)


def _terminal() -> tuple[Streams, tuple[int, int, int]]:
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    return Streams(master, master, None), (slave, slave, slave)


class LocalCreated:
    def __init__(self, plan: LaunchPlan, loop: Loop) -> None:
        self._loop = loop
        self._plan = plan
        self.init = LocalProcess(loop, plan.config["process"], plan.stdin)

    def start(self, by: Deadline) -> None:
        name = self._plan.config["process"]["args"][0]
        if name.startswith("/missing"):
            raise CommandNotFound(f'exec: "{name}": no such file or directory')
        self.init.go()

    def exec(self, process: dict[str, Any], stdin: bool, by: Deadline) -> LocalProcess:
        if process["args"][0].startswith("/missing"):
            raise CommandNotFound(f'exec: "{process["args"][0]}": no such file or directory')
        child = LocalProcess(self._loop, process, stdin)
        child.go()
        return child

    def state(self) -> Status:
        return Status.RUNNING if self.init.exit is None else Status.EXITED

    def usage(self) -> Usage:
        return Usage(1, 1, 0, 1, 0, 0, 1, 0)

    def processes(self) -> list[dict[str, Any]]:
        dumpable = process.prctl(process.PR_GET_DUMPABLE)
        command = "x" * self._plan.config.get("blow_up", 1)
        return [{"pid": self.init.pid, "command": command, "shim_dumpable": dumpable}]

    def delete(self, by: Deadline) -> None:
        self.init.signal(signal.SIGKILL)
        (self._plan.data_dir / "deleted").touch()


class ProcessDriver:
    isolation: ClassVar[Isolation] = Isolation.CONTAINER

    def probe(self) -> Features:
        return Features(None, {})

    def check(self, plan: LaunchPlan) -> list[Problem]:
        return []

    def create(self, plan: LaunchPlan, undo: Undo, by: Deadline, loop: Loop) -> LocalCreated:
        return LocalCreated(plan, loop)

    def sweep(self, plan: LaunchPlan) -> None:
        """Nothing outlives the shim."""


ZYGOTE = """
import sys
from ambi.shim import drivers, zygote
drivers.TABLE["container"] = "tests.shimkit:ProcessDriver"
sys.exit(zygote.main(sys.argv))
"""


def start_zygote(run_root: Path) -> None:
    """A zygote at `run_root` whose containers are local processes; `ensure` and `launch` find it there."""
    run_root.mkdir(parents=True, exist_ok=True)
    with unix.listen(run_root / "zygote.sock") as listener, open(run_root / "zygote.log", "ab") as log:
        subprocess.run(
            [sys.executable, "-c", ZYGOTE, str(run_root), str(listener.fileno())],
            pass_fds=(listener.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=ROOT,
            start_new_session=True,
            check=True,
        )


class Run:
    """One shim that was launched, and what it has told."""

    def __init__(self, plan: LaunchPlan, run_root: Path) -> None:
        self.plan = plan
        self.events: list[dict[str, Any]] = []
        self._news = threading.Condition()
        self._ended = False
        self.sockets: list[socket.socket] = []
        self.connection = client.launch(plan, run_root, on_event=self._on_event, on_close=self._on_close)

    def call(self, op: str, **fields: Any) -> dict[str, Any]:
        return self.connection.call(op, by=Deadline.after(30), **fields)

    def attach(self, **options: Any) -> socket.socket:
        """A client's end, attached with stdout and stderr unless said otherwise."""
        ours, theirs = self.pair()
        with theirs:
            self.call("attach", fds=[theirs.fileno()], **{"stdout": True, "stderr": True, **options})
        return ours

    def pair(self) -> tuple[socket.socket, socket.socket]:
        """A client's end, closed with the lab, and the end that is handed over."""
        ours, theirs = socket.socketpair()
        ours.settimeout(30)
        self.sockets.append(ours)
        return ours, theirs

    def exec(self, name: str, *args: str, stdin: bool = False, **options: Any) -> socket.socket:
        ours, theirs = self.pair()
        process = {
            "args": list(args),
            "env": ["PATH=/usr/bin:/bin"],
            "cwd": "/",
            "user": {"uid": 0, "gid": 0},
            "terminal": False,
        }
        attach = {"stdin": stdin, "stdout": True, "stderr": True, **options}
        with theirs:
            self.call("exec", exec_id=name, process=process, stdin=stdin, attach=attach, fds=[theirs.fileno()])
        return ours

    def event(self, kind: str) -> dict[str, Any]:
        """The first event of `kind`, waited for."""
        return self._wait(lambda: next((e for e in self.events if e["event"] == kind), None), f"event {kind}")

    def exit_code(self) -> int:
        return int(self.event("exit")["exit"]["code"])

    def wait_closed(self) -> None:
        self._wait(lambda: self._ended or None, "the end of the connection")

    def wait(self, holds: Callable[[], bool]) -> None:
        """Until `holds()`, which looks at the events."""
        self._wait(lambda: holds() or None, "what was waited for")

    def _wait(self, find: Callable[[], Any], what: str) -> Any:
        with self._news:
            found = self._news.wait_for(find, 30)
        assert found is not None, f"{what} did not come; there were {self.events}"
        return found

    def _on_event(self, body: dict[str, Any]) -> None:
        with self._news:
            self.events.append(body)
            self._news.notify_all()

    def _on_close(self) -> None:
        with self._news:
            self._ended = True
            self._news.notify_all()


class ShimLab:
    """A run root with a zygote of local processes, and everything that is launched there."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.run_root = base / "run"
        self.runs: list[Run] = []
        start_zygote(self.run_root)

    def plan(
        self, *args: str, stdin: bool = False, stdin_once: bool = True, terminal: bool = False, **config: Any
    ) -> LaunchPlan:
        name = InstanceId(os.urandom(32).hex())
        data = self.base / "data" / name
        return LaunchPlan(
            id=name,
            isolation=Isolation.CONTAINER,
            config={"process": {"args": list(args), "env": ["PATH=/usr/bin:/bin"], "terminal": terminal}, **config},
            rootfs=Directory(Path("/")),
            data_dir=data,
            run_dir=self.run_root / "instances" / name,
            layers_dir=self.run_root / "layers",
            guest_dir=self.base / "guest",
            stdin=stdin,
            supervision=Supervision(log=data / "log", open_stdin=stdin, stdin_once=stdin_once),
        )

    def launch(self, *args: str, **options: Any) -> Run:
        self.runs.append(Run(self.plan(*args, **options), self.run_root))
        return self.runs[-1]

    def start(self, *args: str, **options: Any) -> Run:
        run = self.launch(*args, **options)
        run.call("start")
        return run

    def zygote_pid(self) -> int:
        with unix.connect(self.run_root / "zygote.sock") as sock:
            unix.send(sock, {"op": "ping", "seq": 1})
            answer = unix.receive(sock)
            assert answer is not None
            return int(answer.body["ok"]["pid"])

    def log(self) -> str:
        return (self.run_root / "zygote.log").read_text()

    def close(self) -> None:
        """End every shim and the zygote."""
        for run in self.runs:
            run.connection.close()
            for sock in run.sockets:
                sock.close()
        zygote = client._zygotes.pop(self.run_root, None) or client.ZygoteClient(self.run_root)
        zygote.stop()
        for shim in list(record.living(self.run_root)):
            os.kill(shim.pid, signal.SIGKILL)
            wait_gone(shim.pid)


def wait_gone(pid: int) -> None:
    """Wait until process `pid`, whoever's child it is, has ended."""
    end = time.monotonic() + 30
    while state(pid) not in ("Z", "gone"):
        assert time.monotonic() < end, f"process {pid} does not end"
        time.sleep(0.02)


def state(pid: int) -> str:
    """The letter of /proc/PID/stat, "gone" when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"


def read_all(sock: socket.socket) -> bytes:
    """Everything up to the peer's orderly end."""
    data = bytearray()
    while block := sock.recv(1 << 16):
        data += block
    return bytes(data)


def unframe(data: bytes) -> dict[int, bytes]:
    """Docker's 8-byte frames, put together by stream."""
    streams: dict[int, bytearray] = {}
    at = 0
    while at < len(data):
        stream, length = struct.unpack_from(">BxxxI", data, at)
        assert len(data) >= at + 8 + length, "half a frame"
        streams.setdefault(stream, bytearray()).extend(data[at + 8 : at + 8 + length])
        at += 8 + length
    return {stream: bytes(parts) for stream, parts in streams.items()}
