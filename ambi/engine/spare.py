"""A network namespace made before somebody waits for it: that takes the kernel a millisecond."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable

from ambi.core.errors import AmbiError

log = logging.getLogger(__name__)

_KEPT = 2
_PAUSE_S = 0.1  # after a taking: the start that it was for is over then, and the one after it


class Spare:
    """A few namespaces that nobody uses yet, filled up again by a thread after each taking."""

    def __init__(self, make: Callable[[], int]) -> None:
        """make: a new one's descriptor."""
        self._make = make
        self._ready: deque[int] = deque()
        self._lock = threading.Lock()
        self._filling = False
        self._closed = False

    def take(self) -> int:
        """The descriptor of a fresh namespace, which the caller closes."""
        fd = self.take_now()
        return self._make() if fd is None else fd

    def take_now(self) -> int | None:
        """One that is ready, None when none is."""
        with self._lock:
            fd = self._ready.popleft() if self._ready else None
            start = not self._filling and not self._closed
            self._filling = self._filling or start
        if start:
            timer = threading.Timer(_PAUSE_S, self.fill)
            timer.daemon = True
            timer.start()
        return fd

    def fill(self) -> None:
        """Make what is missing. Failing is no error: `take` says why."""
        try:
            while not self._closed and len(self._ready) < _KEPT:
                fd = self._make()
                with self._lock:
                    if not self._closed:
                        self._ready.append(fd)
                        continue
                os.close(fd)
        except AmbiError as error:
            log.warning("%s", error)
        finally:
            with self._lock:
                self._filling = False

    def close(self) -> None:
        with self._lock:
            self._closed = True
            while self._ready:
                os.close(self._ready.popleft())
