"""Filling an empty volume with what the root has where it is mounted.

Whoever has the same volume may change it meanwhile, so everything goes by descriptors of directories, and no link is
followed. The copy is made in a directory of its own inside the volume, and its entries are moved out when it is whole: a
death in between leaves what the next start finishes or begins again. A lock on the volume keeps two starts apart.

Functions here run between clone and execve: they import nothing.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from ambi.linux import paths

COPYING, COPIED = ".ambi-copying", ".ambi-copied"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CHUNK = 1 << 24
_LINKS_KEPT = 256  # descriptors of files with several names; the names of others become files of their own
_NO_XATTRS = (errno.ENOTSUP, errno.ENOSYS)


def fill(source: int, target: int) -> None:
    """Copy what is in the directory `source` into the directory `target`, if that is empty. Both may be O_PATH."""
    volume = os.open(f"/proc/self/fd/{target}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = set(os.listdir(volume))
        if found and not found & {COPYING, COPIED}:
            return
        fcntl.flock(volume, fcntl.LOCK_EX)
        _fill(source, volume)
    finally:
        os.close(volume)


def _fill(source: int, volume: int) -> None:
    """With the lock held."""
    found = os.listdir(volume)
    if COPIED in found:
        _move_out(volume)
        return
    if COPYING in found and len(found) == 1:
        erase(volume, COPYING)
    elif found:
        return
    origin = os.open(f"/proc/self/fd/{source}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    links: dict[tuple[int, int], int] = {}
    try:
        if os.listdir(origin):
            os.mkdir(COPYING, 0o700, dir_fd=volume)
            copy = os.open(COPYING, _DIRECTORY, dir_fd=volume)
            try:
                _copy_entries(origin, copy, links)
            finally:
                os.close(copy)
            os.rename(COPYING, COPIED, src_dir_fd=volume, dst_dir_fd=volume)
            _move_out(volume)
        _attributes(origin, volume)
    except BaseException:
        erase(volume, COPYING)
        raise
    finally:
        for fd in links.values():
            os.close(fd)
        os.close(origin)


def _move_out(volume: int) -> None:
    try:
        copied = os.open(COPIED, _DIRECTORY, dir_fd=volume)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        for name in os.listdir(copied):
            os.rename(name, name, src_dir_fd=copied, dst_dir_fd=volume)
    finally:
        os.close(copied)
    os.rmdir(COPIED, dir_fd=volume)


def _copy_entries(source: int, target: int, links: dict[tuple[int, int], int]) -> None:
    for name in os.listdir(source):
        status = os.stat(name, dir_fd=source, follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            os.mkdir(name, 0o700, dir_fd=target)
            below, made = os.open(name, _DIRECTORY, dir_fd=source), os.open(name, _DIRECTORY, dir_fd=target)
            try:
                _copy_entries(below, made, links)
                _attributes(below, made)
            finally:
                os.close(below)
                os.close(made)
        elif stat.S_ISREG(status.st_mode):
            _copy_file(source, target, name, status, links)
        else:
            _copy_special(source, target, name, status)


def _copy_file(source: int, target: int, name: str, status: os.stat_result, links: dict[tuple[int, int], int]) -> None:
    key = status.st_dev, status.st_ino
    if key in links:
        os.link(f"/proc/self/fd/{links[key]}", name, dst_dir_fd=target)
        return
    reader = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=source)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        writer = os.open(name, flags, 0o600, dir_fd=target)
        try:
            while os.sendfile(writer, reader, None, _CHUNK):
                pass
            _attributes(reader, writer)
            if status.st_nlink > 1 and len(links) < _LINKS_KEPT:
                links[key] = os.open(f"/proc/self/fd/{writer}", paths.O_PATH | os.O_CLOEXEC)
        finally:
            os.close(writer)
    finally:
        os.close(reader)


def _copy_special(source: int, target: int, name: str, status: os.stat_result) -> None:
    """A symbolic link, a device, a pipe or a socket."""
    if stat.S_ISLNK(status.st_mode):
        os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
    else:
        os.mknod(name, status.st_mode, status.st_rdev, dir_fd=target)
    os.chown(name, status.st_uid, status.st_gid, dir_fd=target, follow_symlinks=False)
    place = f"/proc/self/fd/{target}/{name}"
    if not stat.S_ISLNK(status.st_mode):
        os.chmod(place, stat.S_IMODE(status.st_mode))
    _xattrs(f"/proc/self/fd/{source}/{name}", place)
    os.utime(name, ns=(status.st_atime_ns, status.st_mtime_ns), dir_fd=target, follow_symlinks=False)


def _attributes(source: int, target: int) -> None:
    """Owner, mode, extended attributes and times, in an order in which none takes another away."""
    status = os.fstat(source)
    os.fchown(target, status.st_uid, status.st_gid)
    os.fchmod(target, stat.S_IMODE(status.st_mode))
    _xattrs(source, target)
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))


def _xattrs(source: int | str, target: int | str) -> None:
    follow = isinstance(source, int)
    try:
        names = os.listxattr(source, follow_symlinks=True) if follow else os.listxattr(source, follow_symlinks=False)
    except OSError as error:
        if error.errno in _NO_XATTRS:
            return
        raise
    for name in names:
        try:
            value = os.getxattr(source, name, follow_symlinks=follow)
            os.setxattr(target, name, value, follow_symlinks=follow)
        except OSError as error:
            if error.errno not in (*_NO_XATTRS, errno.ENODATA):
                raise


def erase(directory: int, name: str) -> None:
    """Remove `name` of `directory` and all below it, if it is there."""
    try:
        os.unlink(name, dir_fd=directory)
        return
    except FileNotFoundError:
        return
    except IsADirectoryError:
        pass
    below = os.open(name, _DIRECTORY, dir_fd=directory)
    try:
        for entry in os.listdir(below):
            erase(below, entry)
    finally:
        os.close(below)
    os.rmdir(name, dir_fd=directory)
