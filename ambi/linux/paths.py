"""Paths below a root that is not trusted: every component resolved by the kernel with openat2(2), never by us.

A container, an image or a guest may have put any symbolic link anywhere below `root`; RESOLVE_IN_ROOT treats `root` as `/`
for all of them, so a result is always below it. Magic links (`/proc/PID/fd/N`) are refused throughout.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat

from ambi.linux.libc import check, libc, syscall

# linux/openat2.h
RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

# linux/magic.h
PROC_SUPER_MAGIC = 0x9FA0
SYSFS_MAGIC = 0x62656572
DEVPTS_SUPER_MAGIC = 0x1CD1
NSFS_MAGIC = 0x6E736673
CGROUP2_SUPER_MAGIC = 0x63677270

O_PATH = 0o10000000
_NR_OPENAT2 = 437
_ATTEMPTS = 64  # EAGAIN: a rename or a mount raced with the look-up of `..`


class open_how(ctypes.Structure):  # struct open_how, linux/openat2.h
    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


class statfs_head(ctypes.Structure):  # the start of struct statfs, bits/statfs.h; padded to its full size
    _fields_ = [("f_type", ctypes.c_long), ("rest", ctypes.c_char * 232)]


def openat2(directory: int, path: str | bytes, flags: int, resolve: int, mode: int = 0) -> int:
    """openat2(2), CLOEXEC; retries what a concurrent rename made uncertain."""
    how = open_how(flags | os.O_CLOEXEC, mode, resolve)
    encoded, address, size = os.fsencode(path), ctypes.addressof(how), ctypes.sizeof(how)
    for _ in range(_ATTEMPTS):
        try:
            return syscall(_NR_OPENAT2, directory, encoded, address, size, what=os.fsdecode(path))
        except BlockingIOError:
            continue
    raise OSError(errno.EAGAIN, "the path keeps changing", os.fsdecode(path))


def open_in_root(root: int, path: str | bytes, flags: int = O_PATH, mode: int = 0, resolve: int = 0) -> int:
    """Open `path` with `root` as `/`. `resolve` adds RESOLVE_* bits."""
    return openat2(root, path, flags, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS | resolve, mode)


def parts_of(path: str) -> list[str]:
    """The components of `path` without `.`, empty ones and `..` (which is applied to the text)."""
    found: list[str] = []
    for part in path.split("/"):
        if part == "..":
            if found:
                found.pop()
        elif part not in ("", "."):
            found.append(part)
    return found


def make_directories(root: int, path: str, mode: int = 0o755, links: int = 16) -> int:
    """An O_PATH descriptor of the directory `path` below `root`, made where missing; may be NotADirectoryError.

    A link whose target is missing is followed below `root`, `links` of them at most.
    """
    parts = parts_of(path)
    try:
        return open_in_root(root, "/" + "/".join(parts), O_PATH | os.O_DIRECTORY)
    except FileNotFoundError:
        pass
    here, done = os.dup(root), ""
    try:
        for part in parts:
            below = _enter(root, here, part, done, mode, links)
            done += "/" + part
            os.close(here)
            here = below
        return here
    except BaseException:
        os.close(here)
        raise


def _enter(root: int, here: int, part: str, parent: str, mode: int, links: int) -> int:
    """The directory `part` of `here`, which is `parent` below `root`; made when it is missing."""
    try:
        return open_in_root(root, f"{parent}/{part}", O_PATH | os.O_DIRECTORY)
    except FileNotFoundError:
        pass
    try:
        os.mkdir(part, mode, dir_fd=here)
    except FileExistsError:
        return make_directories(root, _target_of(here, part, parent, links), mode, links - 1)
    return openat2(here, part, O_PATH | os.O_DIRECTORY, RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)


def _target_of(here: int, part: str, parent: str, links: int) -> str:
    """Where the dangling link `part` of the directory `parent` points to, as a path below the root."""
    if links <= 0:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), f"{parent}/{part}")
    target = os.readlink(part, dir_fd=here)
    return target if target.startswith("/") else f"{parent}/{target}"


def make_file(root: int, path: str, mode: int = 0o644, links: int = 16) -> int:
    """An O_PATH descriptor of `path` below `root`, whatever it is; an empty file is created when it is missing."""
    parts = parts_of(path)
    clean = "/" + "/".join(parts)
    try:
        return open_in_root(root, clean)
    except FileNotFoundError:
        if not parts:
            raise
    directory = "/" + "/".join(parts[:-1])
    parent = make_directories(root, directory, links=links)
    try:
        os.close(os.open(parts[-1], os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=parent))
        return openat2(parent, parts[-1], O_PATH, RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)
    except FileExistsError:
        return make_file(root, _target_of(parent, parts[-1], directory, links), mode, links - 1)
    finally:
        os.close(parent)


def read_in_root(root: int, path: str, limit: int = 1 << 20) -> bytes:
    """The regular file `path` below `root`, at most `limit` bytes: EFBIG beyond, EINVAL for anything but a regular file."""
    fd = open_in_root(root, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        chunks, size = [], 0
        while chunk := os.read(fd, 1 << 16):
            size += len(chunk)
            if size > limit:
                raise OSError(errno.EFBIG, f"larger than {limit} bytes", path)
            chunks.append(chunk)
        return b"".join(chunks)
    finally:
        os.close(fd)


def filesystem_type(fd: int) -> int:
    """The magic number (f_type) of the file system that `fd` lies on; O_PATH descriptors work."""
    buffer = statfs_head()
    check(libc.fstatfs(fd, ctypes.byref(buffer)))
    return int(buffer.f_type)


def open_procfs(path: str = "/proc") -> int:
    """An O_PATH descriptor of a procfs, proven to be one (CVE-2025-52881 was a write through a fake)."""
    fd = os.open(path, O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    if filesystem_type(fd) != PROC_SUPER_MAGIC:
        os.close(fd)
        raise OSError(errno.EXDEV, "not a proc file system", path)
    return fd


def write_in_procfs(proc: int, path: str, value: str) -> None:
    """Write `value` to `path` below the procfs `proc`; no link and no mount on the way is followed."""
    fd = openat2(proc, path, os.O_WRONLY, RESOLVE_BENEATH | RESOLVE_NO_XDEV | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def own_directory(proc: int) -> str:
    """The name of this process's directory in the procfs `proc`, which may be of another pid namespace."""
    return os.readlink("self", dir_fd=proc)
