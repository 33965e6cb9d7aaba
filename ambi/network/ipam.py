"""Which subnets and addresses are used: pure, nothing here looks at the kernel or a database.

The texts of refusals are those of Docker's clients and their tests; what one of them lacks follows after a colon.
"""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain

from ambi.core.errors import Forbidden, InvalidRequest, NotFound, Unavailable
from ambi.network.model import Pool

Subnet = ipaddress.IPv4Network | ipaddress.IPv6Network
Ip = ipaddress.IPv4Address | ipaddress.IPv6Address

# libnetwork's local pools: 172.17/16 to 172.31/16 without 172.16, then 192.168.0.0/16 in pieces of /20.
_DEFAULTS = [f"172.{n}.0.0/16" for n in range(17, 32)] + [f"192.168.{n}.0/20" for n in range(0, 256, 16)]
_ULA_PREFIX = 0xFD << 120  # RFC 4193, locally assigned
_PRIVATE = [ipaddress.ip_network(text) for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")]
_TRIES = 64


def subnet(text: str) -> Subnet:
    """The network that `text` names. Raises InvalidRequest, also for host bits that are set."""
    try:
        found = ipaddress.ip_network(text, strict=False)
    except ValueError as error:
        raise InvalidRequest(f"invalid subnet {text}: {error}", hint="write it as in 10.20.0.0/16") from error
    if "/" not in text:
        raise InvalidRequest(f"invalid subnet {text}: it has no prefix length", hint=f"did you mean {text}/24?")
    if ipaddress.ip_interface(text).ip != found.network_address:
        raise InvalidRequest(f"invalid subnet {text}: it should be {found}")
    return found


def address(text: str) -> Ip:
    """The address that `text` names. Raises InvalidRequest."""
    try:
        return ipaddress.ip_address(text)
    except ValueError as error:
        raise InvalidRequest(f"invalid IP address: {text}") from error


def is_private(text: str) -> bool:
    """Whether a subnet is among those of RFC 1918 and RFC 4193, all of whose addresses a link can have."""
    net = ipaddress.ip_network(text)
    return any(net.version == other.version and net.subnet_of(other) for other in _PRIVATE)  # type: ignore[arg-type]


def holds(pools: Iterable[Pool], addresses: Collection[str]) -> bool:
    """Whether there are addresses, and each is in one of the pools."""
    nets = [ipaddress.ip_network(pool.subnet) for pool in pools]
    return bool(addresses) and all(any(address(text) in net for net in nets) for text in addresses)


def choose(used: Iterable[str], family: int = 4) -> Pool:
    """A pool that overlaps nothing of `used` (subnets of the host's routes and of other networks): Docker's next default
    one, or for IPv6 a random /64 of fd00::/8. Raises NotFound when all are used, with docker's text."""
    busy = [found for found in _parsed(used) if found.version == family]
    for candidate in _candidates(family):
        if not any(candidate.overlaps(other) for other in busy):
            return Pool(str(candidate), str(candidate[1]))
    raise NotFound(
        f"could not find an available, non-overlapping IPv{family} address pool among the defaults to assign to the network",
        hint="name one: ambi network create --subnet 10.20.0.0/24 NAME; or remove unused ones: ambi network prune",
    )


def _candidates(family: int) -> Iterator[Subnet]:
    if family == 4:
        yield from (ipaddress.IPv4Network(text) for text in _DEFAULTS)
        return
    for _ in range(_TRIES):
        yield ipaddress.IPv6Network((_ULA_PREFIX | secrets.randbits(56) << 64, 64))


def _parsed(texts: Iterable[str]) -> Iterator[Subnet]:
    """Networks of route destinations; a default route, which everything overlaps, is left out."""
    for text in texts:
        found = ipaddress.ip_network(text, strict=False)
        if found.prefixlen:
            yield found


def check(pools: Sequence[Pool], used: Iterable[str]) -> tuple[Pool, ...]:
    """`pools` as the client asked for them, complete: addresses in their shortest form, a gateway in each.

    A gateway that is not given is the first address of the range that nothing reserves, else of the subnet.
    Raises InvalidRequest (syntax, something outside its subnet), Forbidden (overlap with `used`, or with one another).
    """
    busy = list(_parsed(used))
    done = []
    for pool in pools:
        net = subnet(pool.subnet)
        if any(net.version == other.version and net.overlaps(other) for other in busy):
            raise Forbidden(
                "Pool overlaps with other one on this address space",
                hint=f"{net} is used by a network or a route of this host: see `ip route` and `ambi network ls`",
            )
        busy.append(net)
        done.append(_complete(pool, net))
    return tuple(done)


def _complete(pool: Pool, net: Subnet) -> Pool:
    if net.prefixlen > net.max_prefixlen - 1:
        raise InvalidRequest(f"invalid subnet {net}: it has no room for a gateway and an instance")
    part = subnet(pool.range) if pool.range else net
    if part.version != net.version or not part.subnet_of(net):  # type: ignore[arg-type]
        raise InvalidRequest(f"invalid ip-range {part}: it is not inside the subnet {net}")
    reserved = {}
    for name, text in pool.reserved.items():
        ip = address(text)
        if ip not in net:
            raise InvalidRequest(f"invalid auxiliary address {text}: it is not inside the subnet {net}")
        reserved[name] = str(ip)
    if pool.gateway:
        gateway = address(pool.gateway)
        if gateway not in net:
            raise InvalidRequest(f"invalid gateway {pool.gateway}: it is not inside the subnet {net}")
    else:
        gateway = next((ip for ip in chain(_hosts(part), _hosts(net)) if str(ip) not in reserved.values()), net[0])
    if str(gateway) in reserved.values():
        raise Forbidden(f"failed to allocate gateway ({gateway}): Address already in use")
    return Pool(str(net), str(gateway), str(part) if pool.range else "", reserved)


def _span(net: Subnet) -> tuple[int, int]:
    """First and last number of `net` that an instance may have: not the network's own, not the broadcast address."""
    first, last = int(net.network_address), int(net.broadcast_address)
    if net.num_addresses <= 2:
        return first, last  # RFC 3021, RFC 6164
    return first + 1, last - 1 if net.version == 4 else last


def _hosts(net: Subnet) -> Iterator[Ip]:
    first, last = _span(net)
    kind = ipaddress.IPv4Address if net.version == 4 else ipaddress.IPv6Address
    return (kind(number) for number in range(first, last + 1))


def allocate(pool: Pool, taken: Collection[str], wanted: str | None = None, *, after: str = "") -> str:
    """An address of `pool` that is not in `taken`: `wanted`, or the next free one behind `after` (the last one given, so
    that an address is not used again at once), starting over at the range's end.

    `taken` need not hold the gateway and the reserved ones. Raises Forbidden (in use), InvalidRequest (outside the subnet),
    Unavailable (none left), each with docker's text.
    """
    held = {pool.gateway, *pool.reserved.values(), *taken}
    net = ipaddress.ip_network(pool.subnet)
    if wanted is not None:
        return _wanted(net, held, address(wanted))
    part = ipaddress.ip_network(pool.range) if pool.range else net
    outer_first, outer_last = _span(net)
    first, last = max(int(part.network_address), outer_first), min(int(part.broadcast_address), outer_last)
    start = int(ipaddress.ip_address(after)) + 1 if after else first
    if not first <= start <= last:
        start = first
    kind = ipaddress.IPv4Address if net.version == 4 else ipaddress.IPv6Address
    for number in chain(range(start, last + 1), range(first, start)):
        text = str(kind(number))
        if text not in held:
            return text
    raise Unavailable(
        f"no available IPv{net.version} addresses on this network's address pools: {pool.range or pool.subnet}",
        hint="remove instances, or make a network with a larger subnet",
    )


def _wanted(net: Subnet, held: Collection[str], ip: Ip) -> str:
    first, last = _span(net)
    if ip.version != net.version or not first <= int(ip) <= last:
        raise InvalidRequest(
            f"Requested address is out of range: {ip} is not an instance's address of {net}",
            hint=f"choose one between {net[0] + (first - int(net[0]))} and {net[0] + (last - int(net[0]))}",
        )
    if str(ip) in held:
        raise Forbidden(f"Address already in use: {ip}", hint="`ambi network inspect` shows who has it; choose another one")
    return str(ip)


def mac(addresses: Iterable[str], taken: Collection[str] = ()) -> str:
    """A MAC for a NIC: `02:42:` and the first IPv4 address, as Docker makes them, else random and not in `taken`."""
    for text in addresses:
        ip = ipaddress.ip_address(text)
        if ip.version == 4:
            return ":".join(f"{byte:02x}" for byte in (0x02, 0x42, *ip.packed))
    while True:
        octets = bytearray(secrets.token_bytes(6))
        octets[0] = octets[0] & 0xFC | 0x02  # locally administered, unicast
        made = ":".join(f"{byte:02x}" for byte in octets)
        if made not in taken:
            return made
