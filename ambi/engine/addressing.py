"""From an endpoint that is asked for to an interface: name, addresses, MAC."""

from __future__ import annotations

import secrets
from collections.abc import Iterable

from ambi.core.errors import AmbiError, Forbidden, InvalidRequest
from ambi.engine.netstate import Endpoint
from ambi.network.model import Address, Network, Nic, Pool

MTU_OPTION = "com.docker.network.driver.mtu"
_MTU = 1500


class Addresses:
    """Where the last address of each pool was given, so that one is not used again at once. Under its owner's lock."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, str], str] = {}

    def forget(self, network_id: str) -> None:
        self._last = {key: value for key, value in self._last.items() if key[0] != network_id}

    def give(
        self, endpoint: Endpoint, network: Network, others: Iterable[Endpoint], own: Iterable[Endpoint], id: str
    ) -> Endpoint:
        """`endpoint` with an id and an interface on `network`.

        others: every endpoint there is but this one. own: those of the same instance.
        Raises what ipam.allocate does, and InvalidRequest for an address on a network without a subnet of the user's.
        """
        from ambi.network import ipam

        there = [e for e in others if e.network == network.id or (not e.network and e.name == network.name)]
        taken = {a.address for e in there if e.nic is not None for a in e.nic.addresses}
        kept = {a for e in there if e.nic is None for a in (e.fixed(4), e.fixed(6)) if a}  # of instances that do not run
        _check_fixed(endpoint, network)
        found = []
        for family in (4, 6):
            pools = [pool for pool in network.pools if (":" in pool.subnet) == (family == 6)]
            if pools:
                found.append(self._address(network, pools, taken, kept, endpoint.fixed(family), family))
        names = {e.nic.name for e in own if e.nic is not None}
        name = next(f"eth{n}" for n in range(len(names) + 1) if f"eth{n}" not in names)
        macs = {e.nic.mac for e in there if e.nic is not None}
        asked = (endpoint.asked.get("MacAddress") or "").lower().replace("-", ":")
        if asked in macs:
            raise Forbidden(f"MAC address {asked} is already in use on network {network.name}", hint="choose another one")
        nic = Nic(
            network=network.id,
            name=name,
            mac=asked or ipam.mac([a.address for a in found], macs),
            mtu=int(network.options.get(MTU_OPTION) or _MTU),
            addresses=tuple(found),
            host_link=f"vea{secrets.token_hex(6)}" if network.driver == "bridge" else "",
            default_route=not network.internal and not any(e.nic and e.nic.default_route for e in own),
            extra=tuple(Address(6, text, 64) if ":" in text else Address(4, text, 16) for text in endpoint.link_local),
        )
        return endpoint._replace(network=network.id, id=id, nic=nic)

    def _address(
        self, network: Network, pools: list[Pool], taken: set[str], kept: set[str], wanted: str | None, family: int
    ) -> Address:
        """One of the first pool that has one; a wanted one of the pool that it is in."""
        from ambi.network import ipam

        failure: AmbiError | None = None
        for pool in pools:
            subnet = ipam.subnet(pool.subnet)
            if wanted is not None and ipam.address(wanted) not in subnet:
                continue
            key = (network.id, pool.subnet)
            try:
                if wanted is not None:
                    text = ipam.allocate(pool, taken, wanted)
                else:
                    text = self._next(pool, taken, kept, key)
            except AmbiError as error:
                failure = error
                continue
            gateway = "" if network.internal else pool.gateway
            return Address(family, text, subnet.prefixlen, gateway)
        if failure is not None:
            raise failure
        raise InvalidRequest(
            f"no configured subnet contains IP address {wanted}",
            hint=f"the subnets of {network.name}: {', '.join(pool.subnet for pool in pools)}",
        )

    def _next(self, pool: Pool, taken: set[str], kept: set[str], key: tuple[str, str]) -> str:
        """The next free one that nobody will want back; one that somebody will when there is no other."""
        from ambi.network import ipam

        after = self._last.get(key, "")
        try:
            text = ipam.allocate(pool, taken | kept, after=after)
        except AmbiError:
            text = ipam.allocate(pool, taken, after=after)
        self._last[key] = text
        return text


def _check_fixed(endpoint: Endpoint, network: Network) -> None:
    asked = [endpoint.fixed(4), endpoint.fixed(6)]
    if not any(asked):
        return
    configured = (network.asked.get("Config") or []) if network.asked else []
    if not any(entry.get("Subnet") for entry in configured):
        raise InvalidRequest(
            "user specified IP address is supported only when connecting to networks with user configured subnets",
            hint=f"make the network with one: ambi network create --subnet 10.20.0.0/24 {network.name}",
        )
    if endpoint.fixed(6) and not any(":" in pool.subnet for pool in network.pools):
        raise InvalidRequest(f"network {network.name} has no IPv6 subnet", hint="make it with --ipv6")
