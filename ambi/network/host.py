"""What the kernel has of our networks: bridges, namespaces, veths, rules. One object for an engine, safe between threads."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Collection, Iterable, Sequence

from ambi.core.errors import AmbiError, InvalidRequest, NotFound
from ambi.core.undo import Undo
from ambi.network import (
    announce,
    children,
    conntrack,
    firewall,
    ipam,
    links,
    loopback,
    namespaces,
    rtnl,
    rules,
    sysctl,
    watch,
)
from ambi.network.links import link_of as link_of
from ambi.network.model import Network, Nic, Port

log = logging.getLogger(__name__)

_EVERY_LINK = ("fe80::/64", "ff00::/8")  # every IPv6 link has these


class NetworkHost:
    """The host's side of every network of one run root, in the network namespace that the caller's process is in.

    tag: "" for the default run root, else 6 hexadecimal digits of it. All methods block, for milliseconds.
    """

    def __init__(self, tag: str = "") -> None:
        self.tag = tag
        self._rules = rules.Rules(tag)
        self._lock = threading.RLock()  # over bridges; veths need none
        self._ready: dict[str, tuple[Network, str, int]] = {}  # network id -> as it was made, link, index
        self._open: dict[str, bool] = {}  # network id -> whether its bridge passes what goes to 127.0.0.1, once asked for
        self._proven: set[tuple[str, bool]] = set()  # kinds of bridges that this host has let us make
        self._socket: rtnl.Rtnl | None = None
        self._socket_lock = threading.Lock()
        self._firewall = firewall.Firewall()
        self._watch: watch.Watch | None = None

    def warm_up(self) -> None:
        """Load what the first call would have to load (0.2 s); never needed, raises nothing."""
        try:
            with links.opened("look at links"):
                self._netlink()
        except AmbiError as error:
            log.warning("%s", error)

    def ensure(self, network: Network) -> None:
        """Link, its addresses, sysctls and rules are there afterwards; heals what somebody took away. Nothing to do for
        `host` and `null`. Raises Unsupported, Conflict (the link's name is another's), Forbidden, InvalidRequest."""
        if network.driver in ("host", "null"):
            return
        if self._is_ready(network):
            return
        with self._lock:
            if self._is_ready(network):  # since, by whoever held the lock
                return
            if network.driver == "bridge":
                name, index = self._ensure_bridge(network)
            else:
                name, index = children.ensure_parent(network, self.tag)
            self._made(network, name, index)

    def _is_ready(self, network: Network) -> bool:
        """Whether it is there as it was made, as far as its link tells."""
        ready = self._ready.get(network.id)
        return ready is not None and ready[0] == network and _index(ready[1]) == ready[2]

    def _made(self, network: Network, name: str, index: int) -> None:
        self._ready[network.id] = (network, name, index)
        if network.driver == "bridge":
            self._proven.add(_kind(network))
            if network.id in self._open:
                self._open[network.id] = loopback.open_way(self._netlink(), name, index)
            self._pass_firewalls()

    def certain(self, network: Network) -> bool:
        """Whether `create` will succeed for `network`, which is new: a bridge like it has been made before, and what else
        the kernel may object to is settled. So whoever asked for it need not wait for the kernel."""
        if network.driver != "bridge" or _kind(network) not in self._proven or any(map(network.options.get, links.OPTIONS)):
            return False
        return all(ipam.is_private(pool.subnet) for pool in network.pools) and not _index(link_of(network, self.tag))

    def create(self, network: Network) -> None:
        """`ensure` for a network that is `certain`, in a tenth of the time: its link is not there, nor anything that was on
        it. Raises the same."""
        with self._lock:
            if network.id in self._ready:
                return
            name = self._prepare(network)
            try:
                index = links.new_bridge(self._netlink(), network, self.tag)
            except OSError as error:
                raise links.netlink_error(f"make network '{network.name}'", error) from error
            self._made(network, name, index)

    def _ensure_bridge(self, network: Network) -> tuple[str, int]:
        name = self._prepare(network)
        with links.opened(f"make network '{network.name}'") as route:
            index = links.ensure_bridge(route, network, self.tag)
            links.adopt_ports(route, network.id, self.tag, index)
        return name, index

    def _prepare(self, network: Network) -> str:
        """What has to be so before the bridge is there; the bridge's name."""
        name = link_of(network, self.tag)
        if not network.internal:
            if any("." in pool.subnet for pool in network.pools):
                sysctl.forward_ipv4()
            if any(":" in pool.subnet for pool in network.pools):
                sysctl.forward_ipv6()
        self._rules.network(network.id, rules.of_network(network, name))
        return name

    def _pass_firewalls(self) -> None:
        if self._watch is None:
            self._watch = watch.Watch(self._rules_changed, self._firewall.polled)
        self._rules.others(firewall.other_bridges())
        self._firewall.apply(name for net, name, _ in self._ready.values() if net.driver == "bridge" and name[:4] != "ambi")

    def _rules_changed(self) -> None:
        """Called by the watch: somebody has changed rules of this host, perhaps ours."""
        try:
            with self._lock:
                if self._rules.heal():
                    log.warning("the table %s was changed by somebody else and has been made again", self._rules.table)
                if self._ready:
                    self._pass_firewalls()
        except AmbiError as error:
            log.warning("%s", error)

    def remove(self, network: Network) -> None:
        """Take the links and rules of `network` away; what is not there is no error."""
        with self._lock:
            self._ready.pop(network.id, None)
            self._open.pop(network.id, None)
            if network.driver in ("host", "null"):
                return
            with links.opened(f"remove network '{network.name}'") as route:
                if network.driver == "bridge":
                    links.remove(route, link_of(network, self.tag), network, self.tag)
                else:
                    links.remove(route, children.parent_of(network), network, self.tag)
            if network.driver == "bridge":
                self._rules.forget_network(network.id)

    def new_namespace(self) -> int:
        """A descriptor (CLOEXEC) of a fresh network namespace in which `lo` is up. The caller closes it."""
        return namespaces.new()

    def plug(self, netns_fd: int, network: Network, nic: Nic) -> None:
        """Make `nic` in the namespace and join it to `network`, with addresses and routes; it is up and forwards at once.

        `nic.addresses[].gateway` is where the default route goes if `nic.default_route`; an internal network has none.
        Undone when it fails. Raises Conflict (the namespace has such a NIC or address), NotFound (no link of the network).
        """
        what = f"join network '{network.name}' as {nic.name}"
        self.ensure(network)
        ready = self._ready.get(network.id)
        if ready is None:
            raise InvalidRequest(f"cannot {what}: its driver is '{network.driver}'")
        index = ready[2]
        try:
            if network.driver == "bridge":
                self._netlink().request(self._veth(nic, index, netns_fd))
            else:
                self._netlink().request(children.new_link(network, nic, index, netns_fd))
        except OSError as error:
            if network.driver == "bridge":
                raise links.netlink_error(what, error) from error
            raise children.error(what, network, error) from error
        with Undo() as undo:
            undo.add(f"remove {nic.name}", lambda: self.unplug(netns_fd, nic))
            try:
                if nic.host_link:
                    self._netlink().request(self._port(network, nic))
                namespaces.inside(netns_fd, lambda: _configure(network, nic))
            except OSError as error:
                raise links.netlink_error(what, error) from error
            undo.keep()

    @staticmethod
    def _veth(nic: Nic, bridge: int, netns_fd: int) -> rtnl.Message:
        name, peer = links.checked_name(nic.host_link), links.checked_name(nic.name)
        return rtnl.new_veth(name, master=bridge, mtu=nic.mtu, peer=peer, peer_mac=nic.mac, peer_netns=netns_fd)

    def _port(self, network: Network, nic: Nic) -> rtnl.Message:
        # A packet that is diverted back to where it came from is bridged, not routed, where bridges obey the IP rules.
        return rtnl.set_port(
            nic.host_link,
            alias=links.alias_of(network.id, self.tag),
            hairpin=sysctl.bridge_filter(),
            isolated=network.options.get("com.docker.network.bridge.enable_icc", "true") == "false",
        )

    def unplug_left(self, nic: Nic) -> None:
        """Take away what is left of `nic` on the host, whose instance has ended; mostly nothing is."""
        if nic.host_link and _index(nic.host_link):
            self._delete(nic, lambda: self._netlink().request(rtnl.delete_link(nic.host_link)))

    def unplug(self, netns_fd: int, nic: Nic) -> None:
        """Take `nic` away; one that is not there is no error."""

        def away() -> None:
            with rtnl.Rtnl() as inner:
                inner.request(rtnl.delete_link(nic.name))

        if nic.host_link:
            self._delete(nic, lambda: self._netlink().request(rtnl.delete_link(nic.host_link)))
        else:
            self._delete(nic, lambda: namespaces.inside(netns_fd, away))

    @staticmethod
    def _delete(nic: Nic, delete: Callable[[], object]) -> None:
        try:
            delete()
        except OSError as error:
            found = links.netlink_error(f"remove {nic.name}", error)
            if not isinstance(found, NotFound):
                raise found from error

    def route_by(self, netns_fd: int, network: Network, nic: Nic) -> None:
        """Have the default routes of the namespace go by `nic`, which is there; for one that had no other."""

        def add() -> None:
            index = socket.if_nametoindex(nic.name)
            with rtnl.Rtnl() as inner:
                for gateway in children.default_routes(network, nic):
                    inner.request(rtnl.new_default_route(index, gateway))

        try:
            namespaces.inside(netns_fd, add)
        except OSError as error:
            raise links.netlink_error(f"make the default route by {nic.name}", error) from error

    def publish(self, key: str, ports: Sequence[Port]) -> None:
        """Divert what arrives for `ports` (host_port chosen) to their targets, in addition to what `key` has published."""
        self._rules.publish(key, ports, loopback=self._passes_loopback(ports))
        conntrack.forget_udp(port.host_port for port in ports if port.protocol == "udp")

    def _passes_loopback(self, ports: Sequence[Port]) -> bool:
        """Whether the bridge on which all targets of `ports` are passes what goes to 127.0.0.1; it is made to if it can."""
        targets = {text for port in ports for text in port.targets if ":" not in text}
        for network, name, index in list(self._ready.values()):
            # a bridge that the user has named may be somebody else's
            if network.driver != "bridge" or network.options.get(links.OPTIONS[0]) or not ipam.holds(network.pools, targets):
                continue
            if network.id not in self._open:
                with self._lock:  # which is held long, by a removal
                    self._open[network.id] = loopback.open_way(self._netlink(), name, index)
            return self._open.get(network.id, False)
        return False

    def unpublish(self, key: str) -> None:
        """Forget every port of `key`; one without is no error."""
        conntrack.forget_udp(self._rules.unpublish(key))

    def counters(self, nic: Nic) -> dict[str, int]:
        """rx_bytes, rx_packets, rx_errors, rx_dropped, tx_... as the instance sees them; {} if the host has no end of it."""
        if not nic.host_link:
            return {}
        try:
            seen = self._netlink().counters(nic.host_link)
        except OSError:
            return {}
        other = {"rx": "tx", "tx": "rx"}  # what the host's end sends the instance receives
        return {f"{other[name[:2]]}{name[2:]}": value for name, value in seen.items()}

    def routes(self) -> list[str]:
        """Subnets that this host has routes to, IPv4 and IPv6, without default routes: for `ipam.choose`."""
        try:
            found = {text for family in (socket.AF_INET, socket.AF_INET6) for text in self._netlink().routes(family)}
        except OSError as error:
            raise links.netlink_error("list routes", error) from error
        return sorted(found.difference(_EVERY_LINK))

    def sweep(self, networks: Iterable[Network], keys: Collection[str]) -> None:
        """Drop links, rules and published ports of ours that none of `networks` and no instance of `keys` needs.

        A veth whose network stays is left alone: it goes with the namespace of its other end.
        """
        keep = {network.id: network for network in networks}
        with self._lock:
            self._ready = {name: value for name, value in self._ready.items() if name in keep}
            for network in keep.values():
                name = link_of(network, self.tag) if network.driver == "bridge" else ""
                if name and _index(name):  # its instances must not be without rules for a moment
                    self._rules.network(network.id, rules.of_network(network, name))
            with links.opened("sweep links") as route:
                links.remove_all_but(route, set(keep), self.tag)
            self._rules.keep_only(set(keep), keys)

    def sweep_ports(self, used: Callable[[], Collection[str]]) -> None:
        """Delete the host's ends of veths of ours but for those that `used` names, which is asked once they are listed: one
        that is being made meanwhile is known by then."""
        with links.opened("sweep links") as route:
            links.remove_ports(route, self.tag, used)

    def close_down(self) -> None:
        """Take away everything of ours: bridges, table, rules in foreign firewalls. Sysctls stay."""
        self.close()
        with self._lock:
            with links.opened("remove links") as route:
                links.remove_all_but(route, set(), self.tag)
            self._rules.close_down()
            if not self._rules.another():
                self._firewall.remove()

    def close(self) -> None:
        """Let go of the kernel; what is in it stays in force. The next call opens it again."""
        with self._lock:
            self._ready.clear()
            self._open.clear()
            ended, self._watch = self._watch, None
        if ended is not None:
            ended.close()  # without the lock, which its thread may wait for
        with self._socket_lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None
        self._firewall.close()
        self._rules.close()

    def _netlink(self) -> rtnl.Rtnl:
        with self._socket_lock:
            if self._socket is None:
                self._socket = rtnl.Rtnl()
            return self._socket


def _kind(network: Network) -> tuple[str, bool]:
    """What decides which parts of the kernel a bridge network needs: its families, and whether it is internal."""
    return " ".join(sorted({"6" if ":" in pool.subnet else "4" for pool in network.pools})), network.internal


def _index(name: str) -> int:
    """Index of a link, 0 when there is none."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0


def _configure(network: Network, nic: Nic) -> None:
    """Run inside the namespace. Raises OSError."""
    addresses = (*nic.addresses, *nic.extra)
    sysctl.prepare_link(nic.name, ipv6=any(address.family == 6 for address in addresses))
    index = socket.if_nametoindex(nic.name)
    messages = [rtnl.set_up(index)]
    messages += [rtnl.new_address(index, address.address, address.prefix) for address in addresses]
    if nic.default_route and not network.internal:
        gateways = children.default_routes(network, nic)
        messages += [rtnl.new_default_route(index, gateway) for gateway in gateways]
    with rtnl.Rtnl() as inner:
        inner.request(*messages)
    texts = [address.address for address in nic.addresses]
    if network.driver != "ipvlan" and nic.mac.lower() != ipam.mac(texts):  # one that follows from the address never changes
        announce.announce(nic.name, nic.mac, texts)
