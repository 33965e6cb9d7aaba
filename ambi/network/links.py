"""The links of networks on the host: bridges, and the parents of macvlan and ipvlan. Made once a network, by pyroute2.

A link that we have made has an alias, `ambi ID` or `ambi-TAG ID` with the network's id; so have the host's ends of veths.
What has no such alias is somebody else's: it is used when the user names it, and never removed.
"""

from __future__ import annotations

import errno
import ipaddress
import re
import secrets
import socket
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ambi.core.errors import AmbiError, Conflict, Forbidden, InvalidRequest, NotFound, Unsupported, from_os_error
from ambi.network import rtnl
from ambi.network.model import Network

if TYPE_CHECKING:
    from pyroute2 import IPRoute

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,15}")
_OPTION_NAME = "com.docker.network.bridge.name"
_OPTION_MTU = "com.docker.network.driver.mtu"
OPTIONS = (_OPTION_NAME, _OPTION_MTU)  # those that say what the link is like


def checked_name(name: str) -> str:
    """`name` if a link can have it. Raises InvalidRequest."""
    if not _NAME.fullmatch(name) or name in (".", ".."):
        raise InvalidRequest(
            f"invalid link name '{name}'", hint="at most 15 characters of A-Z, a-z, 0-9, '_', '.' and '-', as in lab-br0"
        )
    return name


def link_of(network: Network, tag: str) -> str:
    """Name of the bridge of `network`: what the option `com.docker.network.bridge.name` says, else `ambi0` (`ambi0-TAG`)
    for the default network and `ambi-` with ten digits of the id for others. Raises InvalidRequest."""
    chosen = network.options.get(_OPTION_NAME)
    if chosen:
        return checked_name(chosen)
    if network.builtin:
        return f"ambi0-{tag}" if tag else "ambi0"
    return f"ambi-{network.id[:10]}"


def alias_of(network_id: str, tag: str) -> str:
    return f"ambi-{tag} {network_id}" if tag else f"ambi {network_id}"


def mtu_of(network: Network) -> int:
    """The MTU that the network's options ask for, 0 for none. Raises InvalidRequest."""
    asked = network.options.get(_OPTION_MTU, "0")
    if not asked.isdecimal() or not (asked == "0" or 68 <= int(asked) <= 65535):
        raise InvalidRequest(f"failed to parse {_OPTION_MTU} value: {asked}", hint="a number from 68 to 65535")
    return int(asked)


@contextmanager
def opened(what: str) -> Iterator[IPRoute]:
    """A netlink socket of pyroute2 for `what` (`make network 'web'`), whose errors leave as members of our tree.

    Not kept: pyroute2 has an event loop and a socket for each thread that uses it.
    """
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with IPRoute() as route:
            yield route
    except NetlinkError as error:
        raise netlink_error(what, OSError(error.code, str(error.args[-1] or error))) from error
    except OSError as error:
        raise netlink_error(what, error) from error


def netlink_error(what: str, error: OSError) -> AmbiError:
    """`error` of the kernel, met while doing `what`."""
    message = f"cannot {what}: {error.strerror or error}"
    if error.errno in (errno.EPERM, errno.EACCES):
        return Forbidden(message, hint="run the engine as root, with CAP_NET_ADMIN")
    if error.errno in (errno.EEXIST, errno.EBUSY, errno.EADDRINUSE):
        return Conflict(message, hint="`ip link` and `ip address` show what is there")
    if error.errno in (errno.EOPNOTSUPP, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT):
        return Unsupported(message, hint="`ambi doctor` shows what this host's kernel lacks")
    if error.errno == errno.ENODEV:
        return NotFound(message, hint="`ip link` shows the links of this host")
    return from_os_error(f"cannot {what}", error)


def find(route: IPRoute, name: str) -> dict[str, Any] | None:
    """What the kernel says about link `name`: index, kind, alias, up, mtu, master; None when there is none."""
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        rows = list(route.link("get", ifname=name))
    except NetlinkError as error:
        if error.code == errno.ENODEV:
            return None
        raise
    return _described(rows[0]) if rows else None


def _described(row: Any) -> dict[str, Any]:
    info = row.get_attr("IFLA_LINKINFO")
    return {
        "name": row.get_attr("IFLA_IFNAME"),
        "index": row["index"],
        "kind": info.get_attr("IFLA_INFO_KIND") if info else "",
        "alias": row.get_attr("IFLA_IFALIAS") or "",
        "up": bool(row["flags"] & 1),
        "mtu": row.get_attr("IFLA_MTU"),
        "master": row.get_attr("IFLA_MASTER") or 0,
    }


def all_links(route: IPRoute) -> list[dict[str, Any]]:
    return [_described(row) for row in route.get_links()]


