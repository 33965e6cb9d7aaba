"""macvlan and ipvlan: NICs that are children of a link of the host.

Options, as Docker's: `parent` (`eth0`, or `eth0.50` for VLAN 50 of it, which is made when it is missing; without one a dummy
link), `macvlan_mode` (bridge, private, vepa, passthru), `ipvlan_mode` (l2, l3, l3s), `ipvlan_flag` (bridge, private, vepa).
"""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING

from ambi.core.errors import AmbiError, InvalidRequest, NotFound, Unsupported
from ambi.network import links, rtnl
from ambi.network.model import Network, Nic

if TYPE_CHECKING:
    from pyroute2 import IPRoute


def parent_of(network: Network) -> str:
    """Name of the parent link. Raises InvalidRequest."""
    return links.checked_name(network.options.get("parent") or f"ambi-{network.id[:10]}")


def mode_of(network: Network) -> tuple[str, str]:
    """Mode and flag of the network's links; the flag is ipvlan's. Raises InvalidRequest."""
    kind = network.driver
    modes = rtnl.MACVLAN_MODES if kind == "macvlan" else rtnl.IPVLAN_MODES
    mode = network.options.get(f"{kind}_mode") or ("bridge" if kind == "macvlan" else "l2")
    flag = network.options.get("ipvlan_flag") or "bridge"
    for option, value, allowed in ((f"{kind}_mode", mode, modes), ("ipvlan_flag", flag, rtnl.IPVLAN_FLAGS)):
        if value not in allowed:
            raise InvalidRequest(f"unknown {option} '{value}'", hint=f"one of {', '.join(allowed)}")
    return mode, flag


def ensure_parent(network: Network, tag: str) -> tuple[str, int]:
    """Name and index of the parent link, which is made when it is a VLAN or a dummy that is missing."""
    if network.driver not in ("macvlan", "ipvlan"):
        raise InvalidRequest(f"could not find a network driver named '{network.driver}'", hint="bridge, macvlan or ipvlan")
    mode_of(network)
    name = parent_of(network)
    base, dot, vlan = name.rpartition(".")
    made = "vlan" if dot else "dummy"
    what = f"make network '{network.name}' on {name}"
    with links.opened(what) as route:
        found = links.find(route, name)
        if found is None and network.options.get("parent") and not (base and vlan.isdecimal() and 0 < int(vlan) < 4095):
            raise NotFound(f"cannot {what}: there is no such link", hint="`ip link` shows the links of this host")
        if found is None:
            try:
                _make(route, name, base, vlan)
            except Exception as failure:
                if getattr(failure, "code", 0) not in (errno.EOPNOTSUPP, errno.EEXIST):
                    raise
                raise _lacks(what, made) from failure
            route.link("set", ifname=name, ifalias=links.alias_of(network.id, tag))
            route.link("set", ifname=name, state="up")
    return name, socket.if_nametoindex(name)


def _make(route: IPRoute, name: str, base: str, vlan: str) -> None:
    if not base:
        route.link("add", ifname=name, kind="dummy")
        return
    below = links.find(route, base)
    if below is None:
        raise NotFound(
            f"cannot make VLAN link {name}: there is no link {base}", hint="`ip link` shows the links of this host"
        )
    route.link("add", ifname=name, kind="vlan", link=below["index"], vlan_id=int(vlan))


def new_link(network: Network, nic: Nic, parent: int, netns: int) -> rtnl.Message:
    """What makes `nic` as a child of `parent` in the namespace `netns`."""
    mode, flag = mode_of(network)
    name = links.checked_name(nic.name)
    if network.driver == "macvlan":
        return rtnl.new_macvlan(name, parent=parent, mode=mode, mac=nic.mac, mtu=nic.mtu, netns=netns)
    return rtnl.new_ipvlan(name, parent=parent, mode=mode, flag=flag, mtu=nic.mtu, netns=netns)


def default_routes(network: Network, nic: Nic) -> list[str]:
    """The gateways of `nic`; an ipvlan of layer 3 has no neighbours, and its default routes go straight onto the link."""
    if network.driver == "ipvlan" and mode_of(network)[0] != "l2":
        return [{4: "0.0.0.0", 6: "::"}[family] for family in sorted({address.family for address in nic.addresses})]
    return [address.gateway for address in nic.addresses if address.gateway]


def error(what: str, network: Network, failure: OSError) -> AmbiError:
    """`failure` of making a child."""
    if failure.errno == errno.EOPNOTSUPP:
        return _lacks(what, network.driver)
    return links.netlink_error(what, failure)


def _lacks(what: str, module: str) -> Unsupported:
    module = {"vlan": "8021q"}.get(module, module)
    return Unsupported(
        f"cannot {what}: this kernel has no {module}", hint=f"`modprobe {module}`, or use a bridge network, which needs none"
    )
