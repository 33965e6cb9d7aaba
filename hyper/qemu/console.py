"""The last 64 KiB of what a guest's kernel and its VMM said, kept to explain how a VM ended."""

from __future__ import annotations

import os
from pathlib import Path

from ambi.core.loop import POLLIN, Loop

KEEP_BYTES = 64 << 10
READ_BYTES = 16 << 10
PAUSE_S = 0.2  # between reads: a guest that floods its console slows itself down, and nothing else


class Console:
    """Reads descriptors (which it owns) into one bounded tail, at most READ_BYTES from each every PAUSE_S."""

    __slots__ = ("_fds", "_loop", "_tail")

    def __init__(self, loop: Loop, fds: tuple[int, ...]) -> None:
        self._loop = loop
        self._fds = set(fds)
        self._tail = bytearray()
        for fd in fds:
            os.set_blocking(fd, False)
            self._watch(fd)

    def _watch(self, fd: int) -> None:
        if fd in self._fds:
            self._loop.watch(fd, POLLIN, lambda _: self._ready(fd))

    def _ready(self, fd: int) -> None:
        if self._read(fd):
            self._loop.unwatch(fd)
            self._loop.later(PAUSE_S, lambda: self._watch(fd))

    def _read(self, fd: int) -> bool:
        """Read once; False when there is nothing more, then for ever if `fd` has ended."""
        try:
            data = os.read(fd, READ_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._drop(fd)
            return False
        self.note(data)
        return True

    def note(self, data: bytes) -> None:
        self._tail += data
        del self._tail[:-KEEP_BYTES]

    def drain(self) -> None:
        """Read what is there now, bounded: for the last words of a VM that has ended."""
        for fd in tuple(self._fds):
            for _ in range(KEEP_BYTES // READ_BYTES):
                if not self._read(fd):
                    break

    def text(self) -> str:
        """The tail, fit to be printed: control characters but for line ends and tabs are dots."""
        text = self._tail.decode("utf-8", "replace").replace("\r\n", "\n")
        return "".join(c if c.isprintable() or c in "\n\t" else "." for c in text)

    def last_line(self) -> str:
        """What probably explains the end: the first line of a panic, else the last line that is not empty."""
        lines = [line.strip() for line in self.text().splitlines() if line.strip()]
        panics = [line for line in lines if "Kernel panic" in line]
        return (panics or lines or [""])[-1][:300]

    def save(self, path: Path) -> None:
        """Write the tail to `path`, for whoever looks into a failure; an error is no matter here."""
        try:
            path.write_bytes(self._tail)
        except OSError:
            pass

    def _drop(self, fd: int) -> None:
        self._fds.discard(fd)
        self._loop.unwatch(fd)
        os.close(fd)

    def close(self) -> None:
        for fd in tuple(self._fds):
            self._drop(fd)
