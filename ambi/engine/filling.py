"""Filling empty volumes with what the image has where they are mounted: at create, as Docker does it, and never again.

A shim does it, as it looks into the root of an instance that does not run: a container's root is made of the image's layers,
for a VM too, with the volumes mounted (`ambi.copy` of ambi/core/plan.py). What a death leaves half copied is in a directory
of its own in the volume, and whoever fills that next begins again.

Volumes that are a file system of their own are not mounted at create, and a subpath is resolved at start: those are filled
by the driver when the first instance with them starts.
"""

from __future__ import annotations

import os
import shutil

from ambi.core.deadline import Deadline
from ambi.core.errors import AmbiError, Unavailable, from_os_error
from ambi.core.model import Isolation
from ambi.core.plan import LAUNCH_FILE, Layers
from ambi.engine import spec
from ambi.engine.core import Core
from ambi.engine.files import write_whole
from ambi.engine.mountedvolumes import KINDS
from ambi.engine.mountpoints import Point, points_of
from ambi.engine.records import Record
from ambi.engine.state import Row
from runtime import copyup

_COPY, _SUBPATH = "ambi.copy", "ambi.subpath="
_SCRATCH = "filling"  # in the directory of the instance: an upper for what is to be mounted on
_FILL_S = 3600.0
_END_S = 60.0


def fill(core: Core, row: Row) -> Row:
    """`row`, whose record is not written yet, with its volumes filled. Raises what the copy raises; its volumes are as they
    were then, but for what of a copy is left for the next one."""
    points = points_of(row.mounts)
    ours = [point for point in points if _is_filled_here(core, point)]
    empty = tuple(point for point in ours if _is_empty(point))
    if empty:
        _fill(core, row, empty)
    return row._replace(mounts=tuple((_without_copy(point) if point in ours else point).stored() for point in points))


def _is_filled_here(core: Core, point: Point) -> bool:
    if point.what != "bind" or _COPY not in point.words or any(word.startswith(_SUBPATH) for word in point.words):
        return False
    return core.volumes.find(point.name).kind not in KINDS


def _is_empty(point: Point) -> bool:
    try:
        found = set(os.listdir(point.origin))
    except OSError:  # the start says what is wrong with it
        return False
    return not found or bool(found & {copyup.COPYING, copyup.COPIED})


def _without_copy(point: Point) -> Point:
    return point._replace(words=tuple(word for word in point.words if word != _COPY))


def _fill(core: Core, row: Row, points: tuple[Point, ...]) -> None:
    data, run_dir = core.roots.instance_data(row.id), core.roots.instance_run(row.id)
    layers = Layers(core.store.layers(core.store.resolve(row.image_id)), data / _SCRATCH)
    prepared = spec.prepare(row.id, row.isolation, row.spec, data, points=points)
    plan = spec.plan(row.id, row.isolation, row.spec, layers, core.roots, prepared)
    config = {**plan.config, "mounts": [point.entry() for point in points], "root": {"path": "rootfs"}}
    plan = plan._replace(isolation=Isolation.CONTAINER, config=config, files=(), vm=None)
    try:
        write_whole(data / LAUNCH_FILE, plan.to_json())
        try:
            _look(core, Record(row))
        finally:
            (data / LAUNCH_FILE).unlink()
            for directory in (data / _SCRATCH, run_dir):
                if directory.exists():
                    shutil.rmtree(directory)
    except OSError as error:
        raise from_os_error(f"cannot fill the volumes of container {row.name}", error) from error


def _look(core: Core, record: Record) -> None:
    """By looking, the root is made with its mounts, and these are filled."""
    run = core.shims.spawn(record, starts=False)
    run.failed = True  # one that is killed is swept after
    try:
        run.connection.call("tree", verb="stat", path="/", by=Deadline.after(_FILL_S))
        run.connection.call("tree", verb="leave", by=Deadline.after(_END_S))
    except AmbiError:
        core.shims.end(record, run)
        raise
    if not run.gone.wait(_END_S):
        core.shims.end(record, run)
        raise Unavailable(f"container {record.row.name}: what has filled its volumes does not end")
