"""From the shim to a process of a container: the clone, and what both sides say to each other until execve.

The shim and its child hold the ends of a SEQPACKET pair. Messages are marshalled tuples:

    child -> shim   ("pid", PID)            from a helper: the process that it made, a child of the shim
                    ("ready",)              prepared; with a terminal its master comes along
                    ("exec",)               execve is next
                    ("error", WIRE)         AmbiError.to_wire; the child ends
    shim -> child   ("start", PROGRAM, FLAGS)   go on to execve, with this seccomp program

End of file at the shim after "exec" means that execve succeeded, before it that the child died; at the child, that the
shim is gone. A *helper* is needed where the child must be born in namespaces or cgroups that the shim is not in: it joins
them and makes the child with CLONE_PARENT.
"""

from __future__ import annotations

import gc
import marshal
import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from ambi.core.deadline import Deadline
from ambi.core.errors import DeadlineExceeded, Internal, from_wire
from ambi.core.loop import POLLIN, Loop
from ambi.linux import process
from runtime.finish import Filter, explain

Message = tuple[Any, ...]
ALL_SIGNALS = tuple(n for n in range(1, 65) if n not in (32, 33))
_LIMIT = 128 << 10
_ANCILLARY_BYTES = socket.CMSG_SPACE(16 * 4) + socket.CMSG_SPACE(12)  # 16 descriptors, struct ucred


class Channel:
    """One end of the pair."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._early: list[tuple[Message, list[int]]] = []
        self.fd = end.fileno()
        self.sender = 0  # the pid of who sent the last message, after `pass_credentials`

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        """The shim's end and the child's."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(ours), cls(theirs)

    def pass_credentials(self) -> None:
        """From now on messages tell who sent them; the kernel vouches for the pid, and translates it."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)

    def send(self, *message: Any, fds: tuple[int, ...] = ()) -> None:
        data = marshal.dumps(message)
        if fds:
            socket.send_fds(self._socket, [data], fds)
        else:
            self._socket.send(data, socket.MSG_NOSIGNAL)

    def receive(self, by: Deadline, what: str) -> tuple[Message | None, list[int]]:
        """The next message and the descriptors that came with it; None at the end of file."""
        return self._early.pop(0) if self._early else self._receive(by, what)

    def receive_pid(self, by: Deadline) -> int:
        """The pid of the child that a helper made. The child may have spoken first: that is kept for `receive`."""
        while True:
            message, fds = self._receive(by, "cloning the process")
            if message is None:  # the helper failed, and may have said why
                expect(self, "pid", by, "cloning the process")
            elif message[0] == "pid":
                return int(message[1])
            else:
                self._early.append((message, fds))

    def _receive(self, by: Deadline, what: str) -> tuple[Message | None, list[int]]:
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        if not poll.poll(by.milliseconds()):
            raise DeadlineExceeded(f"{what} did not happen in time")
        try:
            data, fds = self._read()
        except ConnectionResetError:  # told once, and before what it sent: it has ended without reading all that we sent
            data, fds = self._read()
        return (marshal.loads(data) if data else None), fds

    def _read(self) -> tuple[bytes, list[int]]:
        data, ancillary, _, _ = self._socket.recvmsg(_LIMIT, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
        fds: list[int] = []
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds += memoryview(content).cast("i")
            elif level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
                self.sender = int.from_bytes(content[:4], "little")  # struct ucred: pid, uid, gid
        return data, fds

    def close(self) -> None:
        self._socket.close()


class Failed(Exception):
    """Ends the child after its error has been sent."""


def clone(flags: int, body: Callable[[], NoReturn], *, cgroup: int | None = None) -> process.Child:
    """A child that runs `body`, which ends in execve or an exit. Signals are blocked in it until it unblocks them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ALL_SIGNALS)
    try:
        child = process.clone3(flags, cgroup=cgroup)
        if child.pid == 0:
            _child(body)
        return child
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _child(body: Callable[[], NoReturn]) -> NoReturn:
    """Nothing that goes wrong here may return into the shim's code."""
    try:
        gc.disable()
        process.set_dumpable(False)
        process.die_with_parent()
        body()
    except BaseException:
        os._exit(125)
    os._exit(125)


def guarded(channel: Channel, body: Callable[[list[str]], object]) -> NoReturn:
    """Run `body`, whose argument holds what is being done, and tell the shim what went wrong."""
    doing = ["start"]
    try:
        body(doing)
    except BaseException as error:
        try:
            channel.send("error", explain(doing[-1], error))
        except OSError:
            pass
    os._exit(125)


def forbid_imports() -> None:
    """From here on an import fails instead of reading the container's files."""
    sys.meta_path.clear()


def keep_only(keep: list[int]) -> None:
    """Close every descriptor but 0, 1, 2 and those of `keep`."""
    next_fd = 3
    for fd in sorted({fd for fd in keep if fd > 2}):
        if fd > next_fd:
            process.close_range(next_fd, fd - 1)
        next_fd = fd + 1
    process.close_range(next_fd)


def wait_for_start(channel: Channel) -> Filter:
    """In the child: block until the shim says go; ends the child when the shim is gone or wants no start."""
    message, _ = channel.receive(Deadline.never(), "the start")
    if message is None or message[0] != "start":
        os._exit(125)
    return Filter(message[1], message[2])


class Helpers:
    """Helpers that have done their work and are about to end: reaped when they have, while nobody waits for that.

    The end of a process that has joined namespaces and cgroups may sleep for a grace period of the kernel.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._pidfds: set[int] = set()

    def leave(self, pidfd: int) -> None:
        """Take over the descriptor of one."""
        self._pidfds.add(pidfd)
        self._loop.watch(pidfd, POLLIN, lambda _: self._reap(pidfd))

    def reap(self) -> None:
        """Wait for all."""
        for pidfd in list(self._pidfds):
            self._reap(pidfd)

    def _reap(self, pidfd: int) -> None:
        self._pidfds.remove(pidfd)
        self._loop.unwatch(pidfd)
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        os.close(pidfd)


def expect(channel: Channel, kind: str, by: Deadline, what: str) -> tuple[Message, list[int]]:
    """In the shim: the message `kind`; raises what the child reported instead."""
    message, fds = channel.receive(by, what)
    if message is None:
        raise Internal(f"{what}: the process died", hint="`dmesg` may say why, memory limits are a common cause")
    if message[0] == "error":
        raise from_wire(message[1])
    if message[0] != kind:
        raise Internal(f"{what}: unexpected message {message[0]}")
    return message, fds


def finish_start(channel: Channel, program: Filter, by: Deadline) -> None:
    """In the shim: send the child to execve and wait until it has succeeded; raises what the child reports."""
    send_start(channel, program)
    await_execve(channel, by)


def send_start(channel: Channel, program: Filter) -> None:
    """In the shim: allow execve. A child that is not there yet finds it when it asks."""
    try:
        channel.send("start", program.program, program.flags)
    except OSError:  # it died; what it said before is still there
        pass


def await_execve(channel: Channel, by: Deadline) -> None:
    """In the shim: wait until execve has succeeded; raises what the child reports."""
    expect(channel, "exec", by, "execve")
    message, _ = channel.receive(by, "execve")
    if message is not None:
        raise from_wire(message[1])
