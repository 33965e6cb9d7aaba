"""Which module drives which isolation. Loaded by name, because drivers are on the same floor as the shim."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Protocol

from ambi.core.driver import Driver
from ambi.core.errors import AmbiError, InvalidRequest, Unsupported

TABLE = {"container": "runtime.driver:ContainerDriver", "vm": "hyper.driver:VmDriver"}


class Parkable(Driver, Protocol):
    """A driver that can do a part of `create` before there is a plan, in the very process that creates later."""

    def park(self, run_dir: Path) -> None:
        """Prepare, if that saves anything on this host. Failing is no error."""

    def unpark(self) -> None:
        """Remove what `park` made and nobody used, be it of a process that has been killed."""


def preload() -> dict[str, str]:
    """Import every driver that can be imported, so that no shim has to, and let it do the same by its `preload`.

    Returns why others could not be imported, by isolation.
    """
    failures = {}
    for isolation, place in TABLE.items():
        try:
            getattr(import_module(place.partition(":")[0]), "preload", lambda: None)()
        except ImportError as error:
            failures[isolation] = str(error)
    return failures


def find(isolation: str) -> type[Driver]:
    """The driver's class. Raises InvalidRequest for an unknown isolation, Unsupported when it is not installed."""
    if isolation not in TABLE:
        raise InvalidRequest(f"unknown isolation '{isolation}'; there are {', '.join(TABLE)}")
    module, _, name = TABLE[isolation].partition(":")
    try:
        found: type[Driver] = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise Unsupported(f"the driver for isolation '{isolation}' cannot be loaded: {error}") from error
    return found


def load(isolation: str) -> Driver:
    """A driver for `isolation`; errors as `find`."""
    return find(isolation)()


def parkable(isolation: str) -> Parkable | None:
    """A driver for `isolation` that can be parked, None when it cannot or is not installed."""
    try:
        driver = load(isolation)
    except AmbiError:
        return None
    return driver if hasattr(driver, "park") and hasattr(driver, "unpark") else None  # type: ignore[return-value]
