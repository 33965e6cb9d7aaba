"""Go's and Docker's ways to write times, durations and keys."""

from __future__ import annotations

import time

from ambi.core.errors import InvalidRequest

NEVER = "0001-01-01T00:00:00Z"  # Go's zero time
_SECOND_NS = 1_000_000_000


def rfc3339_nano(time_ns: int) -> str:
    """Go's RFC3339Nano in UTC, zeros at the end of the fraction left out; 0 is Go's zero time."""
    if time_ns == 0:
        return NEVER
    seconds, fraction = divmod(time_ns, _SECOND_NS)
    text = _to_the_second(seconds)
    return f"{text}.{fraction:09}".rstrip("0") + "Z" if fraction else f"{text}Z"


def log_time(time_ns: int) -> str:
    """The time before a log line: always nine digits."""
    seconds, fraction = divmod(time_ns, _SECOND_NS)
    return f"{_to_the_second(seconds)}.{fraction:09}Z"


def _to_the_second(seconds: int) -> str:
    at = time.gmtime(seconds)
    return f"{at.tm_year:04}-{at.tm_mon:02}-{at.tm_mday:02}T{at.tm_hour:02}:{at.tm_min:02}:{at.tm_sec:02}"


def human_duration(seconds: float) -> str:
    """`5 minutes`, `About an hour`: as docker ps says it (go-units HumanDuration)."""
    whole, hours = int(seconds), int(seconds / 3600 + 0.5)
    if whole < 1:
        return "Less than a second"
    if whole == 1:
        return "1 second"
    if whole < 60:
        return f"{whole} seconds"
    minutes = int(seconds / 60)
    if minutes == 1:
        return "About a minute"
    if minutes < 60:
        return f"{minutes} minutes"
    if hours == 1:
        return "About an hour"
    for limit, unit, name in (
        (48, 1, "hours"),
        (24 * 14, 24, "days"),
        (24 * 60, 24 * 7, "weeks"),
        (24 * 730, 24 * 30, "months"),
    ):
        if hours < limit:
            return f"{hours // unit} {name}"
    return f"{int(seconds / 3600) // 24 // 365} years"


def detach_keys(text: str) -> bytes | None:
    """`ctrl-p,ctrl-q` as the bytes that a terminal sends for it; None for nothing given. Raises InvalidRequest."""
    if not text:
        return None
    keys = bytearray()
    for key in text.split(","):
        control = key[5:].lower() if key.lower().startswith("ctrl-") else ""
        if len(key) == 1 and ord(key) < 128:
            keys.append(ord(key))
        elif len(control) == 1 and control in "abcdefghijklmnopqrstuvwxyz@[\\]^_":
            keys.append(ord(control.upper()) & 0x1F)
        else:
            raise InvalidRequest(
                f"Invalid detach keys ({text}) provided: {key!r} is no key", hint="use keys like ctrl-p,ctrl-q or a,b"
            )
    return bytes(keys)
