"""`/containers/ID/checkpoints`: snapshots of virtual machines, in docker's words.

POST   /containers/ID/checkpoints        {"CheckpointID": NAME, "Exit": whether it ends}   201; without a name
                                         the first free one is taken, and the answer is {"Name"}
GET    /containers/ID/checkpoints        [{"Name"}], and of ours in each: "Created", "Size", "MemorySize", "Parent",
                                         "StoodStill", "Problem"
DELETE /containers/ID/checkpoints/NAME   204
POST   /containers/ID/start?checkpoint=NAME&force=   204; containers.py
GET    /ambi/snapshots                   the same as the list, of all instances, with "Instance" and "InstanceName"

Created is seconds since the epoch, Size bytes on the disk, MemorySize the guest's memory, StoodStill how many nanoseconds
the guest stood still, Problem why one is of no use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ambi.api.exchange import NO_CONTENT, Call, Reply, json_reply
from ambi.api.router import Route
from ambi.core.errors import InvalidRequest, Unsupported

if TYPE_CHECKING:
    from ambi.engine.snapshots import Info


def create(call: Call) -> Reply:
    body = call.json_body()
    name, stop = body.get("CheckpointID") or "", body.get("Exit") or False
    if not isinstance(name, str) or not isinstance(stop, bool):
        raise InvalidRequest("CheckpointID must be a string and Exit a boolean")
    refuse_directory(body.get("CheckpointDir"))
    return json_reply({"Name": call.engine.save(call.name, name, stop=stop)}, 201)


def refuse_directory(path: object) -> None:
    if path:
        raise Unsupported(
            f"checkpoints cannot be kept in a directory of one's own: {path}",
            hint="leave --checkpoint-dir away: they lie with their instance",
        )


def list_(call: Call) -> Reply:
    refuse_directory(call.query.text("dir"))
    return json_reply([_shown(it) for it in call.engine.snapshots(call.name)])


def list_all(call: Call) -> Reply:
    rows = call.engine.snapshots()
    return json_reply([{"Instance": it.instance_id, "InstanceName": it.instance_name, **_shown(it)} for it in rows])


def _shown(it: Info) -> dict[str, Any]:
    return {
        "Name": it.name,
        "Created": it.created_ns // 1_000_000_000,
        "Size": it.size_bytes,
        "MemorySize": it.memory_bytes,
        "Parent": it.parent,
        "StoodStill": it.still_ns,
        "Problem": it.problem,
    }


def delete(call: Call) -> Reply:
    refuse_directory(call.query.text("dir"))
    instance, _, name = call.name.rpartition("/")
    call.engine.remove_snapshot(instance, name)
    return NO_CONTENT


ROUTES = (
    Route("POST", "/containers/{}/checkpoints", create),
    Route("GET", "/containers/{}/checkpoints", list_),
    Route("DELETE", "/containers/{}/checkpoints/{}", delete),
    Route("GET", "/ambi/snapshots", list_all),
)
