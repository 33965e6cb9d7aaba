"""fallocate(2) with its modes, which `os.posix_fallocate` has not: space given back, and ranges that read as zeros."""

from __future__ import annotations

import ctypes

from ambi.linux.libc import check, libc

# linux/falloc.h
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE = 1, 2, 16

_fallocate = libc.fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def punch(fd: int, offset: int, length: int) -> None:
    """Give back the space of a range of a file or block device; it reads as zeros. Raises OSError (EOPNOTSUPP)."""
    check(_fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length), "fallocate")


def zero(fd: int, offset: int, length: int) -> None:
    """Make a range read as zeros and keep its space. Raises OSError (EOPNOTSUPP, as of tmpfs)."""
    check(_fallocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset, length), "fallocate")
