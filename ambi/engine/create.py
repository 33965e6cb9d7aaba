"""Making an instance: its record, its directory and its name. No process and nothing in the kernel yet."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ambi.core.deadline import Deadline
from ambi.core.errors import Conflict, InvalidRequest, NotFound, from_os_error
from ambi.core.model import IdMap, InstanceId, Isolation, Workload
from ambi.core.model import Status as S
from ambi.core.undo import Undo
from ambi.engine import diskquota, filling, mounts, names, request, spec
from ambi.engine.body import Body
from ambi.engine.core import Core
from ambi.engine.files import write_whole as write_whole
from ambi.engine.records import Record
from ambi.engine.state import Row, dumps
from ambi.engine.types import CreateSpec, State

if TYPE_CHECKING:
    from images.store import Image

RECORD_FILE = "record.json"
RECORD_FORMAT = 1
UPPER = "upper"
_LEAVE_S = 10.0  # for an instance that removes itself to be gone


def create(core: Core, name: str | None, asked: CreateSpec) -> tuple[InstanceId, list[str]]:
    """See `Engine.create`. Nothing is left behind when it fails."""
    warnings = request.check(asked)
    config = Body("Config", asked.config)
    image_name = config.text("Image")
    if not image_name:
        raise InvalidRequest("no image specified")
    try:
        image = core.store.resolve(image_name)
    except NotFound as error:
        raise NotFound(f"No such image: {_familiar(image_name)}", hint=error.hint) from error
    with core.claim(image.id):
        core.store.resolve(image.id)  # it was there before it was claimed; now it stays
        return _create(core, name, asked, image), warnings


def _create(core: Core, name: str | None, asked: CreateSpec, image: Image) -> InstanceId:
    id = InstanceId(names.new_id())
    isolation = request.isolation_of(Body("HostConfig", asked.host))
    size_bytes = diskquota.wanted_bytes(Body("HostConfig", asked.host), isolation)
    if isolation is Isolation.CONTAINER:
        diskquota.check(core.roots.data, size_bytes)
    full = request.complete(asked, image.config.get("config") or {}, id)
    spec.prepare(id, isolation, full, core.roots.instance_data(id))
    asked_mounts = mounts.parse(Body("Config", full.config), Body("HostConfig", full.host))
    with core.volumes.claimed(asked_mounts, isolation) as points, Undo() as undo:
        name = names.checked(name) if name else names.random_name(core.registry.names())
        _reserve(core, name, id)
        undo.add(f"release the name {name}", lambda: core.registry.release(name))
        row = Row(
            id=id,
            name=name,
            workload=Workload.OCI,
            isolation=isolation,
            image_id=image.id,
            image=asked.config["Image"],
            spec=full,
            id_map=None,
            created_ns=time.time_ns(),
            state=State(S.CREATED),
            restart_count=0,
            boot_id=core.boot_id,
            mounts=tuple(point.stored() for point in points),
        )
        data = core.roots.instance_data(id)
        try:
            data.mkdir(0o710)
            undo.add(f"remove {data}", lambda: shutil.rmtree(data))
            (data / UPPER).mkdir(0o700)
            if size_bytes and isolation is Isolation.CONTAINER:
                undo.add("forget the limit of its disk", lambda: diskquota.release(data / UPPER))
                diskquota.apply(data / UPPER, id, size_bytes)
            row = filling.fill(core, row)
            write_record(data, row)
        except OSError as error:
            raise from_os_error(f"cannot create container '{name}'", error) from error
        core.db.insert(row)
        undo.keep()
        record = Record(row)
        core.registry.add(record)  # from here on it counts as a user of its volumes
    core.publish(record, "create")
    return id


def _familiar(name: str) -> str:
    """`name` with the tag that Docker adds to it in its answer."""
    last = name.rpartition("/")[2]
    return name if ":" in last or "@" in name else f"{name}:latest"


def _reserve(core: Core, name: str, id: InstanceId) -> None:
    """Take `name`. One that an instance still has which is about to remove itself is waited for: whoever ran that has been
    told its end, perhaps by a shim, when the engine that was to remove it had been killed.
    """
    try:
        core.registry.reserve(name, id)
        return
    except Conflict:
        try:
            owner = core.registry.find(name)
        except NotFound:  # gone meanwhile, or not there yet
            owner = None
        if owner is not None and not _leaves(owner):
            raise
    if owner is not None:
        core.wait_for(lambda: owner.id not in core.registry, Deadline.after(_LEAVE_S))
    core.registry.reserve(name, id)


def _leaves(record: Record) -> bool:
    """Whether it is being removed, or has ended and removes itself."""
    return record.removing or (record.auto_remove and not record.state.running and record.state.finished_ns > 0)


def write_record(data: Path, row: Row) -> None:
    """Have `record.json` hold what state.db has of the instance but its state. It appears whole."""
    body = {
        "format": RECORD_FORMAT,
        "id": row.id,
        "name": row.name,
        "workload": row.workload.value,
        "isolation": row.isolation.value,
        "image_id": row.image_id,
        "image": row.image,
        "spec": row.spec,
        "id_map": {"uids": row.id_map.uids, "gids": row.id_map.gids} if row.id_map else None,
        "created_ns": row.created_ns,
        "mounts": row.mounts,
    }
    write_whole(data / RECORD_FILE, dumps(body))


def read_record(data: Path) -> Row | None:
    """What `write_record` wrote, as an instance that has ended or never ran; None when it is missing or damaged."""
    from ambi.core.model import IdRange

    try:
        body = json.loads((data / RECORD_FILE).read_bytes())
        if body["format"] != RECORD_FORMAT or body["id"] != data.name:
            return None
        ids = body["id_map"]
        ranges = {key: tuple(IdRange(*x) for x in ids[key]) for key in ("uids", "gids")} if ids else None
        return Row(
            id=InstanceId(body["id"]),
            name=body["name"],
            workload=Workload(body["workload"]),
            isolation=Isolation(body["isolation"]),
            image_id=body["image_id"],
            image=body["image"],
            spec=CreateSpec(*body["spec"]),
            id_map=IdMap(ranges["uids"], ranges["gids"]) if ranges else None,
            created_ns=body["created_ns"],
            state=State(S.CREATED),
            restart_count=0,
            boot_id="",
            mounts=tuple(body.get("mounts", ())),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
