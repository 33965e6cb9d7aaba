"""Tap devices (linux/if_tun.h): an Ethernet interface whose other end is a descriptor."""

from __future__ import annotations

import fcntl
import os
import struct

_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_IFREQ = struct.Struct("16sh22x")  # struct ifreq with ifr_flags

# A frame is preceded by a struct virtio_net_hdr (linux/virtio_net.h), so large segments and partial checksums pass.
_FLAGS = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR


def reserve() -> int:
    """A descriptor (CLOEXEC) for a tap of the network namespace that the calling thread is in now. Raises OSError."""
    return os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)


def make(fd: int, name: str) -> None:
    """Make the interface `name` at the other end of a reserved `fd`; it goes with the last copy of `fd`. Raises OSError."""
    fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(name.encode(), _FLAGS))
