"""Progress of long work, told to whoever subscribes and never printed by the layer that works."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Progress(NamedTuple):
    """One step of a unit of work.

    unit: what it is about (a short digest, a layer, a package), "" for the whole; status: a phrase ("Extracting").
    done, total: in bytes when both are positive; total 0 is unknown.
    """

    unit: str
    status: str
    done: int = 0
    total: int = 0


ProgressSink = Callable[[Progress], None]


def ignore(_: Progress) -> None:
    """A sink for callers that do not watch."""
