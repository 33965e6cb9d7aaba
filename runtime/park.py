"""A parked starter: the part of a start that sleeps, done before anybody waits for it.

On cgroup version 1 a process enters a cgroup by migration alone, and the first migration after some idle time sleeps for a
grace period of the kernel, 6 to 15 ms: more than all else together. So the shim forks a *starter* when it has no job yet.
It makes fresh cgroups (`park-PID` in the group of all containers), joins them, and waits.
With the job the shim renames the cgroups to their final name, which only version 1 can, and writes the limits; the starter
clones init with CLONE_PARENT, so init is the shim's child and is born in the cgroups, and ends.

On version 2 there is nothing to gain: CLONE_INTO_CGROUP does not migrate.
"""

from __future__ import annotations

import marshal
import os
from pathlib import PurePosixPath
from typing import NoReturn

from ambi.core.deadline import Deadline
from ambi.core.errors import AmbiError
from ambi.linux import memfd, process
from runtime import finish, init, spawn
from runtime.cgroups.hierarchies import Hierarchies
from runtime.cgroups.v1 import V1Group

PARENT = PurePosixPath("/ambi")  # where the engine puts its instances; a group elsewhere is started without
_PREFIX = "park-"


class Starter:
    """The shim's side of a parked starter."""

    def __init__(self, hierarchies: Hierarchies, channel: spawn.Channel, child: process.Child, group: V1Group) -> None:
        self._hierarchies, self._channel, self._child, self._group = hierarchies, channel, child, group
        self._open = True

    @classmethod
    def make(cls, hierarchies: Hierarchies) -> Starter:
        """Fork one, and remove what killed ones have left; OSError when the cgroups cannot be made."""
        cls.sweep(hierarchies, PARENT)
        finish.warm()
        group = V1Group(hierarchies, PARENT / f"{_PREFIX}{os.getpid()}")
        group.make()
        ours, theirs = spawn.Channel.pair()
        child = spawn.clone(0, lambda: _wait(group, theirs))
        theirs.close()
        return cls(hierarchies, ours, child, group)

    def become(self, group: V1Group) -> bool:
        """Take the name of `group`; False when that cannot be."""
        message, _ = self._channel.receive(Deadline.after(10), "parking a starter")
        if message != ("parked",) or group.path.parent != PARENT:
            return False
        try:
            group.adopt(self._group.path)
        except OSError:
            return False
        return True

    def start(
        self, job: init.Job, stdio: list[int], joined: list[int], helpers: spawn.Helpers, by: Deadline
    ) -> tuple[spawn.Channel, int, int]:
        """Let it clone init: (our end of the channel, pid, pidfd). The starter is left to `helpers`."""
        text = memfd.sealed("ambi-job", marshal.dumps(tuple(job)))
        try:
            self._channel.send("job", len(stdio), fds=(text, *stdio, *joined))
            pid = self._channel.receive_pid(by)
        finally:
            os.close(text)
        pidfd = os.pidfd_open(pid)
        self._open = False
        helpers.leave(self._child.pidfd)
        return self._channel, pid, pidfd

    def _reap(self) -> None:
        if self._open:
            self._open = False
            os.waitid(os.P_PIDFD, self._child.pidfd, os.WEXITED)
            os.close(self._child.pidfd)

    def close(self) -> None:
        """End it if it still waits: it does when its channel ends."""
        if self._open:
            self._channel.close()
            self._reap()

    def discard(self) -> None:
        """End it and remove its cgroups."""
        self.close()
        try:
            self._group.remove(Deadline.after(3))
        except AmbiError:  # sweep will
            pass

    @staticmethod
    def sweep(hierarchies: Hierarchies, parent: PurePosixPath) -> None:
        """Remove the cgroups of starters whose shim is gone."""
        for hierarchy in hierarchies.v1:
            try:
                names = os.listdir(f"{hierarchy.mount}{parent}")
            except OSError:
                continue
            for name in names:
                pid = name.removeprefix(_PREFIX)
                if name != pid and pid.isdecimal() and not _lives(pid):
                    try:
                        os.rmdir(f"{hierarchy.mount}{parent}/{name}")
                    except OSError:
                        pass


def _lives(pid: str) -> bool:
    """Whether process `pid` runs; one that nobody has reaped does not."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            return file.read(4096).rpartition(b") ")[2][:1] not in (b"Z", b"X")
    except OSError:
        return False


def _wait(group: V1Group, channel: spawn.Channel) -> NoReturn:
    """The starter's whole life."""
    spawn.guarded(channel, lambda doing: _live(group, channel, doing))


def _live(group: V1Group, channel: spawn.Channel, doing: list[str]) -> None:
    spawn.keep_only([channel.fd])
    doing.append("join the parked cgroups")
    for directory in group.joins:
        with open(f"{directory}/cgroup.procs", "wb", buffering=0) as file:
            file.write(b"0")
    channel.send("parked")
    message, fds = channel.receive(Deadline.never(), "the job")
    if message is None:
        os._exit(0)
    text, *rest = fds
    job = init.Job(*marshal.loads(os.pread(text, 1 << 26, 0)))
    stdio, joined = rest[: message[1]], rest[message[1] :]
    _clone(job, init.Descriptors(channel, stdio, joined), doing)


def _clone(job: init.Job, given: init.Descriptors, doing: list[str]) -> None:
    doing.append("clone the process")
    child = spawn.clone(init.clone_flags(job) | process.CLONE_PARENT, lambda: init.run(job, given))
    given.channel.send("pid", child.pid)
    os._exit(0)
