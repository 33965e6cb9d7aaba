"""A created or running container, as the shim sees it: its processes, its cgroup, its end."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ambi.core.deadline import Deadline
from ambi.core.driver import Streams
from ambi.core.errors import Conflict, DeadlineExceeded, InvalidRequest
from ambi.core.loop import POLLIN, Loop
from ambi.core.model import ExitStatus, Status, Usage
from ambi.core.undo import Undo
from ambi.linux import process
from runtime import exec as executor
from runtime import spawn, terminal, top
from runtime.attach import Attachments
from runtime.cgroups.oom import Bell
from runtime.cgroups.v1 import Group
from runtime.finish import Filter
from runtime.spare import Spares
from runtime.tree import View

_LISTEN_S = 0.05  # after a start
_KILL_S = 0.1  # from the news that memory has run out to the kernel's choice of a process


class ContainerProcess:
    """A process of the container, a child of the shim. Implements ambi.core.driver.Process."""

    def __init__(self, pid: int, pidfd: int, streams: Streams, has_terminal: bool, group: Group) -> None:
        self._pid, self._pidfd, self._group = pid, pidfd, group
        self._streams, self._has_terminal = streams, has_terminal
        self._exit: ExitStatus | None = None
        self._oom_kills_before = group.oom_kills()
        self._loop: Loop | None = None
        self.on_exit: Callable[[ExitStatus], None] | None = None
        self.on_reaped: Callable[[], None] | None = None  # the container's own, before on_exit

    @property
    def pid(self) -> int:
        return self._pid

    @property
    def pidfd(self) -> int:
        return self._pidfd

    @property
    def streams(self) -> Streams:
        return self._streams

    @property
    def exit(self) -> ExitStatus | None:
        return self._exit

    def watch(self, loop: Loop) -> None:
        """From now on `loop` notices the end."""
        self._loop = loop
        loop.watch(self._pidfd, POLLIN, lambda _: self.reap(Deadline.never()))

    def reap(self, by: Deadline) -> None:
        """Wait for the process, which has ended or is about to, and tell whoever waits; releases the pidfd.

        Raises DeadlineExceeded when it is still there at `by`, as one in an uninterruptible call is.
        """
        if self._exit is not None:
            return
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        if not poll.poll(by.milliseconds()):
            raise DeadlineExceeded(f"process {self._pid} did not end in time", hint=f"cat /proc/{self._pid}/stack")
        result = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
        assert result is not None  # without WNOHANG
        code = result.si_status if result.si_code == os.CLD_EXITED else 128 + result.si_status
        killed = self._group.oom_kills() > self._oom_kills_before
        self._exit = ExitStatus(code, "", killed, time.time_ns())
        if self._loop is not None:
            self._loop.unwatch(self._pidfd)
        os.close(self._pidfd)
        if self.on_reaped is not None:
            self.on_reaped()
        if self.on_exit is not None:
            self.on_exit(self._exit)

    def signal(self, number: int) -> None:
        if self._exit is None:
            try:
                signal.pidfd_send_signal(self._pidfd, number)
            except ProcessLookupError:
                pass

    def resize(self, rows: int, columns: int) -> None:
        if not self._has_terminal:
            raise InvalidRequest(f"process {self._pid} has no terminal to resize")
        if self._exit is None:
            try:
                terminal.set_size(self._streams.stdout, rows, columns)
            except OSError:  # the shim has closed it: the process is ending
                pass


class Stdio:
    """The two ends of a process's stdio without terminal: `theirs` for the child, `streams` for the shim."""

    def __init__(self, stdin: bool) -> None:
        self.theirs: list[int] = []
        if stdin:
            read, write = os.pipe()
            os.set_blocking(write, False)
            self.theirs.append(read)
            ours_in: int | None = write
        else:
            self.theirs.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
            ours_in = None
        outputs = []
        for _ in range(2):
            read, write = os.pipe()
            os.set_blocking(read, False)
            self.theirs.append(write)
            outputs.append(read)
        self.streams = Streams(ours_in, outputs[0], outputs[1])

    def close_theirs(self) -> None:
        for fd in self.theirs:
            os.close(fd)
        self.theirs = []

    def close_ours(self) -> None:
        close_streams(self.streams)


