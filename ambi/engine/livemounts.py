"""Volumes and paths of the host that a running instance gets and loses: for the rest of the run, and no longer.

Its shim keeps what is attached (`mounts` of its `state`), so an engine that is started again knows it. A volume is in use
while it is attached, as one that an instance's own configuration names.
"""

from __future__ import annotations

import logging

from ambi.core.deadline import Deadline
from ambi.core.errors import AmbiError, Conflict, InvalidRequest, NotFound
from ambi.core.plan import LaunchPlan
from ambi.engine import mounts
from ambi.engine.body import Body
from ambi.engine.core import Core
from ambi.engine.mountpoints import Asked, Point
from ambi.engine.records import Record, Run

log = logging.getLogger(__name__)

CALL_S = 60.0


def attach(core: Core, id: str, volume: str) -> Point:
    """Mount `volume`, what `-v` takes: SOURCE:TARGET[:MODE]. When it fails nothing is mounted or held, and nothing made but
    a source that was missing.

    Raises NotFound, InvalidRequest, Conflict (it does not run, or has something there), Unsupported.
    """
    record = core.registry.find(id)
    asked = _asked(volume)
    with record.lock:
        run = _running(record)
        with core.volumes.claimed(asked, record.row.isolation) as points:
            point = points[0]
            _check_target(core, record, run, point.target)
            core.volumes.check_attach(record, point)
            core.volumes.keep(point)  # an engine that dies now is told of it by the shim, but not before it counts users
            core.volumes.hold_one(record, point)
            try:
                run.connection.call("mount", mount=point.entry(), note=point.stored(), by=Deadline.after(CALL_S))
            except BaseException as error:
                core.volumes.let_go(record, point)
                if isinstance(error, AmbiError) and error.hint is None:
                    raise type(error)(error.message, hint="attach it at another path") from error
                raise
            with core.mutex:
                run.mounts[point.target] = point
        core.volumes.tell_mounted(record, point)
    return point


def _asked(volume: str) -> Asked:
    """Raises InvalidRequest. What an image has at the target is not copied: it is in use already."""
    asked = mounts.parse(Body("Config", {}), Body("HostConfig", {"Binds": [volume]}))
    return asked._replace(volumes=tuple(ask._replace(copy=False) for ask in asked.volumes))


def _running(record: Record) -> Run:
    run = record.run
    if record.removing or not record.state.running or run is None or run.exit is not None:
        raise Conflict(f"container {record.id} is not running", hint=f"ambi start {record.name}")
    return run


def _check_target(core: Core, record: Record, run: Run, target: str) -> None:
    if target in run.mounts:
        raise Conflict(
            f"something is attached at {target} of {record.name} already", hint=f"ambi volume detach {record.name} {target}"
        )
    if target in _own(core, record):
        raise Conflict(f"{record.name} has a mount of its own at {target}", hint="attach it at another path")


def _own(core: Core, record: Record) -> set[str]:
    """Where the run has mounts by its configuration."""
    plan = LaunchPlan.load(core.roots.instance_data(record.id))
    return {str(entry["destination"]) for entry in plan.config["mounts"]} | {str(file.path) for file in plan.files}


def detach(core: Core, id: str, target: str, *, force: bool) -> None:
    """Unmount what is attached at `target`. force: also while it is in use, for whom it then stays until he lets go.

    Raises NotFound, InvalidRequest, Conflict (in use, not attached but the instance's own, it does not run).
    """
    record = core.registry.find(id)
    if not target.startswith("/"):
        raise InvalidRequest(f"target must be an absolute path, not {target!r:.200}", hint="for example target=/data")
    with record.lock:
        run = _running(record)
        point = run.mounts.get(mounts.clean_target(target))
        if point is None:
            if mounts.clean_target(target) in _own(core, record):
                raise Conflict(
                    f"the mount at {target} is of the configuration of {record.name} and cannot be detached",
                    hint="make the instance again without it",
                )
            raise NotFound(
                f"nothing is attached at {target} of {record.name}", hint=f"ambi inspect {record.name} lists its mounts"
            )
        try:
            run.connection.call("unmount", destination=point.target, force=force, by=Deadline.after(CALL_S))
        except Conflict as error:
            hint = f"end what uses it, or ambi volume detach --force {record.name} {point.target}"
            raise Conflict(f"cannot detach {point.target} of {record.name}: {error.message}", hint=hint) from error
        with core.mutex:
            del run.mounts[point.target]
        core.volumes.let_go(record, point)
        core.volumes.tell_unmounted(record, point)


def adopted(run: Run, notes: object) -> None:
    """What a shim that lives on has attached. With the mutex held."""
    for note in notes if isinstance(notes, list) else ():
        try:
            point = Point.of(note)
        except (TypeError, KeyError, AmbiError) as error:  # of another version
            log.warning("a mount of a running instance is not understood: %s", error)
        else:
            run.mounts[point.target] = point
