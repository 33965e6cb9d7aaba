"""Bytes that wait for a slow client: a little in memory, then in unlinked files."""

from __future__ import annotations

import os
from collections import deque

from ambi.core.errors import StorageFull

MEMORY_BYTES = 256 << 10
SPOOL_BYTES = 4 << 30
SEGMENT_BYTES = 128 << 20  # a file whose bytes have all been sent is given back, so a spool needs no more disk than it holds
_CHUNK = 256 << 10


class Backlog:
    """A queue of bytes: `push` at the end, `peek` and `consume` at the front.

    Segments are unlinked files in `directory`, which may be removed meanwhile. `push` raises StorageFull past SPOOL_BYTES
    and when the disk is full; the queue is then of no more use.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._memory: deque[bytes] = deque()
        self._memory_bytes = 0
        self._segments: deque[_Segment] = deque()
        self._taken = 0  # bytes of the first chunk in memory that were consumed

    def __len__(self) -> int:
        return self._memory_bytes + sum(segment.written - segment.read for segment in self._segments)

    def push(self, data: bytes | memoryview) -> None:
        if not self._segments and self._memory_bytes + len(data) <= MEMORY_BYTES:
            self._memory.append(bytes(data))
            self._memory_bytes += len(data)
            return
        try:
            self._spool(memoryview(data))
        except OSError as error:
            raise StorageFull(f"cannot keep output for a slow client in {self._directory}: {error.strerror}") from error

    def peek(self) -> bytes | memoryview:
        """The next bytes, empty when there are none."""
        if self._memory:
            return memoryview(self._memory[0])[self._taken :]
        if self._segments:
            return self._segments[0].peek()
        return b""

    def consume(self, count: int) -> None:
        """Drop `count` bytes of what `peek` returned."""
        if self._memory:
            self._memory_bytes -= count
            self._taken += count
            if self._taken == len(self._memory[0]):
                self._memory.popleft()
                self._taken = 0
        elif count:
            segment = self._segments[0]
            segment.read += count
            if segment.read == segment.written:
                segment.close()
                self._segments.popleft()

    def close(self) -> None:
        self._memory.clear()
        self._memory_bytes = self._taken = 0
        while self._segments:
            self._segments.popleft().close()

    def descriptors(self) -> list[int]:
        return [segment.fd for segment in self._segments]

    def _spool(self, data: memoryview) -> None:
        if len(self) - self._memory_bytes + len(data) > SPOOL_BYTES:
            raise StorageFull(f"a client is more than {SPOOL_BYTES >> 30} GiB behind")
        while data:
            if not self._segments or self._segments[-1].written >= SEGMENT_BYTES:
                self._segments.append(_Segment(_unlinked(self._directory)))
            data = data[self._segments[-1].append(data) :]


class _Segment:
    __slots__ = ("fd", "read", "written")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.read = 0
        self.written = 0

    def append(self, data: memoryview) -> int:
        count = os.pwrite(self.fd, data, self.written)
        self.written += count
        return count

    def peek(self) -> bytes:
        return os.pread(self.fd, min(_CHUNK, self.written - self.read), self.read)

    def close(self) -> None:
        os.close(self.fd)


def _unlinked(directory: str) -> int:
    try:
        return os.open(directory, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    except OSError:  # not every file system has O_TMPFILE
        path = os.path.join(directory, f".spool-{os.urandom(8).hex()}")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.unlink(path)
        return fd
