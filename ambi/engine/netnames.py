"""Names: what netd answers for, and what an instance's own /etc/hosts and /etc/resolv.conf say of its networks."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

from ambi.core.errors import AmbiError, Conflict, NotFound
from ambi.core.plan import LaunchPlan
from ambi.core.roots import Roots
from ambi.engine import linkenv, ports
from ambi.engine.endpoints import split_link
from ambi.engine.netstate import Endpoint
from ambi.engine.records import Record
from ambi.network.host import link_of
from ambi.network.model import DEFAULT_NETWORK, Network

if TYPE_CHECKING:
    from ambi.engine.core import Core
    from ambi.engine.networks import Networks
    from ambi.network.netd.client import NamedEndpoint, Netd

log = logging.getLogger(__name__)

FILES = ("/etc/hostname", "/etc/hosts", "/etc/resolv.conf")


class Names(NamedTuple):
    """What the files of a run say.

    own: its addresses. links: address and names of each instance that it is linked to on the default bridge.
    servers: the gateways that answer for its networks, () for the host's own resolvers. gateway: what `host-gateway` means.
    whole: path to content of files that are taken over from another instance. env: variables of the links, see linkenv.
    """

    own: tuple[str, ...] = ()
    links: tuple[tuple[str, str], ...] = ()
    servers: tuple[str, ...] = ()
    gateway: str = ""
    whole: dict[str, str] = {}
    env: tuple[str, ...] = ()


def of(networks: Networks, record: Record) -> Names:
    """For the endpoints that `record` has now."""
    endpoints = [e for e in networks.state(record).endpoints if e.nic is not None]
    own = tuple(a.address for e in endpoints if e.nic for a in e.nic.addresses)
    servers: tuple[str, ...] = ()
    links: list[tuple[str, str]] = []
    env: list[str] = []
    for endpoint in endpoints:
        network = networks.find(endpoint.network)
        if network.name == DEFAULT_NETWORK:
            for alias, other, address in _default_links(networks, record, endpoint):
                words = dict.fromkeys((alias, other.row.spec.config.get("Hostname") or other.id[:12], other.name))
                links.append((address, " ".join(words)))
                own = other.row.spec.config.get("Env") or ()
                env += linkenv.variables(record.name, alias, address, ports.exposed(other.row.spec), own)
        if not servers and serves(network):
            servers = tuple(pool.gateway for pool in network.pools[:2])
    gateways = [a.gateway for e in endpoints if e.nic and e.nic.default_route for a in e.nic.addresses if a.gateway]
    wanted = any("host-gateway" in text for text in record.row.spec.host.get("ExtraHosts") or ())
    gateway = gateways[0] if gateways else networks.default().pools[0].gateway if wanted else ""
    return Names(own, tuple(links), servers, gateway, env=tuple(env))


def env_of(networks: Networks, record: Record) -> tuple[str, ...]:
    """The variables of the links that an exec has, too; () when one of them leads nowhere now."""
    if not record.row.spec.host.get("Links"):
        return ()
    try:
        return of(networks, record).env
    except AmbiError as error:
        log.info("%s: its links: %s", record.id[:12], error)
        return ()


def _default_links(networks: Networks, record: Record, endpoint: Endpoint) -> list[tuple[str, Record, str]]:
    """On the default bridge a link is a line of /etc/hosts and some variables, and what it names must run: alias, whom it
    names, and the address of that."""
    found = []
    for text in endpoint.links:
        name, alias = split_link(text)
        other = linked(networks, name)
        there = networks.state(other).find(DEFAULT_NETWORK)
        if there is None:
            raise Conflict(f"Cannot link to /{other.name}, as it does not belong to the default network")
        if there.nic is None:
            raise Conflict(f"Cannot link to a non running container: /{other.name} AS /{record.name}/{alias}")
        found.append((alias, other, there.nic.addresses[0].address))
    return found


def linked(networks: Networks, name: str) -> Record:
    """The instance that a link names. Raises NotFound with Docker's text."""
    try:
        return networks.registry.find(name)
    except NotFound as error:
        raise NotFound(f"could not get container for {name}: {error.message}", hint="`ambi ps -a` lists them") from error


