"""Pausing: nothing of an instance runs until it is resumed, or told to end."""

from __future__ import annotations

import logging

from ambi.core.deadline import Deadline
from ambi.core.errors import AmbiError, Conflict
from ambi.core.model import Status
from ambi.engine.core import Core
from ambi.engine.records import Record, Run

log = logging.getLogger(__name__)

CALL_S = 30.0


def pause(core: Core, id: str) -> None:
    record = core.registry.find(id)
    with record.lock:
        if record.removing:
            raise Conflict(f"container {record.id} is marked for removal and cannot be used")
        status, run = record.state.status, record.run
        if status is Status.PAUSED:
            raise Conflict(f"Container {record.id} is already paused", hint=f"ambi unpause {record.name}")
        if status is Status.RESTARTING:
            raise Conflict(f"Container {record.id} is restarting, wait until the container is running")
        if status is not Status.RUNNING or run is None:
            raise Conflict(f"Container {record.id} is not running", hint=f"ambi start {record.name}")
        run.connection.call("pause", by=Deadline.after(CALL_S))
        _show(core, record, run, Status.PAUSED)


def unpause(core: Core, id: str) -> None:
    record = core.registry.find(id)
    with record.lock:
        run = record.run
        if record.state.status is not Status.PAUSED or run is None:
            raise Conflict(f"Container {record.id} is not paused", hint="`ambi ps` shows what is")
        run.connection.call("resume", by=Deadline.after(CALL_S))
        _show(core, record, run, Status.RUNNING)


def release(core: Core, record: Record, run: Run) -> None:
    """It has been told to end, and cannot while it is paused. Without the lock: a stop that waits holds it."""
    if record.state.status is not Status.PAUSED:
        return
    try:
        run.connection.call("resume", by=Deadline.after(CALL_S))
    except AmbiError as error:  # it has ended meanwhile, or its shim is ended by force
        log.info("%s: resume: %s", record.id[:12], error)
    _show(core, record, run, Status.RUNNING)


def found(core: Core, record: Record, status: Status) -> None:
    """What a shim says that has outlived an engine, which may have died before it noted that. With the mutex held."""
    if {status, record.state.status} == {Status.PAUSED, Status.RUNNING}:
        core.set_state(record, record.state._replace(status=status))


def _show(core: Core, record: Record, run: Run, status: Status) -> None:
    """The state and the event, unless it has ended since or is so already."""
    with core.mutex:
        if record.run is run and record.state.running and record.state.status is not status:
            core.set_state(record, record.state._replace(status=status))
            core.publish(record, "pause" if status is Status.PAUSED else "unpause")
