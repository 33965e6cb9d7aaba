"""Mounts: mount(2) and umount2(2), the descriptor based API of Linux 5.2, and pivot_root(2).

A mount made by `fsmount` or `open_tree(..., OPEN_TREE_CLONE)` is *detached*: it has no place in any namespace until
`move_mount` gives it one, and it disappears with its last descriptor. All descriptors returned here are CLOEXEC and belong
to the caller.
"""

from __future__ import annotations

import ctypes
import os

from ambi.linux.libc import check, libc, syscall

# linux/mount.h
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_SYNCHRONOUS = 16
MS_REMOUNT = 32
MS_BIND = 4096
MS_MOVE = 8192
MS_REC = 16384
MS_UNBINDABLE = 1 << 17
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20
MS_STRICTATIME = 1 << 24
MS_RELATIME = 1 << 21
MS_NODIRATIME = 2048
MS_NOATIME = 1024
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8
MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8
MOUNT_ATTR__ATIME = 0x70
MOUNT_ATTR_NOATIME = 0x10
MOUNT_ATTR_STRICTATIME = 0x20
MOUNT_ATTR_NODIRATIME = 0x80
MOUNT_ATTR_NOSYMFOLLOW = 0x200000
OPEN_TREE_CLONE = 1

# linux/fcntl.h
AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000

_FSOPEN_CLOEXEC = 1
_FSMOUNT_CLOEXEC = 1
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 0, 1, 6
_MOVE_MOUNT_F_EMPTY_PATH = 0x4
_MOVE_MOUNT_T_EMPTY_PATH = 0x40
_NR_PIVOT_ROOT, _NR_OPEN_TREE, _NR_MOVE_MOUNT, _NR_FSOPEN, _NR_FSCONFIG, _NR_FSMOUNT, _NR_MOUNT_SETATTR = (
    155, 428, 429, 430, 431, 432, 442,
)  # fmt: skip

Path = str | bytes | os.PathLike[str]

libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]


class mount_attr(ctypes.Structure):  # struct mount_attr, linux/mount.h
    _fields_ = [
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    ]


def mount(source: Path | None, target: Path, fstype: str | None, flags: int = 0, data: str | bytes | None = None) -> None:
    """mount(2); the OSError names `target`."""
    result = libc.mount(
        None if source is None else os.fsencode(source),
        os.fsencode(target),
        None if fstype is None else fstype.encode(),
        flags,
        data.encode() if isinstance(data, str) else data,
    )
    check(result, os.fsdecode(target))


def table() -> list[tuple[str, list[str]]]:
    """Where something is mounted, as this process sees it, in the order of the mounts: the place and its optional fields
    (proc(5), mountinfo). No file system is asked, so none is waited for."""
    found = []
    with open("/proc/self/mountinfo", "rb", buffering=0) as file:
        text = file.read().decode("utf-8", "surrogateescape")
    for line in text.splitlines():
        words = line.split(" ")
        place = words[4]
        for escaped, meant in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
            place = place.replace(escaped, meant)
        found.append((place, words[6 : words.index("-")]))
    return found


def umount(target: Path, flags: int = 0) -> None:
    """umount2(2); `flags` are MNT_DETACH and UMOUNT_NOFOLLOW."""
    check(libc.umount2(os.fsencode(target), flags), os.fsdecode(target))


def pivot_root(new_root: Path, put_old: Path) -> None:
    """pivot_root(2); `.` for both stacks the old root over the new one, to be detached with `umount(".", MNT_DETACH)`."""
    syscall(_NR_PIVOT_ROOT, os.fsencode(new_root), os.fsencode(put_old), what=os.fsdecode(new_root))


def fsopen(fstype: str) -> int:
    """A context to configure a new file system of `fstype`."""
    return syscall(_NR_FSOPEN, fstype.encode(), _FSOPEN_CLOEXEC, what=fstype)


def fsconfig_string(context: int, key: str, value: Path) -> None:
    """Set an option; the kernel takes at most 255 bytes of value. The OSError names the option."""
    syscall(_NR_FSCONFIG, context, _FSCONFIG_SET_STRING, key.encode(), os.fsencode(value), 0, what=key)


def fsconfig_flag(context: int, key: str) -> None:
    syscall(_NR_FSCONFIG, context, _FSCONFIG_SET_FLAG, key.encode(), None, 0, what=key)


def fsconfig_create(context: int) -> None:
    syscall(_NR_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)


def fsmount(context: int, attributes: int = 0) -> int:
    """A detached mount of the file system that `context` created, with MOUNT_ATTR_* `attributes`."""
    return syscall(_NR_FSMOUNT, context, _FSMOUNT_CLOEXEC, attributes)


def new_mount(
    fstype: str,
    source: Path,
    options: tuple[tuple[str, str | None], ...] = (),
    attributes: int = 0,
    *,
    readonly: bool = False,
) -> int:
    """A detached mount of a new file system; an option without value is a flag. `readonly` is the file system's own."""
    context = fsopen(fstype)
    try:
        fsconfig_string(context, "source", source)
        for key, value in options:
            if value is None:
                fsconfig_flag(context, key)
            else:
                fsconfig_string(context, key, value)
        if readonly:
            fsconfig_flag(context, "ro")
        fsconfig_create(context)
        return fsmount(context, attributes)
    finally:
        os.close(context)


def open_tree(directory: int, path: Path, flags: int = 0) -> int:
    """The mount at `path`; a detached copy with OPEN_TREE_CLONE, of all below it with AT_RECURSIVE as well."""
    encoded = os.fsencode(path)
    if not encoded:
        flags |= AT_EMPTY_PATH
    return syscall(_NR_OPEN_TREE, directory, encoded, flags | os.O_CLOEXEC, what=os.fsdecode(path))


def move_mount(source: int, directory: int, path: Path = "") -> None:
    """Attach the mount `source` at `path` below `directory`, or on `directory` itself when `path` is empty."""
    encoded = os.fsencode(path)
    flags = _MOVE_MOUNT_F_EMPTY_PATH | (0 if encoded else _MOVE_MOUNT_T_EMPTY_PATH)
    syscall(_NR_MOVE_MOUNT, source, b"", directory, encoded, flags, what=os.fsdecode(path) or None)


def mount_setattr(
    fd: int, path: Path = "", *, set: int = 0, clear: int = 0, propagation: int = 0, recursive: bool = False
) -> None:
    """Change MOUNT_ATTR_* flags and the propagation (MS_SHARED, ...) of the mount at `path`, or at `fd` itself."""
    encoded = os.fsencode(path)
    flags = (0 if encoded else AT_EMPTY_PATH) | (AT_RECURSIVE if recursive else 0)
    if set & MOUNT_ATTR__ATIME or set & MOUNT_ATTR_STRICTATIME:
        clear |= MOUNT_ATTR__ATIME  # the kernel wants all three bits cleared when it sets one
    attributes = mount_attr(set, clear, propagation, 0)
    address = ctypes.addressof(attributes)
    syscall(_NR_MOUNT_SETATTR, fd, encoded, flags, address, ctypes.sizeof(attributes), what=os.fsdecode(path) or None)
