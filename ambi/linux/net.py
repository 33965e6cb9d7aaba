"""The little of networking that a fresh network namespace needs from its first process: `lo` up."""

from __future__ import annotations

import fcntl
import socket
import struct

# linux/sockios.h, net/if.h
_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1
_IFREQ = struct.Struct("16sh22x")  # struct ifreq with ifr_flags


def loopback_up() -> None:
    """Set the calling thread's network namespace's `lo` up; it gets 127.0.0.1 and ::1 from the kernel."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as handle:
        _, flags = _IFREQ.unpack(fcntl.ioctl(handle, _SIOCGIFFLAGS, _IFREQ.pack(b"lo", 0)))
        fcntl.ioctl(handle, _SIOCSIFFLAGS, _IFREQ.pack(b"lo", flags | _IFF_UP))
