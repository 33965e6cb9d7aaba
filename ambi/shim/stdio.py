"""Pumps between a process's stdio and the log and clients. All descriptors are non-blocking and owned by the pump."""

from __future__ import annotations

import os
from collections.abc import Callable

from ambi.core.loop import POLLIN, POLLOUT, Loop

CHUNK = 64 << 10  # a pipe's usual capacity; larger reads would be mmapped anew by malloc each time
STDIN_LIMIT = 256 << 10  # bytes waiting for the process, from where on clients are not read
_MOST_PIPE = 1 << 20  # the most that a pipe can hold without privilege


class Output:
    """Reads one stream of a process to its end: EOF, or EIO from a terminal whose last user is gone."""

    def __init__(self, loop: Loop, fd: int, sink: Callable[[bytes], None], ended: Callable[[], None]) -> None:
        self._loop = loop
        self._fd = fd
        self._sink = sink
        self._ended = ended
        self.open = True
        loop.watch(fd, POLLIN, self._ready)

    def _ready(self, _revents: int) -> None:
        self._read()

    def _read(self) -> bool:
        """Pass one chunk on; False when there is none now, or none any more."""
        try:
            data = os.read(self._fd, CHUNK)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if data:
            self._sink(data)
            return True
        self.close()
        self._ended()
        return False

    def finish(self) -> None:
        """Take what is there now, at most a pipe full, and end: somebody else holds the other side open."""
        read = 0
        while self.open and read < _MOST_PIPE and self._read():
            read += CHUNK
        if self.open:
            self.close()
            self._ended()

    def close(self) -> None:
        if self.open:
            self.open = False
            self._loop.unwatch(self._fd)
            os.close(self._fd)


class Input:
    """Feeds a process's stdin. What it does not take is dropped once it has closed its side."""

    def __init__(self, loop: Loop, fd: int) -> None:
        self._loop = loop
        self._fd: int | None = fd
        self._pending = bytearray()
        self._closing = False
        self.on_room: Callable[[], None] = lambda: None

    @property
    def full(self) -> bool:
        """Whether clients should wait; `on_room` is called when that ends."""
        return len(self._pending) >= STDIN_LIMIT

    def write(self, data: bytes) -> None:
        if self._fd is None or self._closing or not data:
            return
        if not self._pending:
            data = data[self._push(data) :]
            if not data or self._fd is None:
                return
            self._loop.watch(self._fd, POLLOUT, lambda _: self._flush())
        self._pending += data

    def end(self) -> None:
        """Give the process EOF after what is pending."""
        self._closing = True
        if not self._pending:
            self.close()

    def close(self) -> None:
        """Close at once; what was pending is lost."""
        if self._fd is not None:
            self._loop.unwatch(self._fd)
            os.close(self._fd)
            self._fd = None
        self._pending.clear()
        self.on_room()

    def _push(self, data: bytes | bytearray) -> int:
        assert self._fd is not None
        try:
            return os.write(self._fd, data)
        except BlockingIOError:
            return 0
        except OSError:  # EPIPE: it has closed its stdin, or is gone
            self.close()
            return len(data)

    def _flush(self) -> None:
        was_full = self.full
        taken = self._push(self._pending)
        if self._fd is None:
            return
        del self._pending[:taken]
        if not self._pending:
            self._loop.unwatch(self._fd)
            if self._closing:
                self.close()
                return
        if was_full and not self.full:
            self.on_room()
