"""Sparse files: space given back, ranges that read as zeros (fallocate(2)), what is no hole, and blocks that are shared."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Iterator

from ambi.linux.libc import check, libc

# linux/falloc.h
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE = 1, 2, 16

FICLONE = 0x40049409  # linux/fs.h

_CANNOT_SHARE = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS)

_fallocate = libc.fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def punch(fd: int, offset: int, length: int) -> None:
    """Give back the space of a range of a file or block device; it reads as zeros. Raises OSError (EOPNOTSUPP)."""
    check(_fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length), "fallocate")


def zero(fd: int, offset: int, length: int) -> None:
    """Make a range read as zeros and keep its space. Raises OSError (EOPNOTSUPP, as of tmpfs)."""
    check(_fallocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset, length), "fallocate")


def data(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """What of the range [start, end) of a file is no hole, as (first byte, end), ascending. Raises OSError."""
    while start < end:
        try:
            start = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            raise
        if start >= end:
            return
        hole = min(os.lseek(fd, start, os.SEEK_HOLE), end)
        yield start, hole
        start = hole


def share_blocks(source: int, target: int) -> bool:
    """Make the empty file `target` what `source` is, with its blocks; False where the file system cannot. Raises OSError."""
    try:
        fcntl.ioctl(target, FICLONE, source)
        return True
    except OSError as error:
        if error.errno not in _CANNOT_SHARE:
            raise
        return False
