"""Typed reading of a client's JSON. A value of the wrong type is an InvalidRequest that names the field."""

from __future__ import annotations

from typing import Any

from ambi.core.errors import InvalidRequest


class Body:
    """A JSON object of a request. Missing keys and null read as the neutral value of the type asked for."""

    __slots__ = ("_name", "data")

    def __init__(self, name: str, data: Any) -> None:
        if data is None:
            data = {}
        if not isinstance(data, dict):
            raise InvalidRequest(f"{name} must be an object, not {_kind(data)}")
        self._name = name
        self.data: dict[str, Any] = data

    def _wrong(self, key: str, wanted: str) -> InvalidRequest:
        return InvalidRequest(f"{self._name}.{key} must be {wanted}, not {_kind(self.data[key])}")

    def text(self, key: str) -> str:
        value = self.data.get(key)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise self._wrong(key, "a string")
        if "\0" in value:
            raise InvalidRequest(f"{self._name}.{key} contains a zero byte")
        return value

    def number(self, key: str) -> int:
        value = self.data.get(key)
        if value is None:
            return 0
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(key, "a whole number")
        if not -(1 << 63) <= value < 1 << 63:
            raise InvalidRequest(f"{self._name}.{key}: {value} is out of range")
        return value

    def flag(self, key: str) -> bool:
        value = self.data.get(key)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def strings(self, key: str) -> list[str]:
        """A list of strings; a single string is a list of one, as Docker reads it."""
        value = self.data.get(key)
        if value is None:
            return []
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
            raise self._wrong(key, "a list of strings")
        for item in value:
            if "\0" in item:
                raise InvalidRequest(f"{self._name}.{key} contains a zero byte")
        return value

    def texts(self, key: str) -> dict[str, str]:
        """An object whose values are strings."""
        value = self.data.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict) or not all(isinstance(x, str) for x in value.values()):
            raise self._wrong(key, "an object of strings")
        return value

    def objects(self, key: str) -> list[Body]:
        value = self.data.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self._wrong(key, "a list of objects")
        return [Body(f"{self._name}.{key}[{i}]", item) for i, item in enumerate(value)]

    def object(self, key: str) -> Body:
        return Body(f"{self._name}.{key}", self.data.get(key))


def _kind(value: Any) -> str:
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return kinds.get(type(value), "null")
