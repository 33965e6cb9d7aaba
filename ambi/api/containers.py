"""`/containers`: the life of instances, all but what streams (see streams.py, logs.py, stats.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ambi.api import instance_shapes as shapes
from ambi.api.checkpoints import refuse_directory
from ambi.api.exchange import NO_CONTENT, Call, Reply, json_reply
from ambi.api.query import Query
from ambi.api.router import Route
from ambi.api.top import table
from ambi.core.errors import AmbiError, InvalidRequest, NotFound, Unsupported
from ambi.core.model import Isolation
from ambi.engine.query import tree_bytes
from ambi.engine.types import CreateSpec, Instance

if TYPE_CHECKING:
    from ambi.engine.engine import Engine

_LIST_FILTERS = frozenset((
    "ancestor", "before", "exited", "expose", "health", "id", "is-task", "isolation", "label", "name", "network", "publish",
    "since", "status", "volume",
))  # fmt: skip
_PRUNE_FILTERS = frozenset(("label", "label!", "until"))


def list_containers(call: Call) -> Reply:
    query = call.query
    filters = query.filters(_LIST_FILTERS)
    limit = query.number("limit") or 0
    before, since = query.text("before") or None, query.text("since") or None
    every = query.flag("all") or limit > 0 or before is not None or since is not None
    instances = call.engine.list(every, filters, max(0, limit), before, since)
    rows = [shapes.summary(instance) for instance in instances]
    if query.flag("size"):
        for row, instance in zip(rows, instances, strict=True):
            row.update(sizes(call.engine, instance))
    return json_reply(rows)


def create(call: Call) -> Reply:
    body = call.json_body()
    platform = call.query.text("platform")
    if platform not in ("", "linux", "linux/amd64", "linux/x86_64"):
        raise Unsupported(f"platform {platform} cannot run here", hint="leave --platform away, or use linux/amd64")
    host = body.pop("HostConfig", None) or {}
    networking = body.pop("NetworkingConfig", None) or {}
    if not isinstance(host, dict) or not isinstance(networking, dict):
        raise InvalidRequest("HostConfig and NetworkingConfig must be JSON objects")
    if not body:
        raise InvalidRequest("config cannot be empty in order to create a container")
    id, warnings = call.engine.create(call.query.text("name") or None, CreateSpec(body, host, networking))
    return json_reply({"Id": id, "Warnings": warnings}, 201)


def inspect(call: Call) -> Reply:
    instance = call.engine.get(call.name)
    shown = shapes.inspect(instance, call.version)
    if call.query.flag("size"):
        shown.update(sizes(call.engine, instance))
    if call.query.flag("machine") and instance.isolation is Isolation.VM and instance.state.running:
        shown["Machine"] = _machine(call.engine, instance)
    return json_reply(shown)


def _machine(engine: Engine, instance: Instance) -> dict[str, Any]:
    """What the VMM tells of itself; one that ends meanwhile, or is too busy to tell, says why it does not."""
    try:
        return engine.machine(instance.id)
    except AmbiError as error:
        return {"error": error.message}


def sizes(engine: Engine, instance: Instance) -> dict[str, int]:
    """What it has written, and that with its image, in bytes. A VM's disk counts as far as it is allocated."""
    written = tree_bytes(str(instance.data_dir / "upper"))
    try:
        image = engine.images.resolve(instance.image_id).size_bytes
    except NotFound:  # removed by force
        image = 0
    return {"SizeRw": written, "SizeRootFs": image + written}


def start(call: Call) -> Reply:
    if call.json_body():
        raise InvalidRequest(
            "starting container with non-empty request body was deprecated since API v1.22 and removed in v1.24"
        )
    refuse_directory(call.query.text("checkpoint-dir"))
    snapshot = call.query.text("checkpoint")
    if snapshot:
        call.engine.restore(call.name, snapshot, force=call.query.flag("force"))
    else:
        call.engine.start(call.name)
    return NO_CONTENT


def stop(call: Call) -> Reply:
    call.engine.stop(call.name, call.query.number("t"), call.query.text("signal") or None)
    return NO_CONTENT


def restart(call: Call) -> Reply:
    call.engine.restart(call.name, call.query.number("t"), call.query.text("signal") or None)
    return NO_CONTENT


def kill(call: Call) -> Reply:
    try:
        call.engine.kill(call.name, call.query.text("signal") or None)
    except NotFound as error:
        raise NotFound(f"Cannot kill container: {call.name}: {error}", hint=error.hint) from error
    return NO_CONTENT


def rename(call: Call) -> Reply:
    name = call.query.text("name")
    if not name:
        raise InvalidRequest("Neither old nor new names may be empty")
    call.engine.rename(call.name, name)
    return NO_CONTENT


def remove(call: Call) -> Reply:
    if call.query.flag("link"):
        raise Unsupported("links between containers are not available", hint="remove the container without --link")
    call.engine.remove(call.name, call.query.flag("force"), call.query.flag("v"))
    return NO_CONTENT


def prune(call: Call) -> Reply:
    removed, freed_bytes = call.engine.prune(call.query.filters(_PRUNE_FILTERS))
    return json_reply({"ContainersDeleted": list(removed) or None, "SpaceReclaimed": freed_bytes})


def resize(call: Call) -> Reply:
    call.engine.resize(call.name, *terminal_size(call.query))
    return Reply(200)


def terminal_size(query: Query) -> tuple[int, int]:
    """(rows, columns) of `h` and `w`. Raises InvalidRequest."""
    rows, columns = query.number("h"), query.number("w")
    if rows is None or columns is None or not (0 <= rows < 1 << 16 and 0 <= columns < 1 << 16):
        raise InvalidRequest("h and w must be the terminal's height and width, 0 to 65535")
    return rows, columns


def top(call: Call) -> Reply:
    titles, rows = table(call.engine.top(call.name), call.query.text("ps_args") or "-ef")
    return json_reply({"Titles": titles, "Processes": rows})


def pause(call: Call) -> Reply:
    call.engine.pause(call.name)
    return NO_CONTENT


def unpause(call: Call) -> Reply:
    call.engine.unpause(call.name)
    return NO_CONTENT


def update(call: Call) -> Reply:
    return json_reply({"Warnings": list(call.engine.update(call.name, call.json_body()))})


ROUTES = (
    Route("GET", "/containers/json", list_containers),
    Route("POST", "/containers/create", create),
    Route("POST", "/containers/prune", prune),
    Route("GET", "/containers/{}/json", inspect),
    Route("GET", "/containers/{}/top", top),
    Route("POST", "/containers/{}/start", start),
    Route("POST", "/containers/{}/stop", stop),
    Route("POST", "/containers/{}/restart", restart),
    Route("POST", "/containers/{}/kill", kill),
    Route("POST", "/containers/{}/rename", rename),
    Route("POST", "/containers/{}/resize", resize),
    Route("DELETE", "/containers/{}", remove),
    Route("POST", "/containers/{}/pause", pause),
    Route("POST", "/containers/{}/unpause", unpause),
    Route("POST", "/containers/{}/update", update),
)