def close_streams(streams: Streams) -> None:
    for fd in {fd for fd in streams if fd is not None}:
        try:
            os.close(fd)
        except OSError:
            pass


class Container:
    """Implements ambi.core.driver.Created. Made by ContainerDriver.create alone."""

    def __init__(
        self,
        identity: str,
        init: ContainerProcess,
        channel: spawn.Channel,
        group: Group,
        loop: Loop,
        program: Filter,
        files: Path,
        own_pids: bool,
        spares: Spares,
        helpers: spawn.Helpers,
        view: View,
        attachments: Attachments,
    ) -> None:
        self.tree = view.tree
        self._attachments = attachments
        self._view = view
        self._id, self._init, self._group, self._loop, self._program = identity, init, group, loop, program
        self._channel: spawn.Channel | None = channel
        self._files, self._own_pids, self._spares, self._helpers = files, own_pids, spares, helpers
        self._started = False
        self._last_usage: Usage | None = None
        self._execs: list[ContainerProcess] = []
        self._paused = False
        self._bell: Bell | None = None
        self.on_oom: Callable[[], None] | None = None
        init.on_reaped = self._init_ended
        init.watch(loop)

    @property
    def init(self) -> ContainerProcess:
        return self._init

    def start(self, by: Deadline) -> None:
        if self._started or self._channel is None:
            raise Conflict(f"container {self._id} has been started already")
        try:
            spawn.finish_start(self._channel, self._program, by)
            self._started = True
        finally:
            self._channel.close()
            self._channel = None
        self._loop.later(_LISTEN_S, self._listen)

    def exec(self, process: dict[str, Any], stdin: bool, by: Deadline) -> ContainerProcess:
        if not self._started or self._init.exit is not None:
            raise Conflict("cannot exec in a stopped container")
        if self._paused:
            raise Conflict(f"Container {self._id} is paused, unpause the container before exec")
        if not process.get("args"):
            raise InvalidRequest("no command to execute is given")
        with Undo() as undo:
            made = self._exec(process, stdin, by, undo)
            undo.keep()
        made.watch(self._loop)
        self._execs = [p for p in self._execs if p.exit is None]
        self._execs.append(made)
        return made

    def _exec(self, spec: dict[str, Any], stdin: bool, by: Deadline, undo: Undo) -> ContainerProcess:
        has_terminal = bool(spec.get("terminal"))
        stdio = None if has_terminal else Stdio(stdin)
        if stdio is not None:
            undo.add("close the streams", stdio.close_ours)
        cgroup = self._group.born_in()
        job = executor.Job(self._id, spec, self._program, cgroup is not None)
        fds = (self._init.pidfd, *([] if cgroup is None else [cgroup]), *(stdio.theirs if stdio else []))
        try:
            execution = self._spares.execute(job, fds, by)
            undo.add("end the process", lambda: end_child(execution.pidfd))
            fds_back = execution.finish(by)
            streams = stdio.streams if stdio else terminal_streams(fds_back)
            undo.add("close the streams", lambda: close_streams(streams))
            return ContainerProcess(execution.pid, execution.pidfd, streams, has_terminal, self._group)
        finally:
            if stdio is not None:
                stdio.close_theirs()
            if cgroup is not None:
                os.close(cgroup)

    def state(self) -> Status:
        if self._init.exit is not None:
            return Status.EXITED
        if self._paused:
            return Status.PAUSED
        return Status.RUNNING if self._started else Status.CREATED

    def pause(self, by: Deadline) -> None:
        if not self._started or self._init.exit is not None:
            raise Conflict(f"container {self._id} is not running")
        if not self._paused:
            self._spares.end()  # it lives in the cgroups as well, and could not be ended while they are frozen
            self._group.freeze(by)
            self._paused = True

    def resume(self, by: Deadline) -> None:
        del by
        self._group.thaw()
        self._paused = False

    def update(self, resources: dict[str, Any], by: Deadline) -> None:
        del by
        if not self._started or self._init.exit is not None:
            raise Conflict(f"container {self._id} is not running")
        self._group.update(resources)

    def attach(self, mount: dict[str, Any], by: Deadline) -> None:
        self._check_runs()
        self._attachments.attach(mount, by)

    def detach(self, destination: str, by: Deadline, *, force: bool) -> None:
        self._check_runs()
        self._attachments.detach(destination, by, force=force)

    def _check_runs(self) -> None:
        if not self._started or self._init.exit is not None:
            raise Conflict(f"container {self._id} is not running")

    def _listen(self) -> None:
        """For memory that runs out. Not on the way of a start; what came before is told with the end of the process."""
        if self._init.exit is None and self._bell is None:
            self._bell = self._group.oom_bell()
            if self._bell is not None:
                self._loop.watch(self._bell.fd, self._bell.events, lambda _: self._rung())

    def _rung(self) -> None:
        if self._bell is None:
            return
        self._bell.quiet()
        if self._group.oom_kills() > 0:
            self._tell_oom()
        else:  # version 1 rings before it kills
            self._loop.later(_KILL_S, self._tell_oom)

    def _tell_oom(self) -> None:
        if self._group.oom_kills() > 0 and self.on_oom is not None:
            self.on_oom()

    def _stop_listening(self) -> None:
        if self._bell is not None:
            self._loop.unwatch(self._bell.fd)
            os.close(self._bell.fd)
            self._bell = None

    def usage(self) -> Usage:
        if self._last_usage is not None:
            return self._last_usage
        usage = self._group.usage()
        return usage._replace(pids=max(0, usage.pids - 1)) if self._spares.pid() else usage

    def processes(self) -> list[dict[str, Any]]:
        spare = self._spares.pid()
        return top.describe([pid for pid in self._group.pids() if pid != spare])

    def _init_ended(self) -> None:
        """Without a pid namespace of its own the rest of the container does not end with init: end it here."""
        if not self._own_pids:
            self._group.kill()

    def delete(self, by: Deadline) -> None:
        self._stop_listening()
        if self._paused:
            self.resume(by)
        self._init.signal(signal.SIGKILL)
        self._init.reap(by)
        self._group.kill()
        for process_ in self._execs:
            process_.reap(by)
        self._view.end()
        self._spares.end()
        self._helpers.reap()
        self._last_usage = self._last_usage or self._group.usage()
        self._group.remove(by)
        remove_files(self._files)
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        self._execs = []


def remove_files(directory: Path) -> None:
    """Remove the flat directory of files, if it is there."""
    try:
        for name in os.listdir(directory):
            os.unlink(directory / name)
        directory.rmdir()
    except FileNotFoundError:
        pass


def terminal_streams(fds: list[int]) -> Streams:
    """Streams of the terminal master that the child sent."""
    (master,) = fds
    os.set_blocking(master, False)
    return Streams(master, master, None)


def adopt_child(channel: spawn.Channel, helper: process.Child, by: Deadline, helpers: spawn.Helpers) -> tuple[int, int]:
    """(pid, pidfd) of the child that `helper` made for us; it is left to `helpers`. Raises what it reports."""
    try:
        pid = channel.receive_pid(by)
    except BaseException:
        end_child(helper.pidfd)
        raise
    helpers.leave(helper.pidfd)
    return pid, os.pidfd_open(pid)


def end_child(pidfd: int, *, kill: bool = True) -> None:
    """Reap the child behind `pidfd`, killing it first, and close the descriptor."""
    try:
        if kill:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    except (ProcessLookupError, ChildProcessError):
        pass
    finally:
        os.close(pidfd)
