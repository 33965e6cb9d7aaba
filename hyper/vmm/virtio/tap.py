"""A tap's descriptor, with a struct virtio_net_hdr of 12 bytes before each frame (linux/if_tun.h)."""

from __future__ import annotations

import fcntl
import os
import struct

HEADER_BYTES = 12  # of virtio 1: with num_buffers at its end
TUNSETOFFLOAD, TUNSETVNETHDRSZ = 0x400454D0, 0x400454D8
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN = 1, 2, 4, 8


class Tap:
    """It owns `fd`, of a tap that was made with IFF_VNET_HDR. Raises OSError when it is none."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("=i", HEADER_BYTES))
        os.set_blocking(fd, False)
        self.fd = fd

    def offload(self, *, checksum: bool, tso4: bool, tso6: bool, ecn: bool) -> None:
        """What the guest takes from us unfinished: checksums, and segments larger than the MTU."""
        flags = TUN_F_CSUM * checksum
        if checksum:
            flags |= TUN_F_TSO4 * tso4 | TUN_F_TSO6 * tso6 | TUN_F_TSO_ECN * (ecn and (tso4 or tso6))
        fcntl.ioctl(self.fd, TUNSETOFFLOAD, flags)

    def close(self) -> None:
        """Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
