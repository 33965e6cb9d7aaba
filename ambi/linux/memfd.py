"""Anonymous memory files, sealed when they hold a program or bytes that nobody may change."""

from __future__ import annotations

import fcntl
import os

# linux/fcntl.h
F_ADD_SEALS = 1033
F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE = 1, 2, 4, 8


def sealed(name: str, content: bytes) -> int:
    """A CLOEXEC descriptor of a memory file with `content` that can never change; executable by descriptor."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(fd, view) :]
        fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE)
        return fd
    except BaseException:
        os.close(fd)
        raise


def sized(name: str, size: int) -> int:
    """A CLOEXEC descriptor of a memory file of `size` zero bytes, which nobody can make shorter or longer."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW)
        return fd
    except BaseException:
        os.close(fd)
        raise
