"""Names: what netd answers for, and what an instance's own /etc/hosts and /etc/resolv.conf say of its networks."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from ambi.core.errors import Conflict, NotFound
from ambi.core.plan import LaunchPlan
from ambi.core.roots import Roots
from ambi.engine.endpoints import split_link
from ambi.engine.netstate import Endpoint
from ambi.engine.records import Record
from ambi.network.model import DEFAULT_NETWORK, Network

if TYPE_CHECKING:
    from ambi.engine.core import Core
    from ambi.engine.networks import Networks
    from ambi.network.netd.client import Netd

log = logging.getLogger(__name__)

FILES = ("/etc/hostname", "/etc/hosts", "/etc/resolv.conf")


class Names(NamedTuple):
    """What the files of a run say.

    own: its addresses. links: address and names of each instance that it is linked to on the default bridge.
    servers: the gateways that answer for its networks, () for the host's own resolvers. gateway: what `host-gateway` means.
    whole: path to content of files that are taken over from another instance.
    """

    own: tuple[str, ...] = ()
    links: tuple[tuple[str, str], ...] = ()
    servers: tuple[str, ...] = ()
    gateway: str = ""
    whole: dict[str, str] = {}


def of(networks: Networks, record: Record) -> Names:
    """For the endpoints that `record` has now."""
    endpoints = [e for e in networks.state(record).endpoints if e.nic is not None]
    own = tuple(a.address for e in endpoints if e.nic for a in e.nic.addresses)
    servers: tuple[str, ...] = ()
    links: list[tuple[str, str]] = []
    for endpoint in endpoints:
        network = networks.find(endpoint.network)
        if network.name == DEFAULT_NETWORK:
            links += _default_links(networks, record, endpoint)
        elif not servers:
            servers = tuple(pool.gateway for pool in network.pools[:2])
    gateways = [a.gateway for e in endpoints if e.nic and e.nic.default_route for a in e.nic.addresses if a.gateway]
    wanted = any("host-gateway" in text for text in record.row.spec.host.get("ExtraHosts") or ())
    gateway = gateways[0] if gateways else networks.default().pools[0].gateway if wanted else ""
    return Names(own, tuple(links), servers, gateway)


def _default_links(networks: Networks, record: Record, endpoint: Endpoint) -> list[tuple[str, str]]:
    """On the default bridge a link is a line of /etc/hosts, and what it names must run."""
    found = []
    for text in endpoint.links:
        name, alias = split_link(text)
        other = linked(networks, name)
        there = networks.state(other).find(DEFAULT_NETWORK)
        if there is None or there.nic is None:
            raise Conflict(f"Cannot link to a non running container: /{other.name} AS /{record.name}/{alias}")
        words = dict.fromkeys((alias, other.row.spec.config.get("Hostname") or other.id[:12], other.name))
        found.append((there.nic.addresses[0].address, " ".join(words)))
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

    def __init__(self, roots: Roots) -> None:
        self._roots = roots
        self._lock = threading.Lock()
        self._netd: Netd | None = None

    def netd(self) -> Netd:
        from ambi.network.netd.client import Netd

        with self._lock:
            if self._netd is None:
                self._netd = Netd(self._roots)
            return self._netd

    def warm_up(self) -> None:
        """Have it run before somebody waits for it."""

    def tell(self, network: Network, live: Iterable[tuple[Record, Endpoint]]) -> None:
        """Have it answer for `live` on `network`. That it cannot is logged: an instance does without, and it is told again
        when it runs."""
        if network.name == DEFAULT_NETWORK or network.driver != "bridge":
            return

    def forget(self, network_id: str) -> None:
        """The network is gone."""

    def close(self, *, idle: bool) -> None:
        """Let go of it; it serves on unless nothing runs."""
