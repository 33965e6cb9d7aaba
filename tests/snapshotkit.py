"""Snapshots of a driver's VMs, for tests of both back-ends: save, publish, restore, and a workload that counts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ambi.core.deadline import Deadline
from ambi.core.loop import Loop
from ambi.core.plan import LaunchPlan
from ambi.core.undo import Undo
from hyper.vm import snapshots
from tests import driverkit

# Counts in memory, prints each number, and keeps the last one in a file.
COUNT = "i=0; while :; do i=$((i+1)); echo $i; echo $i > /last; sleep 0.05; done"


def home_of(plan: LaunchPlan, name: str) -> Path:
    return plan.data_dir / snapshots.DIRECTORY / name


def save(running: driverkit.Running, name: str) -> dict[str, Any]:
    """A snapshot of a running VM, published; its manifest."""
    home = home_of(running.created._plan, name)  # type: ignore[attr-defined]
    snapshots.make(home)
    try:
        manifest: dict[str, Any] = running.created.save(home, {}, Deadline.after(120))  # type: ignore[attr-defined]
    except BaseException:
        snapshots.discard(home)
        raise
    snapshots.publish(home, manifest, Deadline.after(120))
    return manifest


@contextlib.contextmanager
def restored(rig: driverkit.Rig, plan: LaunchPlan, name: str) -> Iterator[driverkit.Running]:
    """The VM of `plan` from its snapshot; deleted on the way out."""
    loop = Loop()
    with Undo() as undo:
        created = rig.driver.restore(plan, home_of(plan, name), undo, Deadline.after(120), loop)  # type: ignore[attr-defined]
        undo.keep()
    running = driverkit.Running(created, loop)
    try:
        created.start(Deadline.after(60))
        yield running
    finally:
        running.init.release()
        created.delete(Deadline.after(30))


def numbers(running: driverkit.Running) -> list[int]:
    """What it has printed, whole lines only."""
    return [int(word) for word in running.init.out[: running.init.out.rfind(b"\n") + 1].split()]


def until_more(running: driverkit.Running, count: int) -> list[int]:
    """Let it print `count` numbers more; all of them."""
    before = len(numbers(running))
    running.init.until(lambda: len(numbers(running)) >= before + count)
    return numbers(running)
