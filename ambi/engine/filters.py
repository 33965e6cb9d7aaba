"""Filters of lists, in Docker's words. The API brings both of Docker's JSON shapes to `{"label": ["a=b"], ...}`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from ambi.core.errors import InvalidRequest
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
    for value in filters.get("exited", ()):
        if not value.lstrip("-").isdigit():
            raise InvalidRequest(f"invalid filter 'exited={value}'")


def seconds(text: str) -> float:
    """The value of `until`, in seconds since 1970. Raises InvalidRequest."""
    try:
        return float(text)
    except ValueError as error:
        raise InvalidRequest(f"invalid filter 'until={text}'", hint="use seconds since 1970") from error


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
    return not instance.state.running and instance.state.finished_ns > 0 and str(instance.state.exit_code) in values


def _network(instance: Instance, values: list[str]) -> bool:
    """By name, id or the beginning of an id."""
    mode = instance.spec.host.get("NetworkMode")
    names = {mode} if mode in ("none", "host") else {endpoint.name for endpoint in instance.net.endpoints}
    ids = [endpoint.network for endpoint in instance.net.endpoints if endpoint.network]
    return any(value in names or any(value and id.startswith(value) for id in ids) for value in values)


def _volume(instance: Instance, values: list[str]) -> bool:
    return any(value in (point.name or point.shown, point.target) for point in instance.mounts for value in values)


def _publish(instance: Instance, values: list[str]) -> bool:
    """By the port of the host; without a protocol by any."""
    found = {f"{port.host_port}/{port.protocol}" for port in instance.net.ports}
    return any(value in found or any(text.partition("/")[0] == value for text in found) for value in values)


_TESTS: dict[str, Callable[[Instance, list[str]], bool]] = {
    "id": lambda i, values: any(i.id.startswith(v) for v in values),
    "name": _named,
    "label": lambda i, values: has_labels(i.labels, values),
    "status": lambda i, values: i.state.status.value in values,
    "exited": _exited,
    "isolation": lambda i, values: i.isolation.value in values,
    "is-task": lambda i, values: "false" in values or "0" in values,
    "health": lambda i, values: "none" in values,
    "network": _network,
    "volume": _volume,
    "publish": _publish,
    "expose": lambda i, values: any(_port(v) in (i.spec.config.get("ExposedPorts") or {}) for v in values),
}


def _port(value: str) -> str:
    return value if "/" in value else f"{value}/tcp"
