"""A spare helper: the part of an exec that sleeps, done before anybody waits for it.

An exec enters the container's cgroups, which on version 1 is a migration and sleeps for a grace period of the kernel, as
`park` tells: 6 to 15 ms of an exec that else takes 4. Where a program has been executed, another often follows, as of a
health check or a script: so a helper is kept in the cgroups for a while after an exec, and the next exec is made by it.

It is in the cgroups and in nothing else of the container until it has a job, so nobody in there can see it; but it counts
as one of the container's processes. A container with a limit of processes or memory has none.
"""

from __future__ import annotations

import marshal
import os
import select
from collections.abc import Callable

from ambi.core.loop import Loop, Timer
from ambi.linux import memfd, process
from runtime import exec as executor
from runtime import spawn

KEPT_SECONDS = 60.0
MAKE_SECONDS = 0.005  # after an exec: not in the way of its own process, and in time for the next


class Spare:
    """One waiting helper."""

    def __init__(self, channel: spawn.Channel, child: process.Child) -> None:
        self.channel, self.child = channel, child

    @classmethod
    def make(cls, joins: list[str]) -> Spare:
        ours, theirs = spawn.Channel.pair()
        try:
            child = spawn.clone(0, lambda: executor.help_later(joins, theirs))
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        return cls(ours, child)

    def lives(self) -> bool:
        poll = select.poll()
        poll.register(self.child.pidfd, select.POLLIN)
        return not poll.poll(0)

    def give(self, job: executor.Job, stdio: list[int]) -> bool:
        """Send it to work: from here on it is as any helper. False when it has ended; it is reaped then."""
        text = memfd.sealed("ambi-exec", marshal.dumps(tuple(job)))
        try:
            self.channel.send("job", fds=(text, job.init_pidfd, *stdio))
        except OSError:  # killed, as for memory that ran out
            self.reap()
            return False
        finally:
            os.close(text)
        return True

    def reap(self) -> None:
        """It ends when its channel does."""
        self.channel.close()
        os.waitid(os.P_PIDFD, self.child.pidfd, os.WEXITED)
        os.close(self.child.pidfd)


class Spares:
    """The spare helper of one container: made after an exec, kept for KEPT_SECONDS. joins: empty for never."""

    def __init__(self, loop: Loop, joins: list[str]) -> None:
        self._loop, self._joins = loop, joins
        self._spare: Spare | None = None
        self._timer: Timer | None = None

    def pid(self) -> int:
        """0 when there is none."""
        return self._spare.child.pid if self._spare is not None and self._spare.lives() else 0

    def take(self) -> Spare | None:
        """The spare helper, if there is one; another is made in a moment. The caller reaps it and closes its channel."""
        if not self._joins:
            return None
        spare, self._spare = self._spare, None
        self._at(MAKE_SECONDS, self._make)
        return spare

    def end(self) -> None:
        """For ever: end it if it is there."""
        self._joins = []
        if self._timer is not None:
            self._loop.cancel(self._timer)
        self._discard()

    def _at(self, seconds: float, action: Callable[[], None]) -> None:
        if self._timer is not None:
            self._loop.cancel(self._timer)
        self._timer = self._loop.later(seconds, action)

    def _make(self) -> None:
        try:
            self._spare = Spare.make(self._joins)
        except OSError:  # no process or descriptor to spare: execs do without
            return
        self._at(KEPT_SECONDS, self._discard)

    def _discard(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.reap()
