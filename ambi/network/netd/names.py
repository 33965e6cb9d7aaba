"""Who has which name on which network: the table that netd answers from. Pure."""

from __future__ import annotations

import ipaddress
import random
from typing import NamedTuple


class NamedEndpoint(NamedTuple):
    """An instance on a network.

    names: what others call it: its name, aliases, short id. links: its private aliases of others, alias to instance id.
    servers: resolvers of its own (`--dns`) for everything that is not here.
    """

    instance: str
    names: tuple[str, ...]
    addresses: tuple[str, ...]
    links: dict[str, str] = {}
    servers: tuple[str, ...] = ()


class NetworkNames(NamedTuple):
    """A network that is answered for. bridge: the link on which its members ask. gateways: where netd listens.

    internal: nothing is forwarded for those who are on internal networks alone.
    """

    name: str
    bridge: str
    gateways: tuple[str, ...]
    subnets: tuple[str, ...]
    internal: bool = False
    endpoints: tuple[NamedEndpoint, ...] = ()

    @classmethod
    def from_wire(cls, body: list[object]) -> NetworkNames:
        """Raises TypeError or ValueError."""
        name, bridge, gateways, subnets, internal, endpoints = body
        rows = [
            NamedEndpoint(str(i), tuple(map(str, n)), tuple(map(str, a)), dict(links), tuple(map(str, servers)))
            for i, n, a, links, servers in endpoints  # type: ignore[attr-defined]
        ]
        lists = [tuple(map(str, x)) for x in (gateways, subnets)]  # type: ignore[call-overload]
        return cls(str(name), str(bridge), lists[0], lists[1], bool(internal), tuple(rows))


class Asker(NamedTuple):
    """Who asks, as far as it matters. networks: ids of all that it is on."""

    instance: str
    networks: tuple[str, ...]
    servers: tuple[str, ...]
    internal: bool  # it is on internal networks alone


class NameTable:
    """All networks by their ids."""

    def __init__(self) -> None:
        self._networks: dict[str, NetworkNames] = {}
        self._by_name: dict[str, dict[str, list[NamedEndpoint]]] = {}  # network id, name in lower case
        self._by_address: dict[str, dict[str, NamedEndpoint]] = {}  # network id, address
        self._subnets: dict[str, list[ipaddress.IPv4Network | ipaddress.IPv6Network]] = {}

    @property
    def networks(self) -> dict[str, NetworkNames]:
        return self._networks

    def put(self, id: str, names: NetworkNames) -> None:
        """Raises ValueError for a subnet that is none."""
        self._subnets[id] = [ipaddress.ip_network(x) for x in names.subnets]
        self._networks[id] = names
        by_name: dict[str, list[NamedEndpoint]] = {}
        for endpoint in names.endpoints:
            for name in dict.fromkeys(x.lower() for x in endpoint.names):
                by_name.setdefault(name, []).append(endpoint)
        self._by_name[id] = by_name
        self._by_address[id] = {address: endpoint for endpoint in names.endpoints for address in endpoint.addresses}

    def drop(self, id: str) -> None:
        self._networks.pop(id, None)
        self._by_name.pop(id, None)
        self._by_address.pop(id, None)
        self._subnets.pop(id, None)

    def asker(self, network: str, address: str) -> Asker | None:
        """Who has `address` on `network`; None for a stranger."""
        endpoint = self._by_address.get(network, {}).get(address)
        if endpoint is None:
            return None
        own = tuple(
            id for id, names in self._networks.items() if any(e.instance == endpoint.instance for e in names.endpoints)
        )
        internal = all(self._networks[id].internal for id in own)
        return Asker(endpoint.instance, own, endpoint.servers, internal)

    def addresses(self, asker: Asker, name: str) -> list[str] | None:
        """Addresses of `name` (lower case, without the last dot) as `asker` sees it, shuffled; None when nobody has it."""
        found = self._linked(asker, name)
        for id in asker.networks:
            endpoints = self._by_name[id].get(name)
            suffix = f".{self._networks[id].name.lower()}"
            if endpoints is None and name.endswith(suffix):
                endpoints = self._by_name[id].get(name.removesuffix(suffix))
            found += [address for endpoint in endpoints or () for address in endpoint.addresses]
        random.shuffle(found)
        return list(dict.fromkeys(found)) or None

    def _linked(self, asker: Asker, name: str) -> list[str]:
        found: list[str] = []
        for id in asker.networks:
            names = self._networks[id]
            own = next((e for e in names.endpoints if e.instance == asker.instance), None)
            target = next((to for alias, to in own.links.items() if alias.lower() == name), None) if own else None
            if target is not None:
                found += [a for e in names.endpoints if e.instance == target for a in e.addresses]
        return found

    def name_of(self, asker: Asker, address: str) -> str | None:
        """The name behind an address, `web.mynet`; "" for one in a network of the asker that nobody has, None elsewhere."""
        known = False
        for id in asker.networks:
            endpoint = self._by_address[id].get(address)
            if endpoint is not None and endpoint.names:
                return f"{endpoint.names[0]}.{self._networks[id].name}"
            ip = ipaddress.ip_address(address)
            known = known or any(ip in subnet for subnet in self._subnets[id] if subnet.version == ip.version)
        return "" if known else None
