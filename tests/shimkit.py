"""A zygote with a small driver of its own, for tests of the shim alone: it runs local processes, without isolation.

`ProcessDriver` meets the driver contract with fork, exec, pipes and terminals and nothing else, so that what a test sees is
the shim's doing. Its processes die with the shim.
"""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from ambi.core.deadline import Deadline
from ambi.core.driver import Features, Problem, Streams
from ambi.core.errors import CommandNotFound
from ambi.core.loop import POLLIN, Loop
from ambi.core.model import ExitStatus, Isolation, Status, Usage
from ambi.core.plan import LaunchPlan
from ambi.core.undo import Undo
from ambi.linux import process, unix

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
        return [{"pid": self.init.pid, "command": "x" * self._plan.config.get("blow_up", 1)}]

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
