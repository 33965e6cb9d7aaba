"""The flags of networks and ports, as docker's objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ambi.core.errors import InvalidRequest
from ambi.core.words import is_address

PROTOCOLS = ("tcp", "udp", "sctp")
_BUILTIN = ("default", "bridge", "host", "none")
_NETWORK_KEYS = ("name", "alias", "ip", "ip6", "mac-address", "driver-opt", "link-local-ip", "gw-priority")


def endpoint(**asked: Any) -> dict[str, Any]:
    """Docker's EndpointSettings, with its neutral value for all that is not asked for."""
    return {
        "IPAMConfig": None, "Links": None, "Aliases": None, "MacAddress": "", "DriverOpts": None, "GwPriority": 0,
        "NetworkID": "", "EndpointID": "", "Gateway": "", "IPAddress": "", "IPPrefixLen": 0, "IPv6Gateway": "",
        "GlobalIPv6Address": "", "GlobalIPv6PrefixLen": 0, "DNSNames": None, **asked,
    }  # fmt: skip


def attachments(flags: dict[str, Any]) -> tuple[str, dict[str, dict[str, Any]]]:
    """(NetworkMode, EndpointsConfig) of `--network` and the flags that belong to the first one."""
    networks = [_network(text) for text in flags["network"] or ("default",)]
    mode, first = networks[0]
    _simple_flags(flags, mode, first)
    names = [name for name, _ in networks]
    for name in names:
        if names.count(name) > 1:
            raise InvalidRequest(f'network "{name}" is specified multiple times', hint="name each network once")
        if len(names) > 1 and (name in ("host", "none") or name.startswith("container:")):
            raise InvalidRequest(
                "conflicting options: cannot attach both user-defined and non-user-defined network-modes",
                hint=f"leave --network {name} out, or the others",
            )
    if mode in ("none", "host") or mode.startswith("container:"):
        return mode, {}
    if len(networks) == 1 and not first and mode != "default":
        return mode, {}
    return mode, {name: endpoint(**asked) for name, asked in sorted(networks)}


def _simple_flags(flags: dict[str, Any], mode: str, first: dict[str, Any]) -> None:
    """Put `--ip` and its like into what the first network is asked for."""
    ipam: dict[str, Any] = {}
    for flag, key in (("ip", "IPv4Address"), ("ip6", "IPv6Address")):
        if text := flags[flag]:
            ipam[key] = checked_address(f"--{flag}", text, six=flag == "ip6")
    if given := flags["link_local_ip"]:
        ipam["LinkLocalIPs"] = [checked_address("--link-local-ip", text, six=":" in text) for text in given]
    own: dict[str, Any] = {
        "IPAMConfig": ipam or None,
        "Aliases": list(flags["network_alias"]) or None,
        "MacAddress": flags["mac_address"] or None,
        "Links": list(flags["link"]) if mode not in _BUILTIN else None,
    }
    for key, value in own.items():
        if value and first.get(key):
            raise InvalidRequest(
                f"conflicting options: cannot specify {key} both with a flag of its own and in --network",
                hint="say it once",
            )
        if value:
            first[key] = value


def _network(text: str) -> tuple[str, dict[str, Any]]:
    """Name and settings of `NAME` or of `name=NAME,alias=a,ip=192.0.2.1,...`."""
    if "=" not in text:
        return text, {}
    name = ""
    found: dict[str, Any] = {}
    ipam: dict[str, Any] = {}
    aliases: list[str] = []
    options: dict[str, str] = {}
    for part in text.split(","):
        key, separator, value = part.partition("=")
        key = key.strip().lower()
        if not separator or key not in _NETWORK_KEYS:
            raise InvalidRequest(f"invalid field {part} in --network", hint=f"fields: {', '.join(_NETWORK_KEYS)}")
        match key:
            case "name":
                name = value
            case "alias":
                aliases.append(value)
            case "ip":
                ipam["IPv4Address"] = checked_address("--network ip", value, six=False)
            case "ip6":
                ipam["IPv6Address"] = checked_address("--network ip6", value, six=True)
            case "mac-address":
                found["MacAddress"] = value
            case "gw-priority":
                found["GwPriority"] = _priority(value)
            case "link-local-ip":
                checked = checked_address("--network link-local-ip", value, six=":" in value)
                ipam["LinkLocalIPs"] = [*ipam.get("LinkLocalIPs", ()), checked]
            case _:
                option, _, setting = value.partition("=")
                options[option] = setting
    if not name:
        raise InvalidRequest(f"--network {text} names no network", hint="--network name=NETWORK,alias=ALIAS")
    lists = {"Aliases": aliases, "IPAMConfig": ipam, "DriverOpts": options}
    return name, {**found, **{key: value for key, value in lists.items() if value}}


