"""Filters of lists, in Docker's words. The API brings both of Docker's JSON shapes to `{"label": ["a=b"], ...}`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from ambi.core.errors import InvalidRequest
from ambi.core.words import point_ns
from ambi.engine import ports
from ambi.engine.types import Instance

Filters = Mapping[str, list[str]]

INSTANCE_KEYS = frozenset(
    ("ancestor", "before", "exited", "expose", "health", "id", "is-task", "isolation", "label", "name", "network", "publish")
    + ("since", "status", "volume")
)
_STATUSES = frozenset(("created", "running", "paused", "restarting", "removing", "exited", "dead"))


def check(filters: Filters, known: frozenset[str]) -> None:
    """Raises InvalidRequest for a filter that is not `known`."""
    for key in filters:
        if key not in known:
            raise InvalidRequest(f"invalid filter '{key}'")


def has_labels(labels: Mapping[str, str], wanted: Iterable[str]) -> bool:
    """Whether every one of `NAME` or `NAME=VALUE` is there."""
    for item in wanted:
        name, equals, value = item.partition("=")
        if name not in labels or (equals and labels[name] != value):
            return False
    return True


def instance_matches(instance: Instance, filters: Filters) -> bool:
    """Whether `instance` passes the filters that need nothing but itself; not `before`, `since`, `ancestor`."""
    return all(_TESTS[key](instance, values) for key, values in filters.items() if key in _TESTS and values)


def check_values(filters: Filters) -> None:
    """Raises InvalidRequest for values that can never be right."""
    for value in filters.get("status", ()):
        if value not in _STATUSES:
            raise InvalidRequest(f"invalid filter 'status={value}'")
    for value in filters.get("health", ()):
        if value not in ("starting", "healthy", "unhealthy", "none"):
            raise InvalidRequest(f"invalid filter 'health={value}'")
    for value in filters.get("exited", ()):
        if not value.lstrip("-").isdigit():
            raise InvalidRequest(f"invalid filter 'exited={value}'")


def seconds(text: str) -> float:
    """The value of `until`, in seconds since 1970. Raises InvalidRequest."""
    return point_ns("until", text) / 1e9


def _named(instance: Instance, values: list[str]) -> bool:
    """Docker takes the values as regular expressions over the name, with and without its slash."""
    import re

    for value in values:
        try:
            pattern = re.compile(value)
        except re.error as error:
            raise InvalidRequest(f"invalid filter 'name={value}': {error}") from error
        if pattern.search(f"/{instance.name}") or pattern.search(instance.name):
            return True
    return False


def _exited(instance: Instance, values: list[str]) -> bool:
    return not instance.state.alive and instance.state.finished_ns > 0 and str(instance.state.exit_code) in values


def _network(instance: Instance, values: list[str]) -> bool:
    """By name, id or the beginning of an id."""
    mode = instance.spec.host.get("NetworkMode")
    alone = mode == "host" or (mode == "none" and not instance.net.endpoints)
    names = {mode} if alone else {endpoint.name for endpoint in instance.net.endpoints}
    ids = [endpoint.network for endpoint in instance.net.endpoints if endpoint.network]
    return any(value in names or any(value and id.startswith(value) for id in ids) for value in values)


def _volume(instance: Instance, values: list[str]) -> bool:
    return any(value in (point.name or point.shown, point.target) for point in instance.mounts for value in values)


def _publish(instance: Instance, values: list[str]) -> bool:
    """By the port of the host."""
    return _has_port(((port.host_port, port.protocol) for port in instance.net.ports), values)


def _expose(instance: Instance, values: list[str]) -> bool:
    """By the port of the instance, published or not."""
    exposed = (text.partition("/") for text in ports.exposed(instance.spec))
    return _has_port(((int(number), protocol) for number, _, protocol in exposed), values)


def _has_port(found: Iterable[tuple[int, str]], values: list[str]) -> bool:
    """Whether one of `found` is in one of the ranges `FIRST[-LAST][/PROTOCOL]`. Raises InvalidRequest."""
    wanted = [_port_range(value) for value in values]
    return any(first <= port <= last and protocol == kind for port, protocol in found for first, last, kind in wanted)


def _port_range(value: str) -> tuple[int, int, str]:
    numbers, _, protocol = value.partition("/")
    first, _, last = numbers.partition("-")
    try:
        return int(first), int(last or first), protocol or "tcp"
    except ValueError as error:
        raise InvalidRequest(f"invalid port filter '{value}'", hint="for example 80, 53/udp or 8000-8100") from error


_TESTS: dict[str, Callable[[Instance, list[str]], bool]] = {
    "id": lambda i, values: any(i.id.startswith(v) for v in values),
    "name": _named,
    "label": lambda i, values: has_labels(i.labels, values),
    "status": lambda i, values: i.state.status.value in values,
    "exited": _exited,
    "isolation": lambda i, values: i.isolation.value in values,
    "is-task": lambda i, values: "false" in values or "0" in values,
    "health": lambda i, values: (i.health.status if i.health is not None else "none") in values,
    "network": _network,
    "volume": _volume,
    "publish": _publish,
    "expose": _expose,
}
