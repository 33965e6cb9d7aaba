"""Sizes, times and command lines as docker prints them, and as people type them."""

from __future__ import annotations

import json
import time

from ambi.core import words
from ambi.core.errors import InvalidRequest
from ambi.core.words import human_duration

_DECIMAL = ("B", "kB", "MB", "GB", "TB", "PB")
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def size(count: float, digits: int = 3) -> str:
    """`1.22MB`: powers of 1000. Three digits in tables, four in sentences, as docker has it."""
    return _scaled(count, 1000, _DECIMAL, digits)


def binary_size(count: float) -> str:
    """`1.164MiB`: powers of 1024, as `docker stats`."""
    return _scaled(count, 1024, _BINARY, 4)


def _scaled(count: float, base: int, units: tuple[str, ...], digits: int) -> str:
    unit = 0
    while count >= base and unit < len(units) - 1:
        count /= base
        unit += 1
    text = f"{count:.{digits}g}"
    return f"{count:.0f}{units[unit]}" if "e" in text else f"{text}{units[unit]}"


def ago(epoch_seconds: float) -> str:
    return f"{human_duration(time.time() - epoch_seconds)} ago" if epoch_seconds > 0 else "N/A"


def shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def quoted(text: str) -> str:
    """A command as the column COMMAND shows it: in double quotes, specials escaped."""
    return json.dumps(text, ensure_ascii=False)


def local_time(epoch_seconds: float) -> str:
    """`2026-11-24 11:40:36 +0000 UTC`, as Go prints a local time."""
    at = time.localtime(epoch_seconds)
    return time.strftime("%Y-%m-%d %H:%M:%S %z %Z", at)


def rfc3339(epoch_seconds: float) -> str:
    """`2026-11-24T11:40:36Z`, or with an offset where local time has one."""
    at = time.localtime(epoch_seconds)
    return time.strftime("%Y-%m-%dT%H:%M:%S", at) + zone_of(at)


def zone_of(at: time.struct_time) -> str:
    """`Z` or `+01:00`."""
    zone = time.strftime("%z", at)
    return "Z" if zone == "+0000" else f"{zone[:3]}:{zone[3:]}"


def parse_size(flag: str, text: str) -> int:
    """Bytes of `64m`, `1.5g`, `512`; powers of 1024. Raises InvalidRequest."""
    found = words.parse_size(text)
    if found is None:
        hint = "a size looks like 512m, 1.5g or 1048576"
        raise InvalidRequest(f"invalid value for {flag}: '{text}' is no size", hint=hint)
    return found
