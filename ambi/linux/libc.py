"""The C library and the raw `syscall` entry, set up once for every module of this folder.

`check` turns a result of -1 into the OSError of errno. `syscall` takes integers, bytes, buffers and None; each becomes a
machine word by the declared types of the six arguments, because the variadic C function would take a plain int for 32 bits.
Keep buffers referenced until the call has returned.
"""

from __future__ import annotations

import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
libc.syscall.argtypes = [ctypes.c_long] + [ctypes.c_void_p] * 6  # c_void_p takes integers of any sign, and all buffers
_ZEROS = (0,) * 6


def check(result: int, what: str | None = None) -> int:
    """`result`, or OSError(errno, text, what) when it is -1."""
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), what)
    return result


def syscall(number: int, *args: int | bytes | ctypes.Array[ctypes.c_char] | None, what: str | None = None) -> int:
    """Make system call `number`; bytes and buffers pass as their address. Raises OSError that names `what`."""
    return check(libc.syscall(number, *args, *_ZEROS[len(args) :]), what)
