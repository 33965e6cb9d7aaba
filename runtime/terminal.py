"""The terminal of a process: allocated in the container's own devpts, its master handed to the shim."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import termios
from typing import Any

from ambi.core.errors import InvalidRequest
from ambi.linux import mount, paths

# asm-generic/ioctls.h
_TIOCSPTLCK = 0x40045431
_TIOCGPTPEER = 0x5441
_PTMX = os.makedev(5, 2)


def open_pair(root: int) -> tuple[int, int]:
    """(master, slave), both CLOEXEC, from `/dev/pts/ptmx` below `root`, proven to be the kernel's (CVE-2025-52565)."""
    try:
        flags = os.O_RDWR | os.O_NOCTTY
        master = paths.open_in_root(root, "/dev/pts/ptmx", flags, resolve=paths.RESOLVE_NO_SYMLINKS)
    except OSError as error:
        raise InvalidRequest(f"cannot open a terminal: /dev/pts/ptmx: {error.strerror}") from error
    if os.fstat(master).st_rdev != _PTMX or paths.filesystem_type(master) != paths.DEVPTS_SUPER_MAGIC:
        os.close(master)
        raise InvalidRequest("cannot open a terminal: /dev/pts is not a devpts file system")
    fcntl.ioctl(master, _TIOCSPTLCK, struct.pack("i", 0))
    slave = fcntl.ioctl(master, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    return master, slave


def set_size(fd: int, rows: int, columns: int) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows & 0xFFFF, columns & 0xFFFF, 0, 0))


def set_initial_size(fd: int, process: dict[str, Any]) -> None:
    """From `process.consoleSize`, if there is one."""
    size = process.get("consoleSize") or {}
    if size.get("height") or size.get("width"):
        set_size(fd, size.get("height") or 0, size.get("width") or 0)


def bind_console(root: int, slave: int) -> None:
    """Show `slave` as /dev/console."""
    target = paths.make_file(root, "/dev/console", 0o600)
    try:
        made = mount.open_tree(slave, "", mount.OPEN_TREE_CLONE)
        try:
            mount.move_mount(made, target)
        finally:
            os.close(made)
    finally:
        os.close(target)


def take(slave: int) -> None:
    """Make `slave` the controlling terminal and the stdio of the calling process, in a session of its own."""
    try:
        os.setsid()
    except PermissionError:  # leads a session already
        pass
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    for number in range(3):
        os.dup2(slave, number)


def hung_up(error: OSError) -> bool:
    """Whether reading a master failed because no process has the terminal open: its end of file."""
    return error.errno == errno.EIO
