"""The few rtnetlink messages of an instance's start and end, by hand: struct and a socket.

pyroute2 opens an event loop and a socket a thread (0.8 ms) and takes 0.3 ms a message; this takes a tenth of it, and its
socket stays in the namespace in which it was opened, whichever thread uses it. Everything rarer goes through pyroute2.
Formats: rtnetlink(7), linux/if_link.h, linux/if_addr.h; struct nlmsghdr, rtattr: native byte order, aligned to four bytes.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
import threading
from typing import NamedTuple

# linux/netlink.h
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_EXCL, _NLM_F_CREATE = 0x1, 0x4, 0x200, 0x400
_NLM_F_ACK_TLVS = 0x200
_NLM_F_DUMP = 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_SOL_NETLINK, _NETLINK_CAP_ACK, _NETLINK_EXT_ACK = 270, 10, 11
_NLMSGERR_ATTR_MSG = 1
_NLA_F_NESTED = 0x8000

# linux/rtnetlink.h
_RTM_NEWLINK, _RTM_DELLINK, _RTM_GETLINK, _RTM_SETLINK, _RTM_NEWADDR = 16, 17, 18, 19, 20
_RTM_NEWROUTE, _RTM_GETROUTE = 24, 26
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_TABLE = 1, 4, 5, 15
_RT_TABLE_MAIN, _RT_TABLE_LOCAL, _RTPROT_BOOT, _RTN_UNICAST = 254, 255, 3, 1
RT_SCOPE_UNIVERSE, RT_SCOPE_LINK = 0, 253

# linux/if_link.h
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINK, _IFLA_MASTER = 1, 3, 4, 5, 10
_IFLA_LINKINFO, _IFLA_IFALIAS, _IFLA_STATS64, _IFLA_NET_NS_FD = 18, 20, 23, 28
_IFLA_INFO_KIND, _IFLA_INFO_DATA, _IFLA_INFO_SLAVE_KIND, _IFLA_INFO_SLAVE_DATA = 1, 2, 4, 5
_VETH_INFO_PEER = 1
_IFLA_BR_FORWARD_DELAY, _IFLA_BR_STP_STATE = 1, 5
_IFLA_BRPORT_MODE, _IFLA_BRPORT_ISOLATED = 4, 33
_IFLA_MACVLAN_MODE, _IFLA_IPVLAN_MODE, _IFLA_IPVLAN_FLAGS = 1, 1, 2
MACVLAN_MODES = {"private": 1, "vepa": 2, "bridge": 4, "passthru": 8}  # enum macvlan_mode
IPVLAN_MODES = {"l2": 0, "l3": 1, "l3s": 2}
IPVLAN_FLAGS = {"bridge": 0, "private": 1, "vepa": 2}
_IFF_UP = 1

# linux/pkt_sched.h, linux/pkt_cls.h
_RTM_NEWQDISC, _RTM_NEWTFILTER, _NLM_F_REPLACE, _ETH_P_ALL = 36, 44, 0x100, 0x0003
_TC_H_INGRESS, _INGRESS_HANDLE = 0xFFFFFFF1, 0xFFFF0000
_TCA_KIND, _TCA_OPTIONS, _TCA_BPF_FD, _TCA_BPF_NAME, _TCA_BPF_FLAGS, _TCA_BPF_FLAG_ACT_DIRECT = 1, 2, 6, 7, 8, 1

# linux/if_addr.h
_IFA_ADDRESS, _IFA_LOCAL, _IFA_BROADCAST, _IFA_F_NODAD = 1, 2, 4, 0x02

_NLMSGHDR = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_IFINFOMSG = struct.Struct("=BxHiII")  # family, type, index, flags, change
_IFADDRMSG = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
_RTMSG = struct.Struct("=BBBBBBBBI")  # family, dst_len, src_len, tos, table, protocol, scope, type, flags
_TCMSG = struct.Struct("=BxxxiIII")  # family, index, handle, parent, info
_RTATTR = struct.Struct("=HH")
_STATS64 = struct.Struct("=8Q")  # the head of struct rtnl_link_stats64
_COUNTERS = ("packets", "bytes", "errors", "dropped")
_RECEIVE = 1 << 16


class Message(NamedTuple):
    """A request: type, flags beside REQUEST and ACK, and everything behind the header."""

    type: int
    flags: int
    body: bytes


def attribute(kind: int, payload: bytes) -> bytes:
    return _RTATTR.pack(_RTATTR.size + len(payload), kind) + payload + bytes(-len(payload) % 4)


def nested(kind: int, *attributes: bytes) -> bytes:
    return attribute(kind | _NLA_F_NESTED, b"".join(attributes))


def _text(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


def _number(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=I", value))


def _link(index: int, attributes: bytes, *, up: bool = False, family: int = 0) -> bytes:
    flags = _IFF_UP if up else 0
    return _IFINFOMSG.pack(family, 0, index, flags, flags) + attributes


def new_veth(name: str, *, master: int, mtu: int, peer: str, peer_mac: str, peer_netns: int) -> Message:
    """A veth, up, as a port of the bridge with index `master`; its other end is `peer` in the namespace `peer_netns`.

    The peer is down: the kernel opens it before both ends know each other, and fails (ENOTCONN).
    """
    inner = _text(_IFLA_IFNAME, peer) + attribute(_IFLA_ADDRESS, bytes.fromhex(peer_mac.replace(":", "")))
    inner += _number(_IFLA_MTU, mtu) + _number(_IFLA_NET_NS_FD, peer_netns)
    info = nested(
        _IFLA_LINKINFO,
        _text(_IFLA_INFO_KIND, "veth"),
        nested(_IFLA_INFO_DATA, attribute(_VETH_INFO_PEER, _link(0, inner))),
    )
    outer = _text(_IFLA_IFNAME, name) + _number(_IFLA_MTU, mtu) + _number(_IFLA_MASTER, master)
    return Message(_RTM_NEWLINK, _NLM_F_CREATE | _NLM_F_EXCL, _link(0, outer + info, up=True))


def new_bridge(name: str, *, mac: str) -> Message:
    """A bridge, down. Its MAC is given: else it is the lowest of its ports, which come and go."""
    # with a forward delay a port passes nothing for that long, with STP switched off too
    data = nested(_IFLA_INFO_DATA, _number(_IFLA_BR_FORWARD_DELAY, 0), _number(_IFLA_BR_STP_STATE, 0))
    info = nested(_IFLA_LINKINFO, _text(_IFLA_INFO_KIND, "bridge"), data)
    address = attribute(_IFLA_ADDRESS, bytes.fromhex(mac.replace(":", "")))
    return Message(_RTM_NEWLINK, _NLM_F_CREATE | _NLM_F_EXCL, _link(0, _text(_IFLA_IFNAME, name) + address + info))


def set_alias(name: str, alias: str) -> Message:
    return Message(_RTM_NEWLINK, 0, _link(0, _text(_IFLA_IFNAME, name) + attribute(_IFLA_IFALIAS, alias.encode())))


def new_macvlan(name: str, *, parent: int, mode: str, mac: str, mtu: int, netns: int) -> Message:
    """A macvlan link of `parent` (an index in the socket's namespace) in the namespace `netns`; mode of MACVLAN_MODES."""
    data = nested(_IFLA_INFO_DATA, _number(_IFLA_MACVLAN_MODE, MACVLAN_MODES[mode]))
    address = attribute(_IFLA_ADDRESS, bytes.fromhex(mac.replace(":", "")))
    return _new_child(name, "macvlan", data, address, parent, mtu, netns)


def new_ipvlan(name: str, *, parent: int, mode: str, flag: str, mtu: int, netns: int) -> Message:
    """The same as ipvlan, which has its parent's MAC; mode of IPVLAN_MODES, flag of IPVLAN_FLAGS."""
    words = ((_IFLA_IPVLAN_MODE, IPVLAN_MODES[mode]), (_IFLA_IPVLAN_FLAGS, IPVLAN_FLAGS[flag]))
    data = nested(_IFLA_INFO_DATA, *(attribute(kind, struct.pack("=H", value)) for kind, value in words))
    return _new_child(name, "ipvlan", data, b"", parent, mtu, netns)


def _new_child(name: str, kind: str, data: bytes, address: bytes, parent: int, mtu: int, netns: int) -> Message:
    info = nested(_IFLA_LINKINFO, _text(_IFLA_INFO_KIND, kind), data)
    where = _number(_IFLA_LINK, parent) + _number(_IFLA_NET_NS_FD, netns)
    body = _text(_IFLA_IFNAME, name) + address + _number(_IFLA_MTU, mtu) + where + info
    return Message(_RTM_NEWLINK, _NLM_F_CREATE | _NLM_F_EXCL, _link(0, body))


def set_port(name: str, *, alias: str, hairpin: bool, isolated: bool) -> Message:
    """The alias of link `name`, and how it is a port of its bridge."""
    data = attribute(_IFLA_BRPORT_MODE, bytes([hairpin])) + attribute(_IFLA_BRPORT_ISOLATED, bytes([isolated]))
    slave = nested(_IFLA_LINKINFO, _text(_IFLA_INFO_SLAVE_KIND, "bridge"), nested(_IFLA_INFO_SLAVE_DATA, data))
    alias_value = attribute(_IFLA_IFALIAS, alias.encode())
    return Message(_RTM_NEWLINK, 0, _link(0, _text(_IFLA_IFNAME, name) + alias_value + slave))


def set_up(index: int) -> Message:
    return Message(_RTM_NEWLINK, 0, _link(index, b"", up=True))


def set_master(name: str, master: int) -> Message:
    return Message(_RTM_NEWLINK, 0, _link(0, _text(_IFLA_IFNAME, name) + _number(_IFLA_MASTER, master), up=True))


def delete_link(name: str) -> Message:
    return Message(_RTM_DELLINK, 0, _link(0, _text(_IFLA_IFNAME, name)))


def new_address(index: int, address: str, prefix: int) -> Message:
    """An address of link `index`, usable at once: no duplicate address detection."""
    ip = ipaddress.ip_address(address)
    family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
    attributes = attribute(_IFA_LOCAL, ip.packed) + attribute(_IFA_ADDRESS, ip.packed)
    if ip.version == 4 and prefix < 31:
        net = ipaddress.ip_network((ip, prefix), strict=False)
        attributes += attribute(_IFA_BROADCAST, net.broadcast_address.packed)
    flags = _IFA_F_NODAD if ip.version == 6 else 0
    head = _IFADDRMSG.pack(family, prefix, flags, RT_SCOPE_UNIVERSE, index)
    return Message(_RTM_NEWADDR, _NLM_F_CREATE | _NLM_F_EXCL, head + attributes)


def new_default_route(index: int, gateway: str) -> Message:
    """The default route of the family of `gateway`, through link `index`; straight onto it if that is "0.0.0.0" or "::"."""
    ip = ipaddress.ip_address(gateway)
    family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
    scope = RT_SCOPE_LINK if ip.is_unspecified and ip.version == 4 else RT_SCOPE_UNIVERSE
    head = _RTMSG.pack(family, 0, 0, 0, _RT_TABLE_MAIN, _RTPROT_BOOT, scope, _RTN_UNICAST, 0)
    target = b"" if ip.is_unspecified else attribute(_RTA_GATEWAY, ip.packed)
    return Message(_RTM_NEWROUTE, _NLM_F_CREATE | _NLM_F_EXCL, head + target + _number(_RTA_OIF, index))


def new_ingress(index: int) -> Message:
    """A place for filters of what link `index` receives."""
    body = _TCMSG.pack(0, index, _INGRESS_HANDLE, _TC_H_INGRESS, 0) + _text(_TCA_KIND, "ingress")
    return Message(_RTM_NEWQDISC, _NLM_F_CREATE | _NLM_F_EXCL, body)


def new_ingress_filter(index: int, program: int, name: str) -> Message:
    """The first filter of what link `index` receives, in place of the one that is there: the BPF program with the
    descriptor `program`, whose verdict counts."""
    flags = _number(_TCA_BPF_FLAGS, _TCA_BPF_FLAG_ACT_DIRECT)
    options = attribute(_TCA_OPTIONS, _number(_TCA_BPF_FD, program) + _text(_TCA_BPF_NAME, name) + flags)
    head = _TCMSG.pack(0, index, 1, _INGRESS_HANDLE, 1 << 16 | socket.htons(_ETH_P_ALL))  # handle 1, priority 1
    return Message(_RTM_NEWTFILTER, _NLM_F_CREATE | _NLM_F_REPLACE, head + _text(_TCA_KIND, "bpf") + options)


class Rtnl:
    """A socket in the network namespace in which the calling thread is when this is made. Safe between threads."""

    __slots__ = ("_lock", "_sequence", "_socket")

    def __init__(self, protocol: int = socket.NETLINK_ROUTE) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
        self._socket.bind((0, 0))
        self._lock = threading.Lock()
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Rtnl:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def request(self, *messages: Message) -> None:
        """Send all in one go; the kernel takes them one after the other. The first that it refuses raises OSError(errno,
        the kernel's own words); those behind it have been tried as well."""
        with self._lock:
            first = self._sequence + 1
            self._sequence += len(messages)
            data = b"".join(self._pack(message, first + n) for n, message in enumerate(messages))
            self._socket.send(data)
            waiting = set(range(first, first + len(messages)))
            failure: OSError | None = None
            while waiting:
                for kind, flags, sequence, body in _split(self._socket.recv(_RECEIVE)):
                    if kind == _NLMSG_ERROR and sequence in waiting:
                        waiting.remove(sequence)
                        failure = failure or _refusal(flags, body)
        if failure:
            raise failure

    @staticmethod
    def _pack(message: Message, sequence: int, flags: int = _NLM_F_ACK) -> bytes:
        length = _NLMSGHDR.size + len(message.body)
        header = _NLMSGHDR.pack(length, message.type, message.flags | _NLM_F_REQUEST | flags, sequence, 0)
        return header + message.body + bytes(-length % 4)

    def dump(self, message: Message) -> list[bytes]:
        """The bodies of all that the kernel lists for `message`. Raises OSError."""
        with self._lock:
            self._sequence += 1
            self._socket.send(self._pack(message, self._sequence, _NLM_F_DUMP))
            found: list[bytes] = []
            while True:
                for kind, flags, sequence, body in _split(self._socket.recv(_RECEIVE)):
                    if sequence != self._sequence:
                        continue
                    failure = _refusal(flags, body) if kind == _NLMSG_ERROR else None
                    if failure:
                        raise failure
                    if kind in (_NLMSG_DONE, _NLMSG_ERROR):
                        return found
                    found.append(body)

    def routes(self, family: int) -> set[str]:
        """Destinations of the unicast routes of `family` (AF_INET, AF_INET6) in every table, `10.1.0.0/16`, without default
        routes and the host's own addresses. Raises OSError."""
        found = set()
        for body in self.dump(Message(_RTM_GETROUTE, 0, _RTMSG.pack(family, 0, 0, 0, 0, 0, 0, 0, 0))):
            _, length, _, _, table, _, _, kind, _ = _RTMSG.unpack_from(body)
            values = attributes(body[_RTMSG.size :])
            if _RTA_TABLE in values:
                table = struct.unpack("=I", values[_RTA_TABLE])[0]
            if length and _RTA_DST in values and kind == _RTN_UNICAST and table != _RT_TABLE_LOCAL:
                found.add(f"{socket.inet_ntop(family, values[_RTA_DST])}/{length}")
        return found

    def counters(self, name: str) -> dict[str, int]:
        """rx_packets, tx_packets, rx_bytes, ... of link `name`, as the kernel counts them. Raises OSError (ENODEV)."""
        with self._lock:
            self._sequence += 1
            asked = Message(_RTM_GETLINK, 0, _link(0, _text(_IFLA_IFNAME, name)))
            self._socket.send(self._pack(asked, self._sequence, 0))
            while True:
                for kind, flags, sequence, body in _split(self._socket.recv(_RECEIVE)):
                    if sequence != self._sequence:
                        continue
                    if kind == _NLMSG_ERROR:
                        raise _refusal(flags, body) or OSError(errno.EPROTO, os.strerror(errno.EPROTO))
                    values = _STATS64.unpack_from(attributes(body[_IFINFOMSG.size :])[_IFLA_STATS64])
                    names = (f"{way}_{noun}" for noun in _COUNTERS for way in ("rx", "tx"))
                    return dict(zip(names, values, strict=True))


def _split(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """(type, flags, sequence, body) of each message of a datagram."""
    found, at = [], 0
    while at + _NLMSGHDR.size <= len(data):
        length, kind, flags, sequence, _ = _NLMSGHDR.unpack_from(data, at)
        if length < _NLMSGHDR.size:
            break
        found.append((kind, flags, sequence, data[at + _NLMSGHDR.size : at + length]))
        at += length + -length % 4
    return found


def attributes(data: bytes) -> dict[int, bytes]:
    """Attributes one after the other, by kind."""
    found, at = {}, 0
    while at + _RTATTR.size <= len(data):
        length, kind = _RTATTR.unpack_from(data, at)
        if length < _RTATTR.size:
            break
        found[kind & ~_NLA_F_NESTED] = data[at + _RTATTR.size : at + length]
        at += length + -length % 4
    return found


def _refusal(flags: int, body: bytes) -> OSError | None:
    """The error that a NLMSG_ERROR message carries, None for a plain acknowledgement."""
    code = -struct.unpack_from("=i", body)[0]
    if code == 0:
        return None
    text = os.strerror(code)
    if flags & _NLM_F_ACK_TLVS:  # NETLINK_CAP_ACK: only the header of the refused message lies between
        said = attributes(body[4 + _NLMSGHDR.size :]).get(_NLMSGERR_ATTR_MSG)
        if said:
            text = f"{text} ({said.rstrip(bytes(1)).decode(errors='replace')})"
    return OSError(code, text)
