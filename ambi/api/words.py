"""Go's ways to write times."""

from __future__ import annotations

import time

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
