"""`/networks`.

`docker inspect X` asks for X here after it has asked for a container and an image, and goes on only after a 404 in JSON.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ambi.api import network_shapes
from ambi.api.exchange import NO_CONTENT, Call, Reply, json_reply
from ambi.api.query import one_flag
from ambi.api.router import Route
from ambi.core.errors import InvalidRequest
from ambi.engine import connect as connecting
from ambi.engine import newnetwork
from ambi.engine.filters import has_labels
from ambi.network.model import Network

_FILTERS = frozenset(("dangling", "driver", "id", "label", "name", "scope", "type"))
_PRUNE_FILTERS = frozenset(("label", "label!", "until"))


def _fits(call: Call, network: Network, filters: dict[str, list[str]]) -> bool:
    """Values of one filter are alternatives, as Docker has it; all labels must be there."""
    tests: dict[str, Callable[[str], bool]] = {
        "name": lambda value: value in network.name,
        "id": network.id.startswith,
        "driver": lambda value: value == network.driver,
        "scope": lambda value: value == "local",
        "type": lambda value: value == ("builtin" if network.builtin else "custom"),
        "dangling": lambda value: one_flag("dangling", [value]) == _dangles(call, network),
    }
    if not has_labels(network.labels, filters.get("label", ())):
        return False
    return all(any(tests[name](value) for value in values) for name, values in filters.items() if values and name in tests)


def _dangles(call: Call, network: Network) -> bool:
    return not network.builtin and not call.engine.networks.users(network)


def list_networks(call: Call) -> Reply:
    filters = call.query.filters(_FILTERS)
    for value in filters.get("type", ()):
        if value not in ("builtin", "custom"):
            raise InvalidRequest(f"invalid filter: 'type'='{value}'", hint="type=builtin or type=custom")
    networks = [network for network in call.engine.networks.all() if _fits(call, network, filters)]
    return json_reply([network_shapes.network(network, []) for network in networks])


def inspect(call: Call) -> Reply:
    network = call.engine.networks.find(call.name)
    return json_reply(network_shapes.network(network, call.engine.networks.members(network)))


def create(call: Call) -> Reply:
    id, warning = newnetwork.create(call.engine.networks, call.json_body())
    return json_reply({"Id": id, "Warning": warning}, 201)


def remove(call: Call) -> Reply:
    call.engine.networks.remove(call.name)
    return NO_CONTENT


def prune(call: Call) -> Reply:
    removed = call.engine.networks.prune(call.query.filters(_PRUNE_FILTERS))
    return json_reply({"NetworksDeleted": removed or None})


def _instance(body: dict[str, Any]) -> str:
    name = body.get("Container")
    if not isinstance(name, str) or not name:
        raise InvalidRequest("Container must name a container")
    return name


def connect(call: Call) -> Reply:
    body = call.json_body()
    asked = body.get("EndpointConfig") or {}
    if not isinstance(asked, dict):
        raise InvalidRequest("EndpointConfig must be a JSON object")
    connecting.connect(call.engine.networks, call.name, _instance(body), asked)
    return Reply(200)


def disconnect(call: Call) -> Reply:
    body = call.json_body()
    connecting.disconnect(call.engine.networks, call.name, _instance(body), force=body.get("Force") is True)
    return Reply(200)


ROUTES = (
    Route("GET", "/networks", list_networks),
    Route("GET", "/networks/{}", inspect),
    Route("DELETE", "/networks/{}", remove),
    Route("POST", "/networks/create", create),
    Route("POST", "/networks/prune", prune),
    Route("POST", "/networks/{}/connect", connect),
    Route("POST", "/networks/{}/disconnect", disconnect),
)
