"""netd's event loop: as the shims', but by epoll(7), since thousands of connections are watched at once."""

from __future__ import annotations

import errno
import heapq
import logging
import select
import socket
import time
from collections.abc import Callable
from typing import Any

from ambi.core.deadline import Deadline
from ambi.core.loop import POLLIN, Loop, Timer

log = logging.getLogger(__name__)

_SLACK = 256  # cancelled timers that are kept beside those that run
_ACCEPTS = 64  # at once, before others have their turn
_PAUSE_S = 0.2
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class EpollLoop(Loop):
    """A callback that raises is logged and ends nothing: what one client sends must not cost the others their service."""

    def __init__(self) -> None:
        super().__init__()
        self._epoll = select.epoll()

    def watch(self, fd: int, events: int, ready: Callable[[int], None]) -> None:
        known = self._watched.get(fd)
        self._watched[fd] = (events, ready)
        if known is None:
            self._epoll.register(fd, events)
        elif known[0] != events:
            self._epoll.modify(fd, events)

    def unwatch(self, fd: int) -> None:
        if self._watched.pop(fd, None):
            self._epoll.unregister(fd)

    def cancel(self, timer: Timer) -> None:
        """Forget `timer`. Timers that are set and cancelled with each datagram do not pile up until they would be due."""
        super().cancel(timer)
        if len(self._timers) > 2 * len(self._actions) + _SLACK:
            self._timers = [(at, number) for at, number in self._timers if number in self._actions]
            heapq.heapify(self._timers)

    def step(self, by: Deadline | None = None) -> None:
        waits = [self._timers[0][0] - time.monotonic()] if self._timers else []
        if by is not None and (remaining := by.remaining()) is not None:
            waits.append(remaining)
        for fd, events in self._epoll.poll(max(0.0, min(waits)) if waits else None):
            entry = self._watched.get(fd)  # an earlier callback of this round may have dropped it
            if entry is not None:
                try:
                    entry[1](events)
                except Exception:
                    log.exception("netd: a callback failed")
        if self._timers and self._timers[0][0] <= time.monotonic():
            self._run_timers()

    def _run_timers(self) -> None:
        while (wait := self._next_timer()) is not None and wait <= 0:
            action = self._actions.pop(heapq.heappop(self._timers)[1], None)
            if action is not None:
                try:
                    action()
                except Exception:
                    log.exception("netd: a timer failed")


class Acceptor:
    """Hands each client of a listening socket to `taken`. Without descriptors left it rests a moment instead of spinning."""

    def __init__(self, loop: Loop, listener: socket.socket, taken: Callable[[socket.socket, Any], None]) -> None:
        self._loop, self._listener, self._taken = loop, listener, taken
        self._rest: Timer | None = None
        self._watch()

    def _watch(self) -> None:
        self._rest = None
        self._loop.watch(self._listener.fileno(), POLLIN, self._ready)

    def _ready(self, _: int) -> None:
        for _count in range(_ACCEPTS):
            try:
                client, address = self._listener.accept()
            except OSError as error:  # none left, or a client that has gone already
                if error.errno in _EXHAUSTED:
                    self._loop.unwatch(self._listener.fileno())
                    self._rest = self._loop.later(_PAUSE_S, self._watch)
                return
            client.setblocking(False)
            self._taken(client, address)

    def close(self) -> None:
        """Stop listening."""
        if self._rest is not None:
            self._loop.cancel(self._rest)
        self._loop.unwatch(self._listener.fileno())
        self._listener.close()
