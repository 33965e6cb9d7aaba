"""What `run`, `create` and `update` say of restarts and health checks, as Docker's objects."""

from __future__ import annotations

from typing import Any

from ambi.core.errors import InvalidRequest
from ambi.core.words import parse_duration

_TIMES = {"interval": "Interval", "timeout": "Timeout", "start_period": "StartPeriod", "start_interval": "StartInterval"}


def restart(text: str | None, *, removes: bool = False) -> dict[str, Any]:
    """RestartPolicy of `on-failure:3`; the engine knows which policies there are. removes: --rm is given."""
    name, colon, number = (text or "no").partition(":")
    if not name:
        raise _wrong("no policy provided before colon")
    if colon and not number.removeprefix("-").isdecimal():
        raise _wrong("maximum retry count must be an integer")
    if removes and name != "no":
        raise InvalidRequest("--restart and --rm exclude each other", hint="leave one of them out")
    return {"Name": name, "MaximumRetryCount": int(number or 0)}


def _wrong(what: str) -> InvalidRequest:
    return InvalidRequest(f"invalid value for --restart: {what}", hint="no, always, unless-stopped or on-failure[:N]")


def health(flags: dict[str, Any]) -> dict[str, Any] | None:
    """Healthcheck of the --health flags, None when none is given."""
    found: dict[str, Any] = {}
    if flags["health_cmd"]:
        found["Test"] = ["CMD-SHELL", flags["health_cmd"]]
    for name, key in _TIMES.items():
        if flags[f"health_{name}"]:
            found[key] = _nanoseconds(f"--health-{name.replace('_', '-')}", flags[f"health_{name}"])
    if flags["health_retries"]:
        found["Retries"] = flags["health_retries"]
    if flags["no_healthcheck"]:
        if found:
            raise InvalidRequest("--no-healthcheck excludes the --health options", hint="leave one of them out")
        return {"Test": ["NONE"]}
    return {key: value for key, value in found.items() if value} or None


def _nanoseconds(flag: str, text: str) -> int:
    seconds = parse_duration(text.removeprefix("-"))
    if seconds is None and text != "0":
        raise InvalidRequest(
            f"invalid value for {flag}: '{text}' is no duration", hint="a duration looks like 1m30s or 500ms"
        )
    if text.startswith("-"):
        raise InvalidRequest(f"{flag} cannot be negative", hint=f"{flag} 30s")
    return round((seconds or 0) * 1e9)
