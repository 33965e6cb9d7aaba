"""Docker's small grammars that both the command line and the API speak."""

from __future__ import annotations

import time

from ambi.core.errors import InvalidRequest

_SIZE_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50}
_DURATION_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


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


def parse_duration(text: str) -> float | None:
    """Seconds of a Go duration (`1h30m`, `500ms`), None when it is none."""
    rest, total = text, 0.0
    while rest:
        end = 0
        while end < len(rest) and (rest[end].isdigit() or rest[end] == "."):
            end += 1
        unit_end = end
        while unit_end < len(rest) and not (rest[unit_end].isdigit() or rest[unit_end] == "."):
            unit_end += 1
        try:
            total += float(rest[:end]) * _DURATION_UNITS[rest[end:unit_end]]
        except (ValueError, KeyError):
            return None
        rest = rest[unit_end:]
    return total if text else None


def parse_size(text: str) -> int | None:
    """Bytes of `512m`, `10GiB`, `1.5g` or a bare number, None when it is none: powers of 1024 (go-units RAMInBytes)."""
    lower = text.strip().lower().removesuffix("b").removesuffix("i")
    unit = lower[-1:] if lower[-1:].isalpha() else ""
    digits = lower.removesuffix(unit).strip() if unit else lower
    plain = digits.replace(".", "", 1)
    if unit not in _SIZE_UNITS or not (plain.isascii() and plain.isdecimal()) or len(digits) > 20 or digits.startswith("."):
        return None
    return int(float(digits) * _SIZE_UNITS[unit]) if "." in digits else int(digits) * _SIZE_UNITS[unit]


def parse_time(flag: str, text: str) -> str:
    """What the API takes for `--since` and `--until`: seconds since the epoch with nine decimals.

    text: `42m` (ago), RFC 3339 with or without zone or time, or seconds since the epoch. Raises InvalidRequest.
    """
    ago_seconds = parse_duration(text)
    if ago_seconds is not None:
        return f"{time.time() - ago_seconds:.9f}"
    if text.isascii() and text.replace(".", "", 1).isdigit():
        whole, _, fraction = text.partition(".")
        return f"{whole or 0}.{fraction:0<9.9}"
    from datetime import datetime

    head, dot, tail = text.partition(".")
    fraction = ""
    if dot:  # datetime takes six digits of a fraction, the log has nine
        while tail and tail[0].isdigit():
            fraction, tail = fraction + tail[0], tail[1:]
    try:
        at = datetime.fromisoformat(head + tail)
    except ValueError:
        hint = "a time looks like 42m, 2026-01-02T13:23:37Z or 1767359017"
        raise InvalidRequest(f"invalid value for {flag}: '{text}' is no time", hint=hint) from None
    return f"{int(at.timestamp())}.{fraction:0<9.9}"


def point_ns(filter: str, text: str) -> int:
    """A point in time as a filter of a list names it, in whatever form `parse_time` takes, in nanoseconds since 1970."""
    try:
        return int(parse_time(filter, text).replace(".", ""))
    except (InvalidRequest, ValueError, OverflowError) as error:
        hint = "a time looks like 24h (ago), 2026-01-02T13:23:37Z or 1767359017"
        raise InvalidRequest(f"invalid filter '{filter}={text}'", hint=hint) from error


def detach_keys(text: str) -> bytes:
    """`ctrl-p,ctrl-q` as the bytes that a terminal sends: letters as they are, `ctrl-` with a letter or one of `@[\\]^_`.

    Raises InvalidRequest.
    """
    keys = bytearray()
    for key in text.split(","):
        control = key[5:].lower() if key.lower().startswith("ctrl-") else ""
        if len(key) == 1 and key.isascii():
            keys.append(ord(key))
        elif len(control) == 1 and control in "abcdefghijklmnopqrstuvwxyz@[\\]^_":
            keys.append(ord(control.upper()) & 0x1F)
        else:
            hint = "use keys like ctrl-p,ctrl-q or a,b"
            raise InvalidRequest(f"Invalid detach keys ({text}) provided: {key!r} is no key", hint=hint)
    return bytes(keys)


def is_address(text: str) -> bool:
    """Whether `text` is an IPv4 or IPv6 address, without a zone."""
    import socket  # rarely needed, and not free where a fresh interpreter starts

    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, text)
        except OSError:  # not of this family
            continue
        return True
    return False
