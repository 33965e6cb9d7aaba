"""`/events`: what happens, one JSON object a line."""

from __future__ import annotations

from typing import Any

from ambi.api.exchange import Call, to_json
from ambi.api.router import Route
from ambi.engine.types import Event

_FILTERS = frozenset((
    "config", "container", "daemon", "event", "image", "label", "network", "node", "plugin", "scope", "secret", "service",
    "type", "volume",
))  # fmt: skip


def events(call: Call) -> None:
    query = call.query
    found = call.engine.events(query.time_ns("since"), query.time_ns("until"), query.filters(_FILTERS))
    try:
        stream = call.stream()
        for event in found:
            if event is not None:
                stream.write(to_json(shape(event)))
            elif call.connection.client_gone():
                return
        stream.end()
    finally:
        found.close()


def shape(event: Event) -> dict[str, Any]:
    """Docker's message, with `status`, `id` and `from` of old for containers and images."""
    legacy: dict[str, Any] = {}
    if event.type in ("container", "image"):
        legacy = {"status": event.action, "id": event.actor_id}
        if event.type == "container" and "image" in event.attributes:
            legacy["from"] = event.attributes["image"]
    return {
        **legacy,
        "Type": event.type,
        "Action": event.action,
        "Actor": {"ID": event.actor_id, "Attributes": event.attributes},
        "scope": "local",
        "time": event.time_ns // 1_000_000_000,
        "timeNano": event.time_ns,
    }


ROUTES = (Route("GET", "/events", events),)
