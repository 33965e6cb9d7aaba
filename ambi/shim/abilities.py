"""What only some drivers can do with a running workload, see "Abilities" of ambi/core/driver.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ambi.core.deadline import Deadline
from ambi.core.driver import Restorable
from ambi.core.errors import AmbiError, Unsupported
from ambi.core.model import Status


def hear_oom(created: object, told: Callable[[], None]) -> None:
    """Have `told` called whenever memory runs out inside, where the driver can tell."""
    if hasattr(created, "on_oom"):
        created.on_oom = told


def restorable(driver: Any) -> Restorable:
    """Raises Unsupported."""
    if not hasattr(driver, "restore"):
        raise Unsupported(f"a {driver.isolation.value} cannot go on from a snapshot", hint="start it without one")
    found: Restorable = driver
    return found


def thaw(created: Any, by: Deadline) -> None:
    """Before an end: what is frozen may not take a signal. A workload that cannot be resumed is ended by force later."""
    try:
        if created.state() is Status.PAUSED:
            created.resume(by)
    except AmbiError:
        return
