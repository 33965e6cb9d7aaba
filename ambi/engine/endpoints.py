"""What an instance asks of its networks, read from Docker's JSON and checked."""

from __future__ import annotations

from typing import Any

from ambi.core.errors import InvalidRequest
from ambi.core.model import Isolation
from ambi.core.words import is_address
from ambi.engine.body import Body
from ambi.engine.netstate import Endpoint
from ambi.engine.types import CreateSpec
from ambi.network.model import DEFAULT_NETWORK

SHARED = "container:"
_DEFAULTS = ("", "default", DEFAULT_NETWORK)
# What an instance has at run time may come back in a request, and is not looked at.
_WORKS = """
    IPAMConfig Links Aliases MacAddress DriverOpts NetworkID EndpointID Gateway IPAddress IPPrefixLen IPv6Gateway
    GlobalIPv6Address GlobalIPv6PrefixLen DNSNames GwPriority
"""
_SUPPORTED = frozenset(_WORKS.split())


def mode_of(host: dict[str, Any]) -> str:
    """HostConfig.NetworkMode with one name for the default: `bridge`, `none`, `host`, `container:X` or a network's name."""
    mode = host.get("NetworkMode") or ""
    return DEFAULT_NETWORK if mode in _DEFAULTS else mode


def asked_for(spec: CreateSpec) -> tuple[Endpoint, ...]:
    """The endpoints that a new instance asks for: the network of its mode first, then the others by name."""
    mode = mode_of(spec.host)
    if mode in ("none", "host") or mode.startswith(SHARED):
        return ()
    given = dict(Body("NetworkingConfig", spec.networking).object("EndpointsConfig").data)
    first: dict[str, Any] = {}
    for name in (mode, *(_DEFAULTS if mode == DEFAULT_NETWORK else ())):
        first = given.pop(name, None) or first
    if mac := spec.config.get("MacAddress"):
        first = {"MacAddress": mac, **{k: v for k, v in first.items() if v}}
    links = list(spec.host.get("Links") or ())
    if links:
        first = {**first, "Links": list(dict.fromkeys([*(first.get("Links") or ()), *links]))}
    found = [Endpoint(mode, first), *(Endpoint(name, given[name] or {}) for name in sorted(given))]
    return tuple(sorted(found, key=lambda e: -int(e.asked.get("GwPriority") or 0)))  # stable


def check(spec: CreateSpec, isolation: Isolation) -> None:
    """Refuse what can never be, in Docker's words. Raises InvalidRequest."""
    host, config = Body("HostConfig", spec.host), Body("Config", spec.config)
    mode = mode_of(host.data)
    if config.text("MacAddress"):
        check_mac(config.text("MacAddress"))
    if isolation is Isolation.VM and (mode == "host" or mode.startswith(SHARED)):
        why = "it has a network stack of its own" if mode == "host" else "in the namespace of another only its guest answers"
        raise InvalidRequest(
            f"--network {mode} is not possible for a VM: {why}",
            hint="use a network, as --network bridge, or run it as a container: --isolation container",
        )
    others = Body("NetworkingConfig", spec.networking).object("EndpointsConfig").data
    if mode.startswith(SHARED):
        _check_shared(host, config, mode)
    if mode in ("none", "host") or mode.startswith(SHARED):
        if any(name != mode and name != host.text("NetworkMode") for name in others):
            raise InvalidRequest(
                "conflicting options: cannot attach both user-defined and non-user-defined network-modes",
                hint=f"leave --network {mode} out, or the other networks",
            )
        if mode == "host" and host.strings("Links"):
            raise InvalidRequest(
                "conflicting options: host type networking can't be used with links. "
                "This would result in undefined behavior",
                hint="leave --link out",
            )
        return
    given = Body("NetworkingConfig", spec.networking).object("EndpointsConfig")
    for name in given.data:
        check_endpoint(Endpoint(DEFAULT_NETWORK if name in _DEFAULTS else name, given.object(name).data))
    for endpoint in asked_for(spec):
        check_endpoint(endpoint)


def _check_shared(host: Body, config: Body, mode: str) -> None:
    conflicts = (
        (config.text("Hostname"), "hostname and the network mode", "--hostname"),
        (host.strings("Links"), "container type network can't be used with links", "--link"),
        (host.strings("Dns"), "dns and the network mode", "--dns"),
        (host.strings("ExtraHosts"), "custom host-to-IP mapping and the network mode", "--add-host"),
        (config.text("MacAddress"), "mac-address and the network mode", "--mac-address"),
        (host.object("PortBindings").data, "port publishing and the container type network mode", "--publish"),
        (host.flag("PublishAllPorts"), "port publishing and the container type network mode", "--publish-all"),
        (config.object("ExposedPorts").data, "port exposing and the container type network mode", "--expose"),
    )
    if not mode.removeprefix(SHARED):
        raise InvalidRequest("invalid container format container:<name|id>", hint="--network container:NAME")
    for given, text, flag in conflicts:
        if given:
            raise InvalidRequest(f"conflicting options: {text}", hint=f"leave {flag} out: --network {mode} decides it")


def check_endpoint(endpoint: Endpoint) -> None:
    """What one entry of EndpointsConfig asks for. Raises InvalidRequest."""
    body = Body(f"EndpointsConfig.{endpoint.name}", endpoint.asked)
    for key, value in body.data.items():
        if key not in _SUPPORTED and value:
            raise InvalidRequest(f"EndpointsConfig.{endpoint.name}.{key} is not supported", hint="leave it out")
    ipam = body.object("IPAMConfig")
    default = endpoint.name == DEFAULT_NETWORK
    for key, flag in (("IPv4Address", "--ip"), ("IPv6Address", "--ip6")):
        text = ipam.text(key)
        if text and (not is_address(text) or (":" in text) != (key == "IPv6Address")):
            raise InvalidRequest(f"invalid {key[:4]} address: {text}", hint=f"{flag} takes one address")
        if text and default:
            raise InvalidRequest(
                "user specified IP address is supported on user defined networks only",
                hint="make a network with a subnet: ambi network create --subnet 10.20.0.0/24 NAME",
            )
    for text in ipam.strings("LinkLocalIPs"):
        if not is_address(text):
            raise InvalidRequest(f"invalid link-local IP address: {text}", hint="--link-local-ip 169.254.10.1")
    for alias in body.strings("Aliases"):
        if not alias or any(c.isspace() for c in alias):
            raise InvalidRequest(f"'{alias}' cannot be a network alias", hint="--network-alias db")
    if default and endpoint.aliases:
        raise InvalidRequest(
            "network-scoped aliases are only supported for user-defined networks",
            hint="make a network: ambi network create NAME",
        )
    for link in body.strings("Links"):
        if not all(split_link(link)):
            raise InvalidRequest(f"bad format for links: {link}", hint="--link NAME:ALIAS")
    if body.text("MacAddress"):
        check_mac(body.text("MacAddress"))
    body.texts("DriverOpts")
    body.number("GwPriority")


def split_link(text: str) -> tuple[str, str]:
    """Instance and alias of a link."""
    name, _, alias = text.partition(":")
    return name.removeprefix("/"), alias.rpartition("/")[2] or name.removeprefix("/")


def check_mac(text: str) -> None:
    parts = text.split(":") if ":" in text else text.split("-")
    good = len(parts) == 6 and all(len(p) == 2 and all(c in "0123456789abcdefABCDEF" for c in p) for p in parts)
    if not good or int(parts[0], 16) & 1:
        raise InvalidRequest(f"{text} is not a valid mac address", hint="as in --mac-address 02:42:ac:11:00:02")
