"""Decompressing and hashing in a thread of its own, a few chunks ahead of who parses and writes them.

Both halves take about as long, and all but parsing releases the interpreter's lock. Each chunk passes the lock back and
forth a few times, so it must change hands soon: see _SWITCH_S.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue

_DEPTH = 3  # chunks of a mebibyte
_SWITCH_S = 1e-4  # after which a thread that parses gives the lock to the other; a chunk is parsed in about five of them


class Ahead:
    """One thread, for one use of `run` after another. Its memory is that of the chunks that wait."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Iterable[bytes]] = SimpleQueue()
        self._results: SimpleQueue[bytes | BaseException | None] = SimpleQueue()
        self._room: SimpleQueue[None] = SimpleQueue()  # one for each chunk that may wait

    def start(self, begin: Callable[[], object]) -> None:
        """Start the thread, which calls `begin` first; returns when it has done so."""
        sys.setswitchinterval(_SWITCH_S)
        begun: SimpleQueue[BaseException | None] = SimpleQueue()
        threading.Thread(target=self._work, args=(begin, begun), daemon=True).start()
        if (error := begun.get()) is not None:
            raise error

    def run(self, source: Iterable[bytes]) -> Iterator[bytes]:
        """The chunks of `source`, which the thread alone iterates; what it raises is raised here, in its place.

        Go on to the end: who leaves earlier must leave the process too, for the thread waits for ever.
        """
        for _ in range(_DEPTH):
            self._room.put(None)
        self._jobs.put(source)
        while (found := self._results.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            yield found
            self._room.put(None)
        while self._room.qsize():
            self._room.get()

    def _work(self, begin: Callable[[], object], begun: SimpleQueue[BaseException | None]) -> None:
        try:
            begin()
        except BaseException as error:
            begun.put(error)
            return
        begun.put(None)
        while True:
            self._one(self._jobs.get())

    def _one(self, source: Iterable[bytes]) -> None:
        try:
            for chunk in source:
                self._room.get()
                self._results.put(chunk)
        except BaseException as error:
            self._results.put(error)
        else:
            self._results.put(None)
