"""What lets nft divert connections of the host to its own 127.0.0.1: a bridge that passes packets of 127.0.0.0/8.

Such a packet leaves the host as one of the bridge's address, and only with the sysctl `route_localnet`, which opens another
way as well: whoever is on the bridge could send packets to 127.0.0.1, and reach what listens there for the host alone. So
the bridge first gets a filter that drops what comes in from it with an address of 127.0.0.0/8 in it. It is the link's own, a
BPF program at its ingress (tc-bpf(8)), and not a rule of nftables: those are flushed by others, also while we do not run.

Answers come in with the bridge's address and get their 127.0.0.1 behind the filter. But where bridged packets pass the
host's IP rules (bridge-nf-call-iptables), they have it before: then a rule of ours marks them for the filter. A mark cannot
come from an instance, as the kernel takes it off between namespaces.

A frame with a tag of VLAN 0, or with several, is a plain one to the kernel's IP. It has taken the first tag off before the
filter sees the frame; nobody needs another one.
"""

from __future__ import annotations

import logging
import os

from ambi.core.errors import AmbiError
from ambi.linux import bpf
from ambi.linux.bpf import instruction
from ambi.network import rtnl, rules, sysctl

log = logging.getLogger(__name__)

_BPF_PROG_TYPE_SCHED_CLS = 3  # linux/bpf.h
_TC_ACT_UNSPEC, _TC_ACT_SHOT = -1, 2  # linux/pkt_cls.h
_NAME = "ambi-loopback"
# _WORD and _HALF read the packet, from its Ethernet header on, into register 0; past the packet's end they end the program
_WORD, _HALF, _FIELD, _AND, _SET, _MOVE, _EXIT = 0x20, 0x28, 0x61, 0x57, 0xB7, 0xBF, 0x95
_EQUALS, _DIFFERS = 0x15, 0x55
_MARK_FIELD = 8  # of struct __sk_buff
_TYPE, _SOURCE, _DESTINATION = 12, 26, 30
_ETH_P_IP, _ETH_P_8021Q, _ETH_P_8021AD = 0x0800, 0x8100, 0x88A8  # linux/if_ether.h
_NET, _MASK = 0x7F000000, -0x1000000


def program() -> bytes:
    """Drops IPv4 packets from 127.0.0.0/8, and those to it that have no mark of ours; has no opinion on others, but for
    frames with more than one tag."""
    masked = instruction(_AND, 0, value=_MASK)
    lines = [
        instruction(_MOVE, 6, 1), instruction(_FIELD, 7, 6, _MARK_FIELD),
        instruction(_HALF, value=_TYPE),
        instruction(_EQUALS, 0, offset=11, value=_ETH_P_8021Q), instruction(_EQUALS, 0, offset=10, value=_ETH_P_8021AD),
        instruction(_DIFFERS, 0, offset=7, value=_ETH_P_IP),
        instruction(_WORD, value=_SOURCE), masked, instruction(_EQUALS, 0, offset=6, value=_NET),
        instruction(_EQUALS, 7, offset=3, value=rules.ANSWER_MARK),
        instruction(_WORD, value=_DESTINATION), masked, instruction(_EQUALS, 0, offset=2, value=_NET),
        instruction(_SET, 0, value=_TC_ACT_UNSPEC), instruction(_EXIT),
        instruction(_SET, 0, value=_TC_ACT_SHOT), instruction(_EXIT),
    ]  # fmt: skip
    return b"".join(lines)


def open_way(route: rtnl.Rtnl, name: str, index: int) -> bool:
    """Whether bridge `name`, which is ours, passes connections of the host to 127.0.0.1 from now on. Where the kernel does
    not do it there is still netd's proxy."""
    try:
        _guard(route, index)
        sysctl.write(f"ipv4/conf/{name}/route_localnet", "1")
    except (AmbiError, OSError) as error:
        log.info("ports on 127.0.0.1 are served by netd alone: %s: %s", name, error)
        return False
    return True


def _guard(route: rtnl.Rtnl, index: int) -> None:
    """The filter is there. Raises OSError."""
    loaded = bpf.load(_BPF_PROG_TYPE_SCHED_CLS, program())
    try:
        try:
            route.request(rtnl.new_ingress(index))
        except FileExistsError:  # made by an engine before this one
            pass
        route.request(rtnl.new_ingress_filter(index, loaded, _NAME))
    finally:
        os.close(loaded)
