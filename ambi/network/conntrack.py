"""What connection tracking remembers of UDP: a client that goes on sending would stay with where its first packet went."""

from __future__ import annotations

import errno
import logging
import socket
import struct
from collections.abc import Iterable

from ambi.network.rtnl import Message, Rtnl, attribute, attributes, nested

log = logging.getLogger(__name__)

# linux/netlink.h, linux/netfilter/nfnetlink.h, nfnetlink_conntrack.h; flags: net/netfilter/nf_conntrack_netlink.c (5.8)
_NETLINK_NETFILTER = 12
_CT_GET, _CT_DELETE = 1 << 8 | 1, 1 << 8 | 2  # NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET and DELETE
_CTA_TUPLE_ORIG, _CTA_TUPLE_PROTO, _CTA_PROTO_NUM, _CTA_PROTO_DST_PORT = 1, 2, 1, 3
_CTA_FILTER, _CTA_FILTER_ORIG_FLAGS, _CTA_FILTER_REPLY_FLAGS = 25, 1, 2
_NFGENMSG = struct.Struct("!BBH")  # family, version, resource id
_F_PROTO_NUM, _F_PROTO_DST_PORT = 1 << 3, 1 << 5


def _to_port(family: int, port: int) -> Message:
    """What lists the UDP flows whose first packet went to `port`; the kernel filters."""
    proto = attribute(_CTA_PROTO_NUM, bytes([socket.IPPROTO_UDP])) + attribute(_CTA_PROTO_DST_PORT, struct.pack("!H", port))
    flags = attribute(_CTA_FILTER_ORIG_FLAGS, struct.pack("=I", _F_PROTO_NUM | _F_PROTO_DST_PORT))
    flags += attribute(_CTA_FILTER_REPLY_FLAGS, struct.pack("=I", 0))
    body = nested(_CTA_TUPLE_ORIG, nested(_CTA_TUPLE_PROTO, proto)) + nested(_CTA_FILTER, flags)
    return Message(_CT_GET, 0, _NFGENMSG.pack(family, 0, 0) + body)


def _forget(listed: bytes) -> Message:
    """What deletes a flow, as the kernel has listed it."""
    original = attributes(listed[_NFGENMSG.size :])[_CTA_TUPLE_ORIG]
    return Message(_CT_DELETE, 0, listed[: _NFGENMSG.size] + nested(_CTA_TUPLE_ORIG, original))


def forget_udp(ports: Iterable[int]) -> None:
    """Flows to these ports of the host, in the namespace of the calling thread, are new ones from their next packet on.

    Raises nothing: without it a client that never falls silent for half a minute stays where it was.
    """
    asked = [_to_port(family, port) for port in sorted(set(ports)) for family in (socket.AF_INET, socket.AF_INET6)]
    if not asked:
        return
    try:
        with Rtnl(_NETLINK_NETFILTER) as kernel:
            for message in asked:
                for flow in kernel.dump(message):  # deleting by a filter takes Linux 6.8
                    try:
                        kernel.request(_forget(flow))
                    except OSError as error:
                        if error.errno != errno.ENOENT:  # it has just ended
                            raise
    except OSError as error:
        log.warning("cannot forget flows of published UDP ports: %s", error)
