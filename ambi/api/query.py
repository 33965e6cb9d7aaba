"""What stands behind the question mark: Docker's booleans, numbers, times and filters.

Filters come as a JSON object in two shapes, and both mean the same:

    {"label": ["a=b", "c"]}                    docker-py, and the API's documentation
    {"label": {"a=b": true, "c": true}}        the docker command
"""

from __future__ import annotations

import json
from urllib.parse import parse_qsl

from ambi.core.errors import InvalidRequest

_FALSE = frozenset(("", "0", "no", "false", "none"))
_MAX_FIELDS = 200

Filters = dict[str, list[str]]


class Query:
    """The fields of a query string; of a repeated field, `text` and its kin see the first, `all` sees every one."""

    __slots__ = ("_fields",)

    def __init__(self, query: str) -> None:
        self._fields: dict[str, list[str]] = {}
        if not query:
            return
        try:
            pairs = parse_qsl(query, keep_blank_values=True, max_num_fields=_MAX_FIELDS)
        except ValueError as error:
            raise InvalidRequest(f"the query cannot be read: {error}") from error
        for name, value in pairs:
            self._fields.setdefault(name, []).append(value)

    def __contains__(self, name: str) -> bool:
        return name in self._fields

    def text(self, name: str, default: str = "") -> str:
        values = self._fields.get(name)
        return values[0] if values else default

    def all(self, name: str) -> tuple[str, ...]:
        return tuple(self._fields.get(name, ()))

    def flag(self, name: str, default: bool = False) -> bool:
        """Docker's rule: everything is true but nothing, 0, no, false and none."""
        values = self._fields.get(name)
        return values[0].strip().lower() not in _FALSE if values else default

    def number(self, name: str) -> int | None:
        """A whole number, None when it is not given."""
        value = self.text(name).strip()
        if not value:
            return None
        try:
            return int(value)
        except ValueError as error:
            raise InvalidRequest(f"{name}={value!r} is not a whole number") from error

    def time_ns(self, name: str) -> int | None:
        """A point in time as `SECONDS[.FRACTION]` since the epoch, in nanoseconds; None when it is not given."""
        value = self.text(name).strip()
        if not value:
            return None
        seconds, _, fraction = value.partition(".")
        digits = fraction[:9].ljust(9, "0")
        if not (seconds.removeprefix("-").isdecimal() and digits.isdecimal() and len(seconds) < 20):
            raise InvalidRequest(f"{name}={value!r} is not a time in seconds since 1970, like 1700000000.25")
        whole = int(seconds) * 1_000_000_000
        return whole - int(digits) if seconds.startswith("-") else whole + int(digits)

    def filters(self, known: frozenset[str]) -> Filters:
        """The field `filters`. Raises InvalidRequest for a filter that is not in `known`, and for another shape."""
        raw = self.text("filters")
        if not raw:
            return {}
        try:
            value = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"filters are not JSON: {error}") from error
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise InvalidRequest("filters are not a JSON object")
        found: Filters = {}
        for name, values in value.items():
            if name not in known:
                raise InvalidRequest(f"invalid filter '{name}'", hint=f"known filters: {', '.join(sorted(known))}")
            found[name] = _filter_values(name, values)
        return found


def _filter_values(name: str, values: object) -> list[str]:
    if isinstance(values, dict) and all(isinstance(on, bool) for on in values.values()):
        return [str(value) for value, on in values.items() if on]
    if isinstance(values, list) and all(isinstance(value, str) for value in values):
        return list(values)
    raise InvalidRequest(f"filter '{name}' is neither a list of texts nor an object of texts to true")


def one_flag(name: str, values: list[str]) -> bool:
    """The boolean that a filter like `dangling=true` says."""
    if len(values) == 1 and values[0].lower() in ("1", "true", "t"):
        return True
    if len(values) == 1 and values[0].lower() in ("0", "false", "f"):
        return False
    raise InvalidRequest(f"invalid filter '{name}={','.join(values)}'", hint=f"use {name}=true or {name}=false")
