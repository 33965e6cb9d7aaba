"""inotify(7), for as much as following a growing file needs."""

from __future__ import annotations

import os

from ambi.linux.libc import check, libc

# linux/inotify.h
IN_MODIFY = 0x2
IN_MOVED_TO = 0x80
IN_CREATE = 0x100
IN_DELETE = 0x200
_IN_NONBLOCK, _IN_CLOEXEC = os.O_NONBLOCK, os.O_CLOEXEC


def watch_directory(path: str | os.PathLike[str], events: int) -> int:
    """A descriptor that becomes readable when one of `events` happens in the directory. Raises OSError (ENOSPC, EMFILE)."""
    fd = check(libc.inotify_init1(_IN_NONBLOCK | _IN_CLOEXEC))
    try:
        check(libc.inotify_add_watch(fd, os.fsencode(path), events), os.fsdecode(path))
    except OSError:
        os.close(fd)
        raise
    return fd


def clear(fd: int) -> None:
    """Forget what has been reported so far."""
    try:
        while os.read(fd, 65536):
            pass
    except BlockingIOError:
        pass