def shared_with(core: Core, other: Record) -> Names:
    """The files of an instance whose network namespace is used."""
    plan = LaunchPlan.load(core.roots.instance_data(other.id))
    return Names(whole={str(file.path): file.content for file in plan.files if str(file.path) in FILES})


def names_of(record: Record, endpoint: Endpoint) -> list[str]:
    """What an instance is called on a network: name, aliases, short id, host name; each once."""
    host = str(record.row.spec.config.get("Hostname") or "")
    return list(dict.fromkeys([record.name, *endpoint.aliases, record.id[:12], *([host] if host else [])]))


class NameService:
    """netd, started when the first network needs it."""

    def __init__(self, roots: Roots, tag: str) -> None:
        self._roots, self._tag = roots, tag
        self._lock = threading.Lock()
        self._telling = threading.Lock()  # so that what is told last is what is so
        self._netd: Netd | None = None

    def netd(self) -> Netd:
        from ambi.network.netd.client import Netd

        with self._lock:
            if self._netd is None:
                self._netd = Netd(self._roots)
            return self._netd

    def warm_up(self) -> None:
        """Have it run before somebody waits for it."""
        threading.Thread(target=self._warm, name="warm-netd", daemon=True).start()

    def _warm(self) -> None:
        try:
            self.netd().warm_up()
        except AmbiError as error:
            log.warning("%s", error)

    def tell(self, network: Network, live: Callable[[], Iterable[tuple[Record, Endpoint]]]) -> None:
        """Have it answer for `live()` on `network`.

        That it cannot is logged: the instances do without, and it is told again when it runs.
        """
        if not serves(network):
            return
        from ambi.network.netd.client import NetworkNames

        try:
            with self._telling:
                members = list(live())
                rows = tuple(_named(network, record, endpoint, members) for record, endpoint in members)
                gateways = tuple(pool.gateway for pool in network.pools)
                subnets = tuple(pool.subnet for pool in network.pools)
                bridge = link_of(network, self._tag)
                table = NetworkNames(network.name, bridge, gateways, subnets, network.internal, rows)
                self.netd().network(network.id, table)
        except AmbiError as error:
            log.error("names on network %s: %s", network.name, error)

    def forget(self, network_id: str) -> None:
        """The network is gone."""
        try:
            with self._telling:
                self.netd().network(network_id, None)
        except AmbiError as error:
            log.error("names of network %s: %s", network_id[:12], error)

    def keep(self, networks: list[str], keys: list[str]) -> None:
        """Drop what a netd still serves that has outlived an engine. One that does not run has nothing."""
        if self._roots.netd_socket.exists():
            self.netd().keep(networks, keys)

    def close(self, *, idle: bool) -> None:
        """Let go of it; it serves on unless nothing runs."""
        if self._netd is not None or (idle and self._roots.netd_socket.exists()):
            self.netd().close(stop=idle)


def serves(network: Network) -> bool:
    """Whether the gateway answers for names. On the default bridge there are none, as with Docker: it has the host's
    resolvers, and the gateway forwards only where those can be reached by the host alone."""
    return network.driver == "bridge" and (network.name != DEFAULT_NETWORK or only_local_resolvers())


def only_local_resolvers() -> bool:
    try:
        with open("/etc/resolv.conf", encoding="utf-8", errors="replace") as file:
            servers = [words[1] for words in map(str.split, file) if len(words) > 1 and words[0] == "nameserver"]
    except OSError:
        servers = []
    return all(server.startswith("127.") or server == "::1" for server in servers)


def _named(network: Network, record: Record, endpoint: Endpoint, members: list[tuple[Record, Endpoint]]) -> NamedEndpoint:
    from ambi.network.netd.client import NamedEndpoint

    addresses = tuple(a.address for a in endpoint.nic.addresses) if endpoint.nic else ()
    servers = tuple(record.row.spec.host.get("Dns") or ())
    if network.name == DEFAULT_NETWORK:
        return NamedEndpoint(record.id, (), addresses, {}, servers)
    links = {}
    for text in endpoint.links:
        name, alias = split_link(text)
        for other, _ in members:
            if name in (other.name, other.id) or other.id.startswith(name):
                links[alias] = str(other.id)
    return NamedEndpoint(record.id, tuple(names_of(record, endpoint)), addresses, links, servers)
