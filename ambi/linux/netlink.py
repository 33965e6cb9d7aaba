"""The little of rtnetlink(7) that a VM's driver needs: what a namespace has, and redirections between two of its links.

A socket belongs to the network namespace that its thread was in when it was opened, and keeps to it. pyroute2 does all of
this too, but loading it takes as long as starting a container.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

# linux/netlink.h, linux/rtnetlink.h
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_DUMP = 0x1, 0x4, 0x300
_NLM_F_EXCL, _NLM_F_CREATE = 0x200, 0x400
_RTM_GETLINK, _RTM_SETLINK, _RTM_GETADDR, _RTM_GETROUTE = 18, 19, 22, 26
_RTM_NEWQDISC, _RTM_DELQDISC, _RTM_NEWTFILTER = 36, 37, 44
_RTN_UNICAST, _RT_TABLE_MAIN, _RTPROT_KERNEL = 1, 254, 2
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY = 1, 4, 5, 6
# linux/if_link.h, linux/if_addr.h, net/if.h, net/if_arp.h
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINKINFO, _IFLA_AF_SPEC = 1, 3, 4, 18, 26
_IFLA_INFO_KIND, _IFLA_INET6_ADDR_GEN_MODE, _IN6_ADDR_GEN_MODE_NONE = 1, 8, 1
_IFA_ADDRESS, _IFA_LOCAL, _RT_SCOPE_LINK = 1, 2, 253
_IFF_UP, _IFF_NOARP = 0x1, 0x80
ARPHRD_ETHER = 1
# linux/pkt_sched.h, linux/pkt_cls.h, linux/tc_act/tc_mirred.h
_TC_H_INGRESS, _INGRESS_HANDLE, _ETH_P_ALL = 0xFFFFFFF1, 0xFFFF0000, 3
_TCA_KIND, _TCA_OPTIONS, _TCA_U32_SEL, _TCA_U32_ACT = 1, 2, 5, 7
_TCA_ACT_KIND, _TCA_ACT_OPTIONS, _TCA_MIRRED_PARMS = 1, 2, 2
_TCA_EGRESS_REDIR, _TC_ACT_STOLEN, _TC_U32_TERMINAL = 1, 4, 1

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr: length, type
_LINK = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, index, flags, change
_ADDRESS = struct.Struct("=BBBBI")  # struct ifaddrmsg: family, prefix, flags, scope, index
_ROUTE = struct.Struct("=BBBBBBBBI")  # struct rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, flags
_TC = struct.Struct("=BxxxiIII")  # struct tcmsg: family, index, handle, parent, info
_SELECTOR = struct.Struct("=BBBxHHHhI")  # struct tc_u32_sel without its keys
_KEY = struct.Struct("=IIii")  # struct tc_u32_key
_MIRRED = struct.Struct("=IIiiiiI")  # struct tc_mirred: index, capab, action, refcnt, bindcnt, eaction, ifindex
_READ_BYTES = 1 << 16
_FAMILIES = {socket.AF_INET: 4, socket.AF_INET6: 6}


class Link(NamedTuple):
    """A network interface; `kind` is the rtnl kind (`veth`, `tun`, "" for hardware), `arp_type` as ARPHRD_ETHER."""

    ifindex: int
    name: str
    mac: bytes
    mtu: int
    kind: str
    arp_type: int
    up: bool


class Address(NamedTuple):
    """An address of link `index`: `family` is 4 or 6, `address` in network order."""

    ifindex: int
    family: int
    address: bytes
    prefix: int


class Route(NamedTuple):
    """A unicast route of the main table by link `index`, not one that follows from an address; `gateway` may be b""."""

    ifindex: int
    family: int
    destination: bytes
    prefix: int
    gateway: bytes
    metric: int


class Netlink:
    """A rtnetlink socket of the network namespace that the calling thread is in now. All methods raise OSError."""

    __slots__ = ("_sequence", "_socket")

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.bind((0, 0))
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    # what is there

    def links(self) -> list[Link]:
        return [_link(body) for body in self._dump(_RTM_GETLINK, _LINK.pack(0, 0, 0, 0, 0))]

    def addresses(self) -> list[Address]:
        """All but those of scope link, which follow from the MAC."""
        found = []
        for body in self._dump(_RTM_GETADDR, _ADDRESS.pack(0, 0, 0, 0, 0)):
            family, prefix, _, scope, index = _ADDRESS.unpack_from(body)
            attributes = _attributes(body[_ADDRESS.size :])
            address = attributes.get(_IFA_LOCAL) or attributes.get(_IFA_ADDRESS)
            if family in _FAMILIES and scope != _RT_SCOPE_LINK and address:
                found.append(Address(index, _FAMILIES[family], address, prefix))
        return found

    def routes(self) -> list[Route]:
        """Those without a gateway first, which others may need to reach theirs."""
        found = [_route(body) for body in self._dump(_RTM_GETROUTE, _ROUTE.pack(0, 0, 0, 0, 0, 0, 0, 0, 0))]
        return sorted((route for route in found if route), key=lambda route: bool(route.gateway))

    # changes

    def set_link(self, ifindex: int, *, mtu: int) -> None:
        """Set a link up that no protocol of this host uses: without ARP, and with no IPv6 address of its own."""
        mode = _pack(_IFLA_INET6_ADDR_GEN_MODE, bytes((_IN6_ADDR_GEN_MODE_NONE,)))
        families = _pack(_IFLA_AF_SPEC, _pack(socket.AF_INET6, mode))
        flags = _IFF_UP | _IFF_NOARP
        size = _pack(_IFLA_MTU, struct.pack("=I", mtu))
        self._request(_RTM_SETLINK, 0, _LINK.pack(0, 0, ifindex, flags, flags) + size + families)

    def redirect(self, source: int, target: int) -> None:
        """Send every frame that link `source` receives out of link `target`; this host's protocols see none of them.

        By u32, which needs no module that is not there wherever tc is. The frames stay what they are, checksums that are
        still to be completed and segments that are still to be cut included.
        """
        try:
            self._add_ingress(source)
        except FileExistsError:  # of somebody whose end left it behind: its target may be gone
            self.stop_redirecting(source)
            self._add_ingress(source)
        mirred = _MIRRED.pack(0, 0, _TC_ACT_STOLEN, 0, 0, _TCA_EGRESS_REDIR, target)
        action = _pack(_TCA_ACT_KIND, b"mirred\0") + _pack(_TCA_ACT_OPTIONS, _pack(_TCA_MIRRED_PARMS, mirred))
        everything = _SELECTOR.pack(_TC_U32_TERMINAL, 0, 1, 0, 0, 0, 0, 0) + _KEY.pack(0, 0, 0, 0)
        options = _pack(_TCA_U32_ACT, _pack(1, action)) + _pack(_TCA_U32_SEL, everything)
        info = 1 << 16 | socket.htons(_ETH_P_ALL)  # priority, protocol
        head = _TC.pack(0, source, 0, _INGRESS_HANDLE, info)
        body = head + _pack(_TCA_KIND, b"u32\0") + _pack(_TCA_OPTIONS, options)
        self._request(_RTM_NEWTFILTER, _NLM_F_CREATE | _NLM_F_EXCL, body)

    def _add_ingress(self, link: int) -> None:
        body = _TC.pack(0, link, _INGRESS_HANDLE, _TC_H_INGRESS, 0) + _pack(_TCA_KIND, b"ingress\0")
        self._request(_RTM_NEWQDISC, _NLM_F_CREATE | _NLM_F_EXCL, body)

    def stop_redirecting(self, source: int) -> None:
        """Undo `redirect`; OSError ENOENT or ENODEV when there is nothing to undo."""
        body = _TC.pack(0, source, _INGRESS_HANDLE, _TC_H_INGRESS, 0)
        self._request(_RTM_DELQDISC, 0, body)

    # the socket

    def _dump(self, kind: int, body: bytes) -> list[bytes]:
        """Bodies of the messages that the kernel answers with."""
        self._send(kind, _NLM_F_DUMP, body)
        return list(self._answers())

    def _request(self, kind: int, flags: int, body: bytes) -> None:
        self._send(kind, flags | _NLM_F_ACK, body)
        for _ in self._answers():
            pass

    def _send(self, kind: int, flags: int, body: bytes) -> None:
        self._sequence += 1
        header = _HEADER.pack(_HEADER.size + len(body), kind, flags | _NLM_F_REQUEST, self._sequence, 0)
        self._socket.send(header + body)

    def _answers(self) -> Iterator[bytes]:
        """Bodies up to the end of the answer. Raises the OSError that it carries."""
        while True:
            data = self._socket.recv(_READ_BYTES)
            at = 0
            while at + _HEADER.size <= len(data):
                length, kind, _, sequence, _ = _HEADER.unpack_from(data, at)
                body = data[at + _HEADER.size : at + length]
                at += (length + 3) & ~3
                if sequence != self._sequence:
                    continue
                if kind in (_NLMSG_ERROR, _NLMSG_DONE):
                    code = -struct.unpack_from("=i", body)[0] if len(body) >= 4 else 0
                    if code > 0:
                        raise OSError(code, os.strerror(code))
                    return
                yield body


def _pack(kind: int, value: bytes) -> bytes:
    """An attribute, padded."""
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def _attributes(data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            break
        found[kind & 0x3FFF] = data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3
    return found


def _link(body: bytes) -> Link:
    _, arp_type, index, flags, _ = _LINK.unpack_from(body)
    found = _attributes(body[_LINK.size :])
    kind = _attributes(found.get(_IFLA_LINKINFO, b"")).get(_IFLA_INFO_KIND, b"")
    mtu = int.from_bytes(found.get(_IFLA_MTU, b""), "little")
    return Link(
        index, _text(found.get(_IFLA_IFNAME, b"")), found.get(_IFLA_ADDRESS, b""), mtu, _text(kind), arp_type,
        bool(flags & _IFF_UP),
    )  # fmt: skip


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode("utf-8", "surrogateescape")


def _route(body: bytes) -> Route | None:
    family, prefix, _, _, table, protocol, _, kind, _ = _ROUTE.unpack_from(body)
    found = _attributes(body[_ROUTE.size :])
    wanted = kind == _RTN_UNICAST and table == _RT_TABLE_MAIN and protocol != _RTPROT_KERNEL
    if not wanted or family not in _FAMILIES or _RTA_OIF not in found:
        return None
    destination = found.get(_RTA_DST, bytes(4 if family == socket.AF_INET else 16))
    metric = int.from_bytes(found.get(_RTA_PRIORITY, b""), "little")
    index = int.from_bytes(found[_RTA_OIF], "little")
    return Route(index, _FAMILIES[family], destination, prefix, found.get(_RTA_GATEWAY, b""), metric)
