"""Project quotas of ext4 and XFS: the project of a directory tree, and how much it may hold (quotactl_fd(2), Linux 5.14).

A directory with a project and `PROJINHERIT` gives the project to everything that is made below it. Overlay writes with the
rights of who mounted it, less CAP_SYS_RESOURCE, so that the limit holds for a container's root, too.
"""

from __future__ import annotations

import ctypes
import fcntl
import struct

from ambi.linux.libc import syscall

# linux/fs.h
_GET_XATTR, _SET_XATTR = 0x801C581F, 0x401C5820  # FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR
_XFLAG_PROJINHERIT = 0x200
_FSXATTR = struct.Struct("=5I8s")  # struct fsxattr: xflags, extsize, nextents, projid, cowextsize, pad

# linux/quota.h, linux/dqblk_xfs.h; a command is shifted over the type of quota
_PRJQUOTA = 2
_XGETQUOTA, _XSETQLIM, _XGETQSTATV = 0x5803, 0x5804, 0x5808
_NR_QUOTACTL_FD = 443
_DQUOT = struct.Struct("=bbHI6Q2i2H4b3QiHH8s")  # struct fs_disk_quota
_DQUOT_VERSION, _PROJ_QUOTA, _BSOFT_BHARD = 1, 2, 0b1100
_BLOCK = 512  # bytes of a basic block
_STATV_BYTES, _STATV_VERSION, _PROJECTS_ENFORCED = 512, 1, 1 << 5  # struct fs_quota_statv, longer than it is

assert _FSXATTR.size == 28 and _DQUOT.size == 112


class Usage:
    """Bytes: `limit` is 0 for none."""

    __slots__ = ("limit", "used")

    def __init__(self, limit: int, used: int) -> None:
        self.limit, self.used = limit, used


def enforced(fd: int) -> bool:
    """Whether the file system of `fd` keeps to the limits of projects."""
    state = ctypes.create_string_buffer(struct.pack("=b", _STATV_VERSION), _STATV_BYTES)
    try:
        _call(fd, _XGETQSTATV, 0, state)
    except OSError:  # no quotas in the file system, its mount or the kernel
        return False
    (flags,) = struct.unpack_from("=H", state.raw, 2)
    return bool(flags & _PROJECTS_ENFORCED)


def project(fd: int) -> int:
    """Of a file or directory; 0 is everybody's. Raises OSError."""
    found = bytearray(_FSXATTR.size)
    fcntl.ioctl(fd, _GET_XATTR, found)
    return int(_FSXATTR.unpack(found)[3])


def set_project(fd: int, number: int) -> None:
    """Give an empty directory, and all that comes into being below it, to project `number`. Raises OSError."""
    found = bytearray(_FSXATTR.size)
    fcntl.ioctl(fd, _GET_XATTR, found)
    xflags, extsize, extents, _, cowextsize, pad = _FSXATTR.unpack(found)
    fcntl.ioctl(fd, _SET_XATTR, _FSXATTR.pack(xflags | _XFLAG_PROJINHERIT, extsize, extents, number, cowextsize, pad))


def usage(fd: int, number: int) -> Usage:
    """Of project `number` on the file system of `fd`. Raises OSError."""
    record = ctypes.create_string_buffer(_DQUOT.size)
    try:
        _call(fd, _XGETQUOTA, number, record)
    except FileNotFoundError:  # XFS knows nothing of it
        return Usage(0, 0)
    fields = _DQUOT.unpack(record.raw)
    return Usage(fields[4] * _BLOCK, fields[8] * _BLOCK)


def limit(fd: int, number: int, size_bytes: int) -> None:
    """Let project `number` hold `size_bytes`, 0 for as much as there is. Raises OSError."""
    blocks = -(-size_bytes // _BLOCK)
    fields = [_DQUOT_VERSION, _PROJ_QUOTA, _BSOFT_BHARD, number, blocks, blocks, *[0] * 18, b""]
    _call(fd, _XSETQLIM, number, ctypes.create_string_buffer(_DQUOT.pack(*fields), _DQUOT.size))


def _call(fd: int, command: int, number: int, record: ctypes.Array[ctypes.c_char]) -> None:
    syscall(_NR_QUOTACTL_FD, fd, command << 8 | _PRJQUOTA, number, record, what="quotactl_fd")
