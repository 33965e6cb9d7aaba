"""Loop devices that free themselves with their last user."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os

# linux/loop.h
_LOOP_CONFIGURE = 0x4C0A
_LOOP_CTL_GET_FREE = 0x4C82
_LO_FLAGS_READ_ONLY, _LO_FLAGS_AUTOCLEAR = 1, 4
_ATTEMPTS = 32  # another process may take the free device between the two calls


class loop_info64(ctypes.Structure):  # struct loop_info64, linux/loop.h
    _fields_ = [
        ("lo_device", ctypes.c_uint64), ("lo_inode", ctypes.c_uint64), ("lo_rdevice", ctypes.c_uint64),
        ("lo_offset", ctypes.c_uint64), ("lo_sizelimit", ctypes.c_uint64), ("lo_number", ctypes.c_uint32),
        ("lo_encrypt_type", ctypes.c_uint32), ("lo_encrypt_key_size", ctypes.c_uint32), ("lo_flags", ctypes.c_uint32),
        ("lo_file_name", ctypes.c_uint8 * 64), ("lo_crypt_name", ctypes.c_uint8 * 64),
        ("lo_encrypt_key", ctypes.c_uint8 * 32), ("lo_init", ctypes.c_uint64 * 2),
    ]  # fmt: skip


class loop_config(ctypes.Structure):  # struct loop_config, linux/loop.h (5.8)
    _fields_ = [
        ("fd", ctypes.c_uint32), ("block_size", ctypes.c_uint32), ("info", loop_info64), ("reserved", ctypes.c_uint64 * 8),
    ]  # fmt: skip


def attach(file: int) -> tuple[str, int]:
    """A read-only loop device over `file`: its path and an open descriptor, which keeps it until something mounts it."""
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_ATTEMPTS):
            device = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
            handle = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
            config = loop_config(fd=file)
            config.info.lo_flags = _LO_FLAGS_READ_ONLY | _LO_FLAGS_AUTOCLEAR
            try:
                fcntl.ioctl(handle, _LOOP_CONFIGURE, bytes(config))
                return device, handle
            except OSError as error:
                os.close(handle)
                if error.errno != errno.EBUSY:
                    raise
        raise OSError(errno.EBUSY, "no loop device stays free", "/dev/loop-control")
    finally:
        os.close(control)