def _priority(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InvalidRequest(f"invalid gw-priority ({text}) in --network", hint="a whole number") from None


def checked_address(flag: str, text: str, *, six: bool) -> str:
    if not is_address(text) or (":" in text) != six:
        example = "2001:db8::5" if six else "192.0.2.5"
        raise InvalidRequest(f"invalid value for {flag}: '{text}' is no IPv{6 if six else 4} address", hint=f"as {example}")
    return text


def ports(publish: Sequence[str], expose: Sequence[str]) -> tuple[dict[str, Any], dict[str, list[dict[str, str]]]]:
    """(ExposedPorts, PortBindings) of `-p` and `--expose`. Raises InvalidRequest."""
    bindings: dict[str, list[dict[str, str]]] = {}
    exposed: dict[str, Any] = {}
    for text in publish:
        for port, binding in _published(_long_form(text) if "=" in text else text):
            bindings.setdefault(port, []).append(binding)
            exposed[port] = {}
    for text in expose:
        numbers, protocol = _protocol(text, text)
        if ":" in text:
            raise InvalidRequest(f"invalid port format for --expose: {text}", hint="as --expose 80 or --expose 53/udp")
        exposed.update((f"{n}/{protocol}", {}) for n in _range(numbers, text))
    return exposed, bindings


def _long_form(text: str) -> str:
    """`[IP:]PUBLISHED:TARGET/PROTOCOL` of `target=80,published=8080,protocol=tcp`."""
    fields = dict(part.partition("=")[::2] for part in text.split(","))
    unknown = [key for key in fields if key not in ("target", "published", "protocol", "mode")]
    if unknown or not fields.get("target"):
        raise InvalidRequest(f"invalid port specification: {text}", hint="target=80,published=8080,protocol=tcp")
    return f"{fields.get('published', '')}:{fields['target']}/{fields.get('protocol') or 'tcp'}"


def _published(text: str) -> list[tuple[str, dict[str, str]]]:
    """Port inside and where it is published, of `[[IP:][HOST]:]PORT[/PROTOCOL]` with ranges."""
    whole, protocol = _protocol(text, text)
    rest, _, inside = whole.rpartition(":")
    host_ip, _, outside = rest.rpartition(":")
    if host_ip.startswith("[") and host_ip.endswith("]"):
        host_ip = host_ip[1:-1]
    if host_ip and not is_address(host_ip):
        raise InvalidRequest(f"invalid IP address: {host_ip}", hint="as -p 127.0.0.1:8080:80 or -p [::1]:8080:80")
    numbers = _range(inside, text)
    outer = _range(outside, text) if outside and outside != "0" else range(0)
    if outer and len(outer) != len(numbers) and len(numbers) > 1:
        raise InvalidRequest(
            f"invalid ranges specified for container and host Ports: {inside} and {outside}",
            hint="both have the same length, or the container's is one port",
        )
    found = []
    for place, number in enumerate(numbers):
        if len(outer) == len(numbers):
            host = str(outer[place])
        else:
            host = f"{outer[0]}-{outer[-1]}" if outer else ""
        found.append((f"{number}/{protocol}", {"HostIp": host_ip, "HostPort": host}))
    return found


def _protocol(text: str, whole: str) -> tuple[str, str]:
    numbers, slash, protocol = text.partition("/")
    protocol = protocol.lower() if slash else "tcp"
    if protocol not in PROTOCOLS:
        raise InvalidRequest(f"invalid proto in port {whole}: {protocol}", hint="tcp, udp or sctp")
    return numbers, protocol


def _range(text: str, whole: str) -> range:
    first, dash, last = text.partition("-")
    parts = (first, last if dash else first)
    if not all(part.isascii() and part.isdigit() and 0 < int(part[:6]) < 65536 for part in parts):
        raise InvalidRequest(f"invalid port specification: {whole}", hint="as -p 8080:80, -p 127.0.0.1:8080:80, -p 80/udp")
    if int(parts[0]) > int(parts[1]):
        raise InvalidRequest(f"invalid port specification: {whole}: the range ends before it begins")
    return range(int(parts[0]), int(parts[1]) + 1)
