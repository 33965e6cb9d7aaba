"""What is to be done later: one thread that sleeps until the next moment, and a few that do the work."""

from __future__ import annotations

import heapq
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

_WORKERS = 8

Action = Callable[[], None]


class Scheduler:
    """Runs actions at their time, at most _WORKERS at once; a late one runs as soon as it can.

    Threads exist only once something has been asked for, and none of them keeps the process from ending.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._due: list[tuple[float, int]] = []
        self._actions: dict[int, Action] = {}
        self._numbers = itertools.count(1)
        self._work: queue.SimpleQueue[Action | None] = queue.SimpleQueue()
        self._sleeps = False  # whether there is the thread that sleeps
        self._workers = self._busy = 0
        self._closed = False

    def later(self, seconds: float, action: Action) -> int:
        """Returns a number for `cancel`."""
        with self._changed:
            number = next(self._numbers)
            if self._closed:
                return number
            if not self._sleeps:
                self._sleeps = True
                threading.Thread(target=self._sleep, name="schedule", daemon=True).start()
            self._actions[number] = action
            heapq.heappush(self._due, (time.monotonic() + seconds, number))
            self._changed.notify()
            return number

    def cancel(self, number: int) -> None:
        """One that has begun or has never been is ignored."""
        with self._changed:
            self._actions.pop(number, None)

    def close(self) -> None:
        """Nothing begins any more. What runs is not waited for."""
        with self._changed:
            self._closed = True
            self._actions.clear()
            self._changed.notify()
            for _ in range(self._workers):
                self._work.put(None)

    def _sleep(self) -> None:
        with self._changed:
            while not self._closed:
                if not self._due or self._due[0][0] > time.monotonic():
                    self._changed.wait(self._due[0][0] - time.monotonic() if self._due else None)
                    continue
                action = self._actions.pop(heapq.heappop(self._due)[1], None)
                if action is not None:
                    self._hand_out(action)

    def _hand_out(self, action: Action) -> None:
        self._busy += 1
        if self._busy > self._workers and self._workers < _WORKERS:
            self._workers += 1
            threading.Thread(target=self._serve, name="later", daemon=True).start()
        self._work.put(action)

    def _serve(self) -> None:
        while (action := self._work.get()) is not None:
            try:
                action()
            except Exception:  # one instance's failure must not silence the others'
                log.exception("what was to be done later")
            finally:
                with self._changed:
                    self._busy -= 1