def ensure_bridge(route: IPRoute, network: Network, tag: str) -> int:
    """Index of the network's bridge, which is up and has its gateways' addresses. An address of ours that is not the
    network's any more goes."""
    name = link_of(network, tag)
    alias = alias_of(network.id, tag)
    link = find(route, name) or _new_bridge(route, network, name, alias)
    if link["kind"] != "bridge":
        raise Conflict(
            f"cannot make network '{network.name}': the link '{name}' is no bridge, but {link['kind'] or 'a device'}",
            hint=f"remove it (ip link delete {name}), or choose another one: -o {_OPTION_NAME}=NAME",
        )
    index = int(link["index"])
    ours = link["alias"] == alias
    if link["alias"].startswith("ambi") and not ours:
        raise Conflict(f"cannot make network '{network.name}': the bridge '{name}' is another network's ({link['alias']})")
    mtu = mtu_of(network)
    if ours and mtu and link["mtu"] != mtu:
        route.link("set", index=index, mtu=mtu)
    wanted = {(pool.gateway, ipaddress.ip_network(pool.subnet).prefixlen) for pool in network.pools if pool.gateway}
    there = set()
    for row in route.get_addr(index=index):
        text = str(row.get_attr("IFA_LOCAL") or row.get_attr("IFA_ADDRESS"))
        if not ipaddress.ip_address(text).is_link_local or (text, row["prefixlen"]) in wanted:
            there.add((text, int(row["prefixlen"])))
    for text, prefix in sorted(there - wanted) if ours else ():
        route.addr("delete", index=index, address=text, prefixlen=prefix)
    for text, prefix in sorted(wanted - there):
        extra = {"flags": 0x02} if ":" in text else {}  # IFA_F_NODAD: a bridge without ports has no carrier to ask on
        route.addr("add", index=index, address=text, prefixlen=prefix, **extra)
    if not link["up"]:
        route.link("set", index=index, state="up")
    return index


def _new_bridge(route: IPRoute, network: Network, name: str, alias: str) -> dict[str, Any]:
    from ambi.network import sysctl

    mtu = {"mtu": mtu_of(network)} if mtu_of(network) else {}
    route.link("add", ifname=name, kind="bridge", address=bridge_mac(), br_stp_state=0, br_forward_delay=0, **mtu)
    try:
        route.link("set", ifname=name, ifalias=alias)
        sysctl.prepare_link(name, ipv6=any(":" in pool.subnet for pool in network.pools))
    except BaseException:
        route.link("delete", ifname=name)
        raise
    made = find(route, name)
    assert made is not None
    return made


def bridge_mac() -> str:
    return "02:42:" + ":".join(f"{byte:02x}" for byte in secrets.token_bytes(4))


def new_bridge(rtnl_socket: rtnl.Rtnl, network: Network, tag: str) -> int:
    """Index of the bridge of a network that never had one, with all that `ensure_bridge` sees to: by a few messages, since
    pyroute2 takes 5 ms for it. For a network without options for its link. Nothing is left when it raises OSError."""
    from ambi.network import sysctl

    name = link_of(network, tag)
    rtnl_socket.request(rtnl.new_bridge(name, mac=bridge_mac()))
    try:
        sysctl.prepare_link(name, ipv6=any(":" in pool.subnet for pool in network.pools))
        index = socket.if_nametoindex(name)
        addresses = [(pool.gateway, ipaddress.ip_network(pool.subnet).prefixlen) for pool in network.pools if pool.gateway]
        rtnl_socket.request(
            rtnl.set_alias(name, alias_of(network.id, tag)),
            rtnl.set_up(index),
            *(rtnl.new_address(index, text, prefix) for text, prefix in addresses),
        )
    except BaseException:
        rtnl_socket.request(rtnl.delete_link(name))
        raise
    return index


def adopt_ports(route: IPRoute, network_id: str, tag: str, bridge: int) -> None:
    """Veths of the network that have lost their bridge become ports of it again."""
    for link in all_links(route):
        if link["kind"] == "veth" and link["alias"] == alias_of(network_id, tag) and link["master"] != bridge:
            route.link("set", index=link["index"], master=bridge, state="up")


def remove(route: IPRoute, name: str, network: Network, tag: str) -> None:
    """Take link `name` away if it is ours, else only the network's addresses from it."""
    link = find(route, name)
    if link is None:
        return
    if link["alias"] == alias_of(network.id, tag):
        route.link("delete", index=link["index"])
        return
    if link["kind"] != "bridge":
        return
    gateways = {pool.gateway for pool in network.pools}
    for row in route.get_addr(index=link["index"]):
        text = str(row.get_attr("IFA_LOCAL") or row.get_attr("IFA_ADDRESS"))
        if text in gateways:
            route.addr("delete", index=link["index"], address=text, prefixlen=row["prefixlen"])


def remove_all_but(route: IPRoute, keep: set[str], tag: str) -> None:
    """Delete every link of ours whose network's id is not in `keep`."""
    prefix = alias_of("", tag)
    for link in all_links(route):
        if link["alias"].startswith(prefix) and link["alias"].removeprefix(prefix) not in keep:
            _delete(route, link)


def remove_ports(route: IPRoute, tag: str, used: Callable[[], Collection[str]]) -> None:
    """Delete every veth of ours whose name is not among those of `used`, which is called once the links are listed."""
    prefix = alias_of("", tag)
    ours = [link for link in all_links(route) if link["kind"] == "veth" and link["alias"].startswith(prefix)]
    keep = used()
    for link in ours:
        if link["name"] not in keep:
            _delete(route, link)


def _delete(route: IPRoute, link: dict[str, Any]) -> None:
    try:
        route.link("delete", index=link["index"])
    except Exception as error:
        if getattr(error, "code", 0) != errno.ENODEV:  # a veth goes with the namespace of its other end
            raise
