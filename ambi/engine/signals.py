"""Signals by name and number, as Docker takes them."""

from __future__ import annotations

import signal

from ambi.core.errors import InvalidRequest

_NUMBERS = {s.name: int(s) for s in signal.Signals} | {"SIGIOT": 6, "SIGPOLL": 29, "SIGUNUSED": 31, "SIGCLD": 17}
_RTMIN, _RTMAX = 34, 64


def parse(text: str) -> int:
    """`TERM`, `SIGTERM`, `15`, `RTMIN+3`. Raises InvalidRequest (`Invalid signal: X`)."""
    if text.isascii() and text.isdigit():
        if 0 < int(text) <= _RTMAX:
            return int(text)
        raise InvalidRequest(f"Invalid signal: {text}", hint="a name or number of `kill -l`, for example TERM")
    name = text.upper()
    name = name if name.startswith("SIG") else f"SIG{name}"
    if name in _NUMBERS:
        return _NUMBERS[name]
    for base, start, sign in (("SIGRTMIN+", _RTMIN, 1), ("SIGRTMAX-", _RTMAX, -1)):
        rest = name.removeprefix(base)
        if rest != name and rest.isascii() and rest.isdigit() and _RTMIN <= start + sign * int(rest) <= _RTMAX:
            return start + sign * int(rest)
    raise InvalidRequest(f"Invalid signal: {text}", hint="a name or number of `kill -l`, for example TERM")
