"""Networks and volumes, as far as they exist: the networks `none` and `host`, and no named volumes.

`docker inspect X` asks for X here after it has asked for a container and an image, and goes on only after a 404 in JSON.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from ambi.api.exchange import Call, Reply, json_reply
from ambi.api.router import Route
from ambi.core.errors import NotFound, Unsupported

_NAMES = ("host", "none")
_NETWORK_FILTERS = frozenset(("dangling", "driver", "id", "label", "name", "scope", "type"))
_VOLUME_FILTERS = frozenset(("dangling", "driver", "label", "name"))


def network_id(name: str) -> str:
    """The id of a built-in network: the same on every host."""
    return hashlib.sha256(f"ambi network {name}".encode()).hexdigest()


def _network(name: str) -> dict[str, Any]:
    return {
        "Name": name,
        "Id": network_id(name),
        "Created": "1970-01-01T00:00:00Z",
        "Scope": "local",
        "Driver": "null" if name == "none" else "host",
        "EnableIPv6": False,
        "IPAM": {"Driver": "default", "Options": None, "Config": []},
        "Internal": False,
        "Attachable": False,
        "Ingress": False,
        "ConfigFrom": {"Network": ""},
        "ConfigOnly": False,
        "Containers": {},
        "Options": {},
        "Labels": {},
    }


def _fits(network: dict[str, Any], filters: dict[str, list[str]]) -> bool:
    """Values of one filter are alternatives, as Docker has it; the built-in networks have no labels."""
    tests: dict[str, Callable[[str], bool]] = {
        "name": lambda value: value in network["Name"],
        "id": network["Id"].startswith,
        "driver": lambda value: value == network["Driver"],
        "scope": lambda value: value == "local",
        "type": lambda value: value == "builtin",
        "dangling": lambda value: value.lower() in ("0", "false"),
        "label": lambda value: False,
    }
    return all(any(tests[name](value) for value in values) for name, values in filters.items() if values)


def list_networks(call: Call) -> Reply:
    filters = call.query.filters(_NETWORK_FILTERS)
    return json_reply([network for network in map(_network, _NAMES) if _fits(network, filters)])


def inspect_network(call: Call) -> Reply:
    for name in _NAMES:
        if call.name == name or (len(call.name) >= 4 and network_id(name).startswith(call.name)):
            return json_reply(_network(name))
    raise NotFound(f"network {call.name} not found")


def list_volumes(call: Call) -> Reply:
    call.query.filters(_VOLUME_FILTERS)
    return json_reply({"Volumes": [], "Warnings": None})


def inspect_volume(call: Call) -> Reply:
    raise NotFound(f"get {call.name}: no such volume")


def refuse_networks(call: Call) -> Reply:
    raise Unsupported("user-defined networks are not available yet", hint="use --network none, or host for a container")


def refuse_volumes(call: Call) -> Reply:
    raise Unsupported("named volumes are not available yet", hint="bind a directory of the host: -v /path:/path")


ROUTES = (
    Route("GET", "/networks", list_networks),
    Route("GET", "/networks/{}", inspect_network),
    Route("DELETE", "/networks/{}", refuse_networks),
    Route("POST", "/networks/create", refuse_networks),
    Route("POST", "/networks/prune", refuse_networks),
    Route("POST", "/networks/{}/connect", refuse_networks),
    Route("POST", "/networks/{}/disconnect", refuse_networks),
    Route("GET", "/volumes", list_volumes),
    Route("GET", "/volumes/{}", inspect_volume),
    Route("DELETE", "/volumes/{}", inspect_volume),
    Route("POST", "/volumes/create", refuse_volumes),
    Route("POST", "/volumes/prune", refuse_volumes),
)
