"""The event loop of a shim: one thread, `poll(2)`, callbacks. Drivers register their descriptors with it."""

from __future__ import annotations

import heapq
import select
import time
from collections.abc import Callable
from typing import NamedTuple

from ambi.core.deadline import Deadline

POLLIN = select.POLLIN
POLLOUT = select.POLLOUT
POLLHUP = select.POLLHUP | select.POLLERR  # reported always, whatever was asked for


class Timer(NamedTuple):
    """What `later` returns, for `cancel`."""

    at: float
    number: int


class Loop:
    """Watches descriptors and timers. Callbacks run to completion, one at a time; one that raises ends `run`."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._watched: dict[int, tuple[int, Callable[[int], None]]] = {}
        self._timers: list[tuple[float, int]] = []
        self._actions: dict[int, Callable[[], None]] = {}
        self._count = 0

    def watch(self, fd: int, events: int, ready: Callable[[int], None]) -> None:
        """Call `ready(revents)` whenever `fd` has one of `events`, POLLHUP or POLLERR. Replaces an earlier watch of `fd`."""
        self._watched[fd] = (events, ready)
        self._poll.register(fd, events)

    def unwatch(self, fd: int) -> None:
        """Forget `fd`. Must come before it is closed; unknown descriptors are ignored."""
        if self._watched.pop(fd, None):
            self._poll.unregister(fd)

    def later(self, seconds: float, action: Callable[[], None]) -> Timer:
        self._count += 1
        timer = Timer(time.monotonic() + seconds, self._count)
        heapq.heappush(self._timers, (timer.at, timer.number))
        self._actions[timer.number] = action
        return timer

    def cancel(self, timer: Timer) -> None:
        self._actions.pop(timer.number, None)

    def run(self, until: Callable[[], bool], by: Deadline | None = None) -> bool:
        """Dispatch until `until()` is true (returns True) or `by` has passed (returns False)."""
        while not until():
            if by is not None and by.expired():
                return False
            self.step(by)
        return True

    def step(self, by: Deadline | None = None) -> None:
        """Wait for the next event or timer, at most to `by`, and dispatch what is due."""
        waits = [t for t in (by.remaining() if by else None, self._next_timer()) if t is not None]
        for fd, revents in self._poll.poll(max(0, int(min(waits) * 1000 + 0.999)) if waits else None):
            entry = self._watched.get(fd)  # an earlier callback of this round may have dropped it
            if entry is not None:
                entry[1](revents)
        while (wait := self._next_timer()) is not None and wait <= 0:
            _, number = heapq.heappop(self._timers)
            action = self._actions.pop(number, None)
            if action is not None:
                action()

    def _next_timer(self) -> float | None:
        while self._timers and self._timers[0][1] not in self._actions:
            heapq.heappop(self._timers)
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None
