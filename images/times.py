"""RFC 3339 times, as image configs have them, and nanoseconds."""

from __future__ import annotations

from datetime import UTC, datetime


def parse_ns(text: object) -> int:
    """Nanoseconds since the epoch; 0 for what is missing or no time, as in images without one."""
    if not isinstance(text, str):
        return 0
    head, dot, rest = text.partition(".")
    digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
    zone = rest[len(digits) :] if dot else ""
    try:
        seconds = int(datetime.fromisoformat(head + zone).timestamp())
    except (ValueError, OverflowError):
        return 0
    return seconds * 1_000_000_000 + int(digits[:9].ljust(9, "0") or 0) if seconds > 0 else 0


def format_ns(time_ns: int) -> str:
    """`2026-01-31T12:00:00.123456789Z`, without the fraction when it is zero."""
    seconds, fraction = divmod(time_ns, 1_000_000_000)
    text = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{text}.{fraction:09d}".rstrip("0") + "Z" if fraction else text + "Z"
