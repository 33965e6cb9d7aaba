"""What the guest's serial port has said: sent on to a stream, and its end kept to explain how the guest ended.

Bytes come from the vCPUs' threads, which never wait for the reader: what it has not read when KEEP_BYTES more have come is
lost, the oldest first. The kernel's last words are what matters.
"""

from __future__ import annotations

import os
import threading

from ambi.core.loop import POLLIN, POLLOUT, Loop

KEEP_BYTES = 64 << 10
PANIC = b"Kernel panic - not syncing"
RESTART = (b"reboot: Restarting system", b"reboot: machine restart")
LAST_WORDS_BYTES = 4096
LINE_CHARACTERS = 300


def _keep(kept: bytearray, data: bytes) -> None:
    kept += data
    if len(kept) > KEEP_BYTES:
        del kept[:-KEEP_BYTES]


def _readable(line: bytes, at: int) -> str:
    """`line` around `at`, at most LINE_CHARACTERS, fit to be printed."""
    part = line[max(0, at - LINE_CHARACTERS // 4) :][:LINE_CHARACTERS].decode("ascii", "replace").strip()
    return "".join(c if c.isprintable() else "." for c in part)


class Console:
    """fd: a stream, written without waiting, which stays the caller's. That its reader is gone is no matter."""

    __slots__ = ("_fd", "_lock", "_loop", "_told", "_unsent", "_wake", "tail")

    def __init__(self, loop: Loop, fd: int) -> None:
        self.tail = bytearray()
        self._unsent = bytearray()
        self._told = False
        self._lock = threading.Lock()
        self._loop = loop
        self._fd = fd
        os.set_blocking(fd, False)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        loop.watch(self._wake, POLLIN, self._woken)

    def put(self, data: bytes) -> None:
        """From any thread."""
        with self._lock:
            _keep(self.tail, data)
            _keep(self._unsent, data)
            told, self._told = self._told, True
        if not told:
            os.eventfd_write(self._wake, 1)

    def _woken(self, _: int) -> None:
        os.eventfd_read(self._wake)
        self._send(0)

    def _send(self, _: int) -> None:
        self.flush()
        with self._lock:
            waits = bool(self._unsent)
            self._told = waits
        if waits:
            self._loop.watch(self._fd, POLLOUT, self._send)
        else:
            self._loop.unwatch(self._fd)

    def flush(self) -> None:
        """Send what the reader takes now."""
        with self._lock:
            try:
                while self._unsent:
                    del self._unsent[: os.write(self._fd, self._unsent)]
            except BlockingIOError:
                pass
            except OSError:
                self._unsent.clear()

    def panic(self) -> str:
        """The line with which the kernel gave up, "" when it did not."""
        lines = self._last_lines(PANIC)
        return lines[0] if lines else ""

    def restarted(self) -> bool:
        """Whether the kernel said, in its last words, that it resets the machine."""
        return any(self._last_lines(words) for words in RESTART)

    def _last_lines(self, words: bytes) -> list[str]:
        with self._lock:
            text = bytes(self.tail if words is PANIC else self.tail[-LAST_WORDS_BYTES:])
        return [_readable(line, line.index(words)) for line in text.splitlines() if words in line]

    def close(self) -> None:
        self.flush()
        self._loop.unwatch(self._wake)
        self._loop.unwatch(self._fd)
        os.close(self._wake)
