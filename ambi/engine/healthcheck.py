"""What a health check is: Docker's Healthcheck object, checked, completed from the image, and read."""

from __future__ import annotations

from typing import Any, NamedTuple

from ambi.core.errors import InvalidRequest
from ambi.engine.body import Body

_MILLISECOND_NS = 1_000_000
_DEFAULTS = {"Interval": 30.0, "Timeout": 30.0, "StartPeriod": 0.0, "StartInterval": 5.0}


class Check(NamedTuple):
    """A health check that is to be run. command: what is executed. Times in seconds."""

    command: tuple[str, ...]
    interval: float
    timeout: float
    start_period: float
    start_interval: float
    retries: int


def check_config(config: Body) -> None:
    """Refuse what cannot be a health check, in Docker's words."""
    body = config.object("Healthcheck")
    test = body.strings("Test")
    if test and test[0] not in ("NONE", "CMD", "CMD-SHELL"):
        raise InvalidRequest(f"Unknown healthcheck type '{test[0]}'", hint='["CMD", ...], ["CMD-SHELL", "..."] or ["NONE"]')
    if test and test[0] != "NONE" and (len(test) < 2 or (test[0] == "CMD-SHELL" and len(test) != 2)):
        raise InvalidRequest(f"Healthcheck {test[0]} needs a command", hint="--health-cmd 'COMMAND'")
    for name in _DEFAULTS:
        value = body.number(name)
        if value and value < _MILLISECOND_NS:
            raise InvalidRequest(f"{name} in Healthcheck cannot be less than 1ms", hint="--health-interval 30s")
    if body.number("Retries") < 0:
        raise InvalidRequest("Retries in Healthcheck cannot be negative", hint="--health-retries 3")


def merged(own: dict[str, Any] | None, image: dict[str, Any] | None) -> dict[str, Any] | None:
    """What an instance has: its own check over that of the image, field by field."""
    if not own:
        return image or None
    if not image:
        return own
    return {**image, **{key: value for key, value in own.items() if value}}


def check_of(config: dict[str, Any]) -> Check | None:
    """The check of a completed config, None without one."""
    body = Body("Config", config).object("Healthcheck")
    test = body.strings("Test")
    if not test or test[0] == "NONE":
        return None
    shell = Body("Config", config).strings("Shell") or ["/bin/sh", "-c"]
    command = (*shell, test[1]) if test[0] == "CMD-SHELL" else tuple(test[1:])
    times = [(body.number(name) / 1e9 or default) for name, default in _DEFAULTS.items()]
    return Check(command, times[0], times[1], times[2], times[3], body.number("Retries") or 3)
