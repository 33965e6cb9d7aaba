"""The helper that makes a container's execs, and stays for a while after one.

An exec enters the container's cgroups, which on version 1 is a migration and sleeps for a grace period of the kernel, as
`park` tells: 6 to 15 ms of an exec that else takes 3. And a helper is a fork of the shim, whose pages it copies before it
does anything. Where a program has been executed, another often follows, as of a health check or a script: so the helper is
kept, in the cgroups and namespaces of the container and with its memory warm, and makes those too (docs/design/0005).

It is in no pid namespace of the container, so nobody in there can see it; but on version 1 it counts as one of the
container's processes. There a container with a limit of processes or memory keeps none.
"""

from __future__ import annotations

import marshal
import os
import select
import signal

from ambi.core.deadline import Deadline
from ambi.core.errors import Internal, Unavailable, from_wire
from ambi.core.loop import Loop, Timer
from ambi.linux import memfd, process
from runtime import exec as executor
from runtime import spawn

KEPT_SECONDS = 60.0
_INLINE_BYTES = 64 << 10  # larger jobs travel in a memory file


class Helper:
    """One helper process. sound: it is idle, and not at work or in an unknown state."""

    def __init__(self, channel: spawn.Channel, child: process.Child) -> None:
        self._channel, self._child = channel, child
        self.pid, self.sound = child.pid, True

    @classmethod
    def make(cls, joins: list[str]) -> Helper:
        ours, theirs = spawn.Channel.pair()
        try:
            ours.pass_credentials()
            child = spawn.clone(0, lambda: executor.serve(joins, theirs))
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return cls(ours, child)

    def lives(self) -> bool:
        poll = select.poll()
        poll.register(self._child.pidfd, select.POLLIN)
        return not poll.poll(0)

    def give(self, job: executor.Job, fds: tuple[int, ...]) -> None:
        """Send it to work. Raises OSError when it has ended, as one that was killed for memory has."""
        self.sound = False
        data = marshal.dumps((job.id, job.spec, tuple(job.program), job.has_cgroup))
        if len(data) <= _INLINE_BYTES:
            self._channel.send("job", data, fds=fds)
            return
        text = memfd.sealed("ambi-exec", data)
        try:
            self._channel.send("job", b"", fds=(text, *fds))
        finally:
            os.close(text)

    def await_pid(self, by: Deadline) -> int:
        """Of the child that it has made, which is ours to reap. Raises what went wrong before there was one."""
        self._await("pid", by, "cloning the process")
        return self._channel.sender

    def await_execve(self, by: Deadline) -> list[int]:
        """The descriptors that come with the news that its program runs. Raises what the helper reports."""
        fds = self._await("exec", by, "execve")
        self.sound = True
        return fds

    def _await(self, kind: str, by: Deadline, what: str) -> list[int]:
        message, fds = self._channel.receive(by, what)
        if message is None:
            raise Internal(f"{what}: the helper died", hint="`dmesg` may say why, memory limits are a common cause")
        if message[0] == "error":
            self.sound = True
            raise from_wire(message[1])
        if message[0] != kind:
            raise Internal(f"{what}: unexpected message {message[0]}")
        return fds

    def leave(self, helpers: spawn.Helpers) -> None:
        """Let it end, which it does by itself; `helpers` reap it."""
        self._channel.close()
        helpers.leave(self._child.pidfd)

    def end(self) -> None:
        """Kill and reap it: it may hang in a file system of the container."""
        self._channel.close()
        try:
            signal.pidfd_send_signal(self._child.pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass
        os.waitid(os.P_PIDFD, self._child.pidfd, os.WEXITED)
        os.close(self._child.pidfd)


class Spares:
    """The helper of one container. joins: the cgroups that it enters; keep: whether it stays after an exec."""

    def __init__(self, loop: Loop, helpers: spawn.Helpers, joins: list[str], *, keep: bool) -> None:
        self._loop, self._helpers, self._joins, self._keep = loop, helpers, joins, keep
        self._helper: Helper | None = None
        self._timer: Timer | None = None

    def pid(self) -> int:
        """Of what is counted as a process of the container and is none; 0 when there is nothing."""
        return self._helper.pid if self._helper is not None and self._joins and self._helper.lives() else 0

    def execute(self, job: executor.Job, fds: tuple[int, ...], by: Deadline) -> Execution:
        """Have the process of `job` made. Raises what went wrong before there was one; nothing is left then."""
        self._cancel()
        helper, self._helper = self._helper, None
        if helper is not None:
            try:
                return self._start(helper, job, fds, by)
            except (OSError, Internal):
                if helper.sound:
                    raise
            # else it was killed, as for memory that ran out: another does it
        return self._start(Helper.make(self._joins), job, fds, by)

    def _start(self, helper: Helper, job: executor.Job, fds: tuple[int, ...], by: Deadline) -> Execution:
        try:
            helper.give(job, fds)
            return Execution(self, helper, helper.await_pid(by))
        except BaseException:
            self.put_back(helper)
            raise

    def put_back(self, helper: Helper) -> None:
        """After its work, done or failed."""
        if not helper.sound:
            helper.end()
        elif self._keep:
            self._helper = helper
            self._timer = self._loop.later(KEPT_SECONDS, self._discard)
        else:
            helper.leave(self._helpers)

    def end(self) -> None:
        """End it if it is there."""
        self._cancel()
        self._discard()

    def _cancel(self) -> None:
        if self._timer is not None:
            self._loop.cancel(self._timer)
            self._timer = None

    def _discard(self) -> None:
        helper, self._helper = self._helper, None
        if helper is not None:
            helper.end()


class Execution:
    """A child that a helper has made and that is on its way to execve. pid, pidfd: ours to reap and to close."""

    def __init__(self, spares: Spares, helper: Helper, pid: int) -> None:
        self._spares, self._helper = spares, helper
        self.pid = pid
        try:
            self.pidfd = os.pidfd_open(pid)
        except OSError as error:  # no descriptor left
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise Unavailable(f"cannot watch the process of an exec: {error.strerror}") from error

    def finish(self, by: Deadline) -> list[int]:
        """Wait until its program runs; the descriptors that come with it. Raises what the helper reports."""
        try:
            return self._helper.await_execve(by)
        finally:
            self._spares.put_back(self._helper)
