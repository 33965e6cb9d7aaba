"""What is to be done later: one thread that sleeps until the next moment, and a few that do the work."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

log = logging.getLogger(__name__)

_WORKERS = 8


class Scheduler:
    """Runs actions at their time, at most _WORKERS at once; a late one runs as soon as it can. Both kinds of thread exist
    only once something has been asked for."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._due: list[tuple[float, int]] = []
        self._actions: dict[int, Callable[[], None]] = {}
        self._numbers = itertools.count(1)
        self._pool: ThreadPoolExecutor | None = None
        self._closed = False

    def later(self, seconds: float, action: Callable[[], None]) -> int:
        """Returns a number for `cancel`."""
        with self._changed:
            number = next(self._numbers)
            if self._closed:
                return number
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_WORKERS, "later")
                threading.Thread(target=self._run, args=(self._pool,), name="schedule", daemon=True).start()
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

    def _run(self, pool: ThreadPoolExecutor) -> None:
        while True:
            with self._changed:
                while not self._closed and (not self._due or self._due[0][0] > time.monotonic()):
                    self._changed.wait(self._due[0][0] - time.monotonic() if self._due else None)
                if self._closed:
                    pool.shutdown(wait=False)
                    return
                action = self._actions.pop(heapq.heappop(self._due)[1], None)
            if action is not None:
                pool.submit(_guarded, action)


def _guarded(action: Callable[[], None]) -> None:
    try:
        action()
    except Exception as error:  # one instance's failure must not silence the others'
        threading.excepthook(threading.ExceptHookArgs((type(error), error, error.__traceback__, None)))
