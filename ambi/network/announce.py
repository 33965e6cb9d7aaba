"""Telling neighbours who remember another MAC for an address where it is now: gratuitous ARP, unsolicited advertisements."""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterable

_ETH_ARP, _ETH_IPV6 = 0x0806, 0x86DD  # linux/if_ether.h
_ALL_NODES = ipaddress.IPv6Address("ff02::1")


def frame(mac: str, address: str) -> bytes:
    """The Ethernet frame that says that `address` is at `mac`: RFC 826 with sender and target equal, RFC 4861 7.2.6."""
    source, ip = bytes.fromhex(mac.replace(":", "")), ipaddress.ip_address(address)
    if ip.version == 4:
        head = b"\xff" * 6 + source + struct.pack("!H", _ETH_ARP)
        return head + struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + source + ip.packed + bytes(6) + ip.packed
    override = 0x20000000
    body = struct.pack("!BBHI", 136, 0, 0, override) + ip.packed + b"\x02\x01" + source  # option 2: target's link address
    pseudo = ip.packed + _ALL_NODES.packed + struct.pack("!II", len(body), socket.IPPROTO_ICMPV6)
    body = body[:2] + struct.pack("!H", _checksum(pseudo + body)) + body[4:]
    packet = struct.pack("!IHBB", 6 << 28, len(body), socket.IPPROTO_ICMPV6, 255) + ip.packed + _ALL_NODES.packed
    return b"\x33\x33\x00\x00\x00\x01" + source + struct.pack("!H", _ETH_IPV6) + packet + body


def _checksum(data: bytes) -> int:
    """RFC 1071, of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def announce(link: str, mac: str, addresses: Iterable[str]) -> None:
    """Send a frame for each address out of `link`, which is up, in the namespace of the calling thread. Raises OSError."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as handle:
        handle.bind((link, 0))
        for address in addresses:
            handle.send(frame(mac, address))
