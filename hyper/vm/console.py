"""The last 64 KiB of what a guest's kernel said, and of what its VMM did, kept to explain how a VM ended."""

from __future__ import annotations

import os
from pathlib import Path

from ambi.core.loop import POLLIN, Loop

KEEP_BYTES = 64 << 10
READ_BYTES = 16 << 10
PAUSE_S = 0.2  # between reads: a guest that floods its console slows itself down, and nothing else


class Console:
    """Reads the guest's serial port and the VMM's own output, at most READ_BYTES from each every PAUSE_S. Owns both."""

    __slots__ = ("_fds", "_loop", "_serial", "_tails")

    def __init__(self, loop: Loop, serial: int, output: int) -> None:
        self._loop = loop
        self._serial = serial
        self._fds = {serial, output}
        self._tails = {True: bytearray(), False: bytearray()}  # the guest's, the VMM's
        for fd in (serial, output):
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
        self._keep(data, guest=fd == self._serial)
        return True

    def write(self, data: bytes) -> None:
        """To the guest's serial port. A VMM that does not read is not waited for."""
        try:
            os.write(self._serial, data)
        except OSError:
            pass

    def note(self, data: bytes) -> None:
        """Add what the guest said in another way."""
        self._keep(data, guest=True)

    def _keep(self, data: bytes, *, guest: bool) -> None:
        tail = self._tails[guest]
        tail += data
        del tail[:-KEEP_BYTES]

    def drain(self) -> None:
        """Read what is there now, bounded: for the last words of a VM that has ended."""
        for fd in tuple(self._fds):
            for _ in range(KEEP_BYTES // READ_BYTES):
                if not self._read(fd):
                    break

    def cause(self) -> str:
        """What explains an end, one line: the kernel's panic, else the VMM's last word, else ""."""
        panics = [line for line in self._lines(guest=True) if "Kernel panic" in line]
        words = [line for line in self._lines(guest=False) if "warning:" not in line]
        return (panics[:1] or words[-1:] or [""])[0]

    def last_line(self) -> str:
        """The `cause`, else whatever the guest said last."""
        return self.cause() or (self._lines(guest=True) or [""])[-1]

    def _lines(self, *, guest: bool) -> list[str]:
        """The lines of a tail that are not empty, cut to 300 characters and fit to be printed."""
        lines = (line.strip() for line in self._tails[guest].decode("utf-8", "replace").splitlines())
        return ["".join(c if c.isprintable() else "." for c in line[:300]) for line in lines if line]

    def save(self, path: Path) -> None:
        """Write both tails to `path`, for whoever looks into a failure; an error is no matter here."""
        try:
            path.write_bytes(self._tails[True] + self._tails[False])
        except OSError:  # a full disk: the cause is in the exit's reason as well
            pass

    def _drop(self, fd: int) -> None:
        self._fds.discard(fd)
        self._loop.unwatch(fd)
        os.close(fd)

    def close(self) -> None:
        for fd in tuple(self._fds):
            self._drop(fd)
