"""Networks, and what instances have on them, as Docker's JSON."""

from __future__ import annotations

from typing import Any

from ambi.api.words import rfc3339_nano
from ambi.engine import ports
from ambi.engine.endpoints import SHARED, mode_of
from ambi.engine.netstate import Endpoint
from ambi.engine.networks import builtin_id
from ambi.engine.types import Instance
from ambi.network.model import DEFAULT_NETWORK, Address, Network

_EMPTY: dict[str, Any] = {
    "MacAddress": "", "NetworkID": "", "EndpointID": "", "Gateway": "", "IPAddress": "", "IPPrefixLen": 0, "IPv6Gateway": "",
    "GlobalIPv6Address": "", "GlobalIPv6PrefixLen": 0,
}  # fmt: skip


def network(found: Network, members: list[tuple[Instance, Endpoint]]) -> dict[str, Any]:
    """The answer of `/networks/ID`. members: who has an address on it now."""
    asked = found.asked or {}
    return {
        "Name": found.name,
        "Id": found.id,
        "Created": rfc3339_nano(found.created_ns) if found.created_ns else "1970-01-01T00:00:00Z",
        "Scope": "local",
        "Driver": found.driver,
        "EnableIPv6": found.ipv6,
        "IPAM": {
            "Driver": asked.get("Driver") or "default",
            "Options": asked.get("Options") or (None if found.builtin else {}),
            "Config": [_pool(found, place) for place in range(len(found.pools))],
        },
        "Internal": found.internal,
        "Attachable": found.attachable,
        "Ingress": False,
        "ConfigFrom": {"Network": ""},
        "ConfigOnly": False,
        "Containers": {instance.id: _member(instance, endpoint) for instance, endpoint in members},
        "Options": found.options,
        "Labels": found.labels,
    }


def _pool(found: Network, place: int) -> dict[str, Any]:
    pool = found.pools[place]
    shown: dict[str, Any] = {"Subnet": pool.subnet}
    if pool.range:
        shown["IPRange"] = pool.range
    shown["Gateway"] = pool.gateway
    if pool.reserved:
        shown["AuxiliaryAddresses"] = pool.reserved
    return shown


def _member(instance: Instance, endpoint: Endpoint) -> dict[str, str]:
    four, six = (_address(endpoint, family) for family in (4, 6))
    return {
        "Name": instance.name,
        "EndpointID": endpoint.id,
        "MacAddress": endpoint.nic.mac if endpoint.nic else "",
        "IPv4Address": f"{four.address}/{four.prefix}" if four else "",
        "IPv6Address": f"{six.address}/{six.prefix}" if six else "",
    }


def _address(endpoint: Endpoint, family: int) -> Address | None:
    nic = endpoint.nic
    return next((a for a in nic.addresses if a.family == family), None) if nic else None


def endpoints(instance: Instance, *, names: bool = True) -> dict[str, Any]:
    """`NetworkSettings.Networks`. names: with the aliases and DNS names that the engine adds, as inspect has them."""
    mode = mode_of(instance.spec.host)
    if mode.startswith(SHARED):
        return {}
    if mode == "host" or (mode == "none" and not instance.net.endpoints):
        shown = {**_settings(Endpoint(mode, {})), "NetworkID": builtin_id(mode)}
        return {mode: shown}
    found = instance.net.endpoints
    if not instance.state.running:  # its address is on its way back
        found = tuple(endpoint._replace(id="", nic=None) for endpoint in found)
    return {endpoint.name: _endpoint(instance, endpoint, names) for endpoint in found}


def _endpoint(instance: Instance, endpoint: Endpoint, names: bool) -> dict[str, Any]:
    shown = _settings(endpoint)
    if not names or endpoint.name == DEFAULT_NETWORK:
        return shown
    short = instance.id[:12]
    shown["Aliases"] = list(dict.fromkeys([*endpoint.aliases, short]))
    host = str(instance.spec.config.get("Hostname") or "")
    shown["DNSNames"] = list(dict.fromkeys([instance.name, *endpoint.aliases, short, *([host] if host else [])]))
    return shown


def _settings(endpoint: Endpoint) -> dict[str, Any]:
    """Docker's EndpointSettings, with what was asked for verbatim."""
    asked = endpoint.asked
    shown: dict[str, Any] = {
        "IPAMConfig": asked.get("IPAMConfig"),
        "Links": asked.get("Links"),
        "Aliases": asked.get("Aliases"),
        **_EMPTY,
        "DriverOpts": asked.get("DriverOpts"),
        "DNSNames": None,
    }
    shown["MacAddress"] = asked.get("MacAddress") or ""
    shown["NetworkID"] = endpoint.network
    if endpoint.nic is None:
        return shown
    shown.update(MacAddress=endpoint.nic.mac, EndpointID=endpoint.id)
    for family, address, prefix, gateway in (
        (4, "IPAddress", "IPPrefixLen", "Gateway"),
        (6, "GlobalIPv6Address", "GlobalIPv6PrefixLen", "IPv6Gateway"),
    ):
        found = _address(endpoint, family)
        if found is not None:
            shown.update({address: found.address, prefix: found.prefix, gateway: found.gateway})
    return shown


def settings(instance: Instance) -> dict[str, Any]:
    """`NetworkSettings` of inspect; the addresses at its top are those on the default bridge."""
    networks = endpoints(instance)
    first = networks.get(DEFAULT_NETWORK, {})
    running = instance.state.running
    return {
        "Bridge": "",
        "SandboxID": instance.id if running else "",
        "SandboxKey": f"/proc/{instance.state.pid}/ns/net" if running and instance.isolation.value == "container" else "",
        "Ports": ports.port_map(instance.spec, instance.net.ports) if running else {},
        "HairpinMode": False,
        "LinkLocalIPv6Address": "",
        "LinkLocalIPv6PrefixLen": 0,
        "SecondaryIPAddresses": None,
        "SecondaryIPv6Addresses": None,
        **{key: first.get(key, value) for key, value in _EMPTY.items() if key != "NetworkID"},
        "Networks": networks,
    }


def port_list(instance: Instance) -> list[dict[str, Any]]:
    """`Ports` of a row of `/containers/json`."""
    return ports.port_list(instance.spec, instance.net.ports) if instance.state.running else []
