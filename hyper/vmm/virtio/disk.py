"""What is behind a disk of a guest: one file, or pieces of files behind one another. Offsets and lengths are in bytes.

A transfer that is not whole is an OSError: a file that has become shorter is one that cannot be read there.
"""

from __future__ import annotations

import errno
import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Protocol

from ambi.linux import holes
from hyper.vmm.virtio.queue import advance

SECTOR = 512
_MAX_PIECES = 1024  # IOV_MAX
_ZEROS = bytes(1 << 16)


class Disk(Protocol):
    """`pieces` are consumed. Offsets and lengths were checked against `size`."""

    readonly: bool
    flushes: bool  # whether a flush is to reach the host's disk

    @property
    def size(self) -> int: ...

    def read(self, offset: int, pieces: list[memoryview]) -> None: ...

    def write(self, offset: int, pieces: list[memoryview]) -> None: ...

    def flush(self) -> None: ...

    def discard(self, offset: int, length: int) -> None: ...

    def zero(self, offset: int, length: int, *, unmap: bool) -> None: ...

    def refresh(self) -> None:
        """Look at the size again."""

    def close(self) -> None: ...


class Nothing:
    """A disk without a sector, until there is one to replace it: of a machine that becomes a template."""

    __slots__ = ("readonly",)
    size = 0
    flushes = False

    def __init__(self, *, readonly: bool) -> None:
        self.readonly = readonly

    def read(self, offset: int, pieces: list[memoryview]) -> None:
        """Of no bytes, like the others."""

    def write(self, offset: int, pieces: list[memoryview]) -> None: ...

    def flush(self) -> None: ...

    def discard(self, offset: int, length: int) -> None: ...

    def zero(self, offset: int, length: int, *, unmap: bool) -> None: ...

    def refresh(self) -> None: ...

    def close(self) -> None: ...


def _read_all(fd: int, offset: int, pieces: list[memoryview]) -> None:
    while pieces:
        count = os.preadv(fd, pieces[:_MAX_PIECES], offset)
        if not count:
            raise OSError(errno.EIO, "the file has become shorter")
        advance(pieces, count)
        offset += count


class File:
    """A file or block device, whose descriptor it owns; whole sectors of it."""

    __slots__ = ("_fd", "flushes", "readonly", "size")

    def __init__(self, fd: int, *, readonly: bool = False, flushes: bool = True) -> None:
        self._fd = fd
        self.readonly = readonly
        self.flushes = flushes and not readonly
        self.size = 0
        self.refresh()

    def refresh(self) -> None:
        self.size = os.lseek(self._fd, 0, os.SEEK_END) // SECTOR * SECTOR

    def read(self, offset: int, pieces: list[memoryview]) -> None:
        _read_all(self._fd, offset, pieces)

    def write(self, offset: int, pieces: list[memoryview]) -> None:
        while pieces:
            count = os.pwritev(self._fd, pieces[:_MAX_PIECES], offset)
            advance(pieces, count)
            offset += count

    def flush(self) -> None:
        if self.flushes:
            os.fdatasync(self._fd)

    def discard(self, offset: int, length: int) -> None:
        """A hint: where holes cannot be made nothing is done."""
        try:
            holes.punch(self._fd, offset, length)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise

    def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        for way in (holes.punch, holes.zero) if unmap else (holes.zero,):
            try:
                way(self._fd, offset, length)
                return
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
        end = offset + length
        while offset < end:
            offset += os.pwrite(self._fd, _ZEROS[: end - offset], offset)

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Extents:
    """A read-only disk of pieces `(fd, sectors, sector in the file)`. It owns the descriptors; some may be the same."""

    __slots__ = ("_ends", "_fds", "_pieces", "size")
    readonly = True
    flushes = False

    def __init__(self, extents: Iterable[tuple[int, int, int]]) -> None:
        self._pieces: list[tuple[int, int, int, int]] = []  # start and end on the disk, fd, start in the file
        self._ends: list[int] = []
        at = 0
        for fd, sectors, offset in extents:
            end = at + sectors * SECTOR
            if end > at:
                self._pieces.append((at, end, fd, offset * SECTOR))
                self._ends.append(end)
            at = end
        self.size = at
        self._fds = {piece[2] for piece in self._pieces}

    def read(self, offset: int, pieces: list[memoryview]) -> None:
        at = bisect_right(self._ends, offset)
        while pieces:
            start, end, fd, inside = self._pieces[at]
            part = _split(pieces, end - offset)
            _read_all(fd, inside + offset - start, part)
            offset, at = end, at + 1

    def write(self, offset: int, pieces: Sequence[memoryview]) -> None:
        raise OSError(errno.EROFS, "a read-only disk")

    def flush(self) -> None:
        """Nothing was written."""

    def discard(self, offset: int, length: int) -> None:
        raise OSError(errno.EROFS, "a read-only disk")

    def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        raise OSError(errno.EROFS, "a read-only disk")

    def refresh(self) -> None:
        """It is as long as its table says."""

    def close(self) -> None:
        """Idempotent."""
        for fd in self._fds:
            os.close(fd)
        self._fds = set()


def _split(pieces: list[memoryview], count: int) -> list[memoryview]:
    """Move the first `count` bytes, or all if there are fewer, out of `pieces`."""
    front: list[memoryview] = []
    while pieces and count:
        piece = pieces[0]
        front.append(piece[:count])
        if len(piece) > count:
            pieces[0] = piece[count:]
            break
        count -= len(piece)
        del pieces[0]
    return front
