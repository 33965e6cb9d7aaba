"""`WWW-Authenticate`, as registries send it: RFC 9110 section 11.6.1, and Docker's token specification."""

from __future__ import annotations

from typing import NamedTuple

_LIMIT = 8192
_TOKEN = frozenset("!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")


class Challenge(NamedTuple):
    """scheme: in lower case (`basic`, `bearer`). values: `realm`, `service`, `scope`, `error`, names in lower case."""

    scheme: str
    values: dict[str, str]


def parse(header: str) -> list[Challenge]:
    """The challenges of one header; what cannot be read ends the list."""
    found: list[Challenge] = []
    text = header[:_LIMIT]
    at = 0
    while True:
        at = _skip(text, at, " \t,")
        word, at = _token(text, at)
        if not word:
            return found
        after = _skip(text, at, " \t")
        if text[after : after + 1] == "=" and found:
            value, at = _value(text, _skip(text, after + 1, " \t"))
            found[-1].values.setdefault(word.lower(), value)
        else:
            found.append(Challenge(word.lower(), {}))


def _skip(text: str, at: int, what: str) -> int:
    while at < len(text) and text[at] in what:
        at += 1
    return at


def _token(text: str, at: int) -> tuple[str, int]:
    start = at
    while at < len(text) and text[at] in _TOKEN:
        at += 1
    return text[start:at], at


def _value(text: str, at: int) -> tuple[str, int]:
    if text[at : at + 1] != '"':
        return _token(text, at)
    at += 1
    value: list[str] = []
    while at < len(text) and text[at] != '"':
        if text[at] == "\\":
            at += 1
        value.append(text[at : at + 1])
        at += 1
    return "".join(value), at + 1
