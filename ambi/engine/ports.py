"""Ports in Docker's words: ExposedPorts, PortBindings, PublishAllPorts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from ambi.core.errors import InvalidRequest
from ambi.core.words import is_address
from ambi.engine.body import Body
from ambi.engine.types import CreateSpec
from ambi.network.model import Port

PROTOCOLS = ("tcp", "udp", "sctp")


class Wanted(NamedTuple):
    """A port to publish. host_ports: the first free one of them is taken; `range(0, 1)` is any free one."""

    protocol: str
    port: int
    host_ip: str
    host_ports: range


def exposed(spec: CreateSpec) -> list[str]:
    """`80/tcp` of each exposed port, ranges spelled out. Raises InvalidRequest."""
    found: dict[str, None] = {}
    for text in Body("Config", spec.config).object("ExposedPorts").data:
        protocol, ports = parse(text)
        found.update((f"{port}/{protocol}", None) for port in ports)
    return list(found)


def wanted(spec: CreateSpec) -> list[Wanted]:
    """Everything that is to be published, in the order of the ports. Raises InvalidRequest."""
    host = Body("HostConfig", spec.host)
    bindings = host.object("PortBindings")
    found: list[Wanted] = []
    bound = set()
    for text in bindings.data:
        protocol, ports = parse(text)
        entries = bindings.objects(text)
        for place, port in enumerate(ports):
            bound.add(f"{port}/{protocol}")
            for entry in entries or [Body("PortBinding", {})]:
                found.append(_binding(entry, protocol, port, place, len(ports)))
    if host.flag("PublishAllPorts"):
        for text in exposed(spec):
            if text not in bound:
                number, _, protocol = text.partition("/")
                found.append(Wanted(protocol, int(number), "", range(1)))
    return sorted(found, key=lambda w: (w.port, w.protocol))


def _binding(entry: Body, protocol: str, port: int, place: int, count: int) -> Wanted:
    host_ip = entry.text("HostIp").strip("[]")
    if host_ip and not is_address(host_ip):
        raise InvalidRequest(f"invalid IP address in add-port: '{host_ip}'", hint="-p 127.0.0.1:8080:80")
    text = entry.text("HostPort")
    host_ports = number_range(text, zero=True) if text else range(1)
    if count > 1 and len(host_ports) == count:
        host_ports = host_ports[place : place + 1]
    return Wanted(protocol, port, host_ip, host_ports)


def parse(text: str) -> tuple[str, range]:
    """Protocol and ports of `80/tcp`, `53/udp`, `8000-8010`. Raises InvalidRequest."""
    numbers, slash, protocol = text.partition("/")
    protocol = protocol.lower() if slash else "tcp"
    if protocol not in PROTOCOLS:
        raise InvalidRequest(f"invalid port specification: '{text}': invalid protocol: {protocol}", hint="tcp, udp or sctp")
    return protocol, number_range(numbers)


def number_range(text: str, *, zero: bool = False) -> range:
    """`80` or `8000-8010`. zero: 0 is allowed. Raises InvalidRequest."""
    first, dash, last = text.partition("-")
    numbers = [int(part) for part in (first, last if dash else first) if part.isascii() and part.isdigit() and len(part) < 6]
    if len(numbers) != 2 or not (0 if zero else 1) <= numbers[0] <= numbers[1] < 65536:
        raise InvalidRequest(f"invalid port specification: '{text}'", hint="a port looks like 80 or 8000-8010")
    return range(numbers[0], numbers[1] + 1)


def port_map(spec: CreateSpec, published: tuple[Port, ...]) -> dict[str, list[dict[str, str]] | None]:
    """NetworkSettings.Ports: what is exposed, with where it is published, null for nowhere."""
    found: dict[str, list[dict[str, str]] | None] = dict.fromkeys(exposed(spec))
    for port, host_ip in _shown(published):
        entry = {"HostIp": host_ip, "HostPort": str(port.host_port)}
        found[f"{port.port}/{port.protocol}"] = [*(found.get(f"{port.port}/{port.protocol}") or ()), entry]
    return found


def port_list(spec: CreateSpec, published: tuple[Port, ...]) -> list[dict[str, Any]]:
    """`Ports` of a row of `/containers/json`."""
    rows: list[dict[str, Any]] = [
        {"IP": ip, "PrivatePort": port.port, "PublicPort": port.host_port, "Type": port.protocol}
        for port, ip in _shown(published)
    ]
    public = {(port.port, port.protocol) for port in published}
    for text in exposed(spec):
        number, _, protocol = text.partition("/")
        if (int(number), protocol) not in public:
            rows.append({"PrivatePort": int(number), "Type": protocol})
    return rows


def _shown(published: tuple[Port, ...]) -> Iterator[tuple[Port, str]]:
    """A port of every address counts as one of each family."""
    for port in published:
        if port.host_ip:
            yield port, port.host_ip
        else:
            yield port, "0.0.0.0"
            yield port, "::"
