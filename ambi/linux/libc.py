"""The C library and the raw `syscall` entry, set up once for every module of this folder.

`check` turns a result of -1 into the OSError of errno. Pass integers to `syscall` as they are: the wrapper converts each to
a machine word, because the variadic C function would take a plain int for 32 bits. Keep buffers referenced until the call
has returned.
"""

from __future__ import annotations

import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


def check(result: int, what: str | None = None) -> int:
    """`result`, or OSError(errno, text, what) when it is -1."""
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), what)
    return result


def syscall(number: int, *args: int | bytes | ctypes.Array[ctypes.c_char] | None, what: str | None = None) -> int:
    """Make system call `number`; bytes and buffers pass as their address. Raises OSError that names `what`."""
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    return check(libc.syscall(ctypes.c_long(number), *words), what)
