"""From a client's request for a network to the network, complete and checked."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ambi.core.errors import Conflict, Forbidden, InvalidRequest, NotFound, Unsupported
from ambi.engine import names
from ambi.engine.body import Body
from ambi.network.model import Network, Pool

if TYPE_CHECKING:
    from ambi.engine.networks import Networks

DRIVERS = ("bridge", "macvlan", "ipvlan")
_BUILTIN = ("bridge", "host", "none", "default")
_BRIDGE_OPTIONS = frozenset((
    "com.docker.network.bridge.name", "com.docker.network.bridge.enable_icc", "com.docker.network.bridge.default_bridge",
    "com.docker.network.bridge.enable_ip_masquerade", "com.docker.network.bridge.host_binding_ipv4",
    "com.docker.network.bridge.gateway_mode_ipv4", "com.docker.network.bridge.gateway_mode_ipv6",
    "com.docker.network.driver.mtu", "com.docker.network.container_iface_prefix", "com.docker.network.bridge.inhibit_ipv4",
))  # fmt: skip


def create(networks: Networks, asked: dict[str, Any]) -> tuple[str, str]:
    """Make the network that `asked`, the body of `/networks/create`, describes; its id, and a warning or "".

    Raises InvalidRequest, Conflict (the name), Forbidden (built in, overlap), NotFound (no such driver, no pool left).
    """
    body = Body("NetworkCreate", asked)
    name = body.text("Name")
    if not name or not name.strip() or "/" in name or len(name) > 255 or any(not c.isprintable() for c in name):
        raise InvalidRequest(f"invalid network name: '{name}'", hint="ambi network create NAME")
    driver = body.text("Driver") or "bridge"
    if driver in ("host", "null"):
        raise Forbidden(
            f'only one instance of "{driver}" network is allowed', hint=f"use the one there is: --network {name}"
        )
    if name in _BUILTIN:
        raise Forbidden(f"operation is not permitted on predefined {name} network", hint="choose another name")
    if driver not in DRIVERS:
        raise NotFound(
            f"could not find plugin {driver} in v1 plugin registry: plugin not found", hint=f"drivers: {', '.join(DRIVERS)}"
        )
    _refuse(body)
    with networks.naming(name):
        network = _resolve(networks, body, name, driver)
        networks.make(network)
    return network.id, ""


def _refuse(body: Body) -> None:
    for key, what in (("Ingress", "--ingress"), ("ConfigOnly", "--config-only")):
        if body.flag(key):
            raise Unsupported(f"{what} is for swarms, which there are none of here", hint="leave it out")
    if body.object("ConfigFrom").text("Network"):
        raise Unsupported("--config-from is not supported", hint="give the settings themselves")
    if body.text("Scope") not in ("", "local"):
        raise Unsupported(f"--scope {body.text('Scope')} is not supported", hint="leave it out")
    ipam = body.object("IPAM")
    if ipam.text("Driver") not in ("", "default"):
        raise NotFound(f"could not find plugin {ipam.text('Driver')} in v1 plugin registry: plugin not found")


def _resolve(networks: Networks, body: Body, name: str, driver: str) -> Network:
    """Complete; the pools do not overlap what there is, as long as the caller holds the name."""
    from ambi.network import ipam

    asked = body.object("IPAM")
    ipv6 = body.flag("EnableIPv6")
    options = body.texts("Options")
    if driver == "bridge":
        _check_options(options)
    networks.default()  # has its subnet first, so that it is the same however many others come
    pools = [_pool(entry) for entry in asked.objects("Config")]
    routes = networks.routes()
    own = [pool for pool in pools if pool.subnet]
    if any(":" in pool.subnet for pool in own) and not ipv6:
        raise InvalidRequest("an IPv6 subnet needs a network with IPv6", hint="ambi network create --ipv6 ...")
    with networks.lock:
        taken = networks.subnets()
        # What the user names may overlap a route of the host, as the one of a VPN to which it leads; never one of ours.
        resolved = list(ipam.check(own, taken))
        busy = [*taken, *routes, *(pool.subnet for pool in resolved)]
        if not any(":" not in pool.subnet for pool in resolved):
            chosen = ipam.choose(busy, 4)
            asked_gateway = next((p for p in pools if not p.subnet), None)
            if asked_gateway is not None and (asked_gateway.gateway or asked_gateway.range or asked_gateway.reserved):
                raise InvalidRequest("an address needs a subnet", hint="add --subnet")
            resolved.insert(0, chosen)
        if ipv6 and not any(":" in pool.subnet for pool in resolved):
            resolved.append(ipam.choose(busy, 6))
        return Network(
            id=names.new_id(),
            name=name,
            driver=driver,
            pools=tuple(resolved),
            internal=body.flag("Internal"),
            ipv6=ipv6,
            attachable=body.flag("Attachable"),
            options=options,
            labels=body.texts("Labels"),
            created_ns=time.time_ns(),
            asked=asked.data,
        )


def _pool(entry: Body) -> Pool:
    return Pool(entry.text("Subnet"), entry.text("Gateway"), entry.text("IPRange"), entry.texts("AuxiliaryAddresses"))


def _check_options(options: dict[str, str]) -> None:
    for key, value in options.items():
        if key.startswith("com.docker.network.") and key not in _BRIDGE_OPTIONS:
            raise Unsupported(f"driver option {key} is not supported", hint="leave it out")
        if key.endswith(("enable_icc", "enable_ip_masquerade")) and value.lower() not in ("true", "false", "1", "0"):
            raise InvalidRequest(f"invalid value for {key}: '{value}'", hint=f"-o {key}=false")
    mtu = options.get("com.docker.network.driver.mtu", "1500")
    if not (mtu.isascii() and mtu.isdigit() and 68 <= int(mtu) <= 65535):
        raise InvalidRequest(f"invalid MTU '{mtu}'", hint="-o com.docker.network.driver.mtu=1450")


def taken(name: str) -> Conflict:
    return Conflict(f"network with name {name} already exists", hint=f"use it, or: ambi network rm {name}")
