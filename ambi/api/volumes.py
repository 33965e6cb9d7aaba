"""`/volumes`. `docker inspect X` asks for X here, too, and goes on only after a 404 in JSON."""

from __future__ import annotations

from typing import Any

from ambi.api.exchange import NO_CONTENT, Call, Reply, json_reply
from ambi.api.query import one_flag
from ambi.api.router import Route
from ambi.api.words import rfc3339_nano
from ambi.core.errors import InvalidRequest
from ambi.engine.filters import has_labels
from ambi.engine.localvolume import Volume
from ambi.engine.volumes import Volumes, text_map

_FILTERS = frozenset(("dangling", "driver", "label", "name"))
_PRUNE_FILTERS = frozenset(("all", "label", "label!"))
_ONLY_ANONYMOUS = (1, 42)  # from this version on prune leaves named volumes alone


def shape(volumes: Volumes, volume: Volume) -> dict[str, Any]:
    """Docker's Volume."""
    return {
        "CreatedAt": rfc3339_nano(volume.created_ns // 1_000_000_000 * 1_000_000_000),
        "Driver": volume.driver,
        "Labels": volume.labels,
        "Mountpoint": volumes.mountpoint(volume),
        "Name": volume.name,
        "Options": volume.options,
        "Scope": "local",
    }


def with_usage(volumes: Volumes, volume: Volume) -> dict[str, Any]:
    """As `shape`, with what `/system/df` says of it."""
    usage = {"RefCount": len(volumes.users(volume.name)), "Size": volumes.used_bytes(volume)}
    return {**shape(volumes, volume), "UsageData": usage}


def _fits(volumes: Volumes, volume: Volume, filters: dict[str, list[str]]) -> bool:
    """Values of one filter are alternatives, as Docker has it; all labels must be there."""
    if filters.get("name") and not any(value in volume.name for value in filters["name"]):
        return False
    if filters.get("driver") and volume.driver not in filters["driver"]:
        return False
    if filters.get("dangling") and one_flag("dangling", filters["dangling"]) == bool(volumes.users(volume.name)):
        return False
    return has_labels(volume.labels or {}, filters.get("label", ()))


def list_volumes(call: Call) -> Reply:
    filters, volumes = call.query.filters(_FILTERS), call.engine.volumes
    if filters.get("dangling"):
        one_flag("dangling", filters["dangling"])
    shown = [shape(volumes, volume) for volume in volumes.all() if _fits(volumes, volume, filters)]
    return json_reply({"Volumes": shown, "Warnings": None})


def inspect(call: Call) -> Reply:
    return json_reply(shape(call.engine.volumes, call.engine.volumes.find(call.name)))


def create(call: Call) -> Reply:
    body = call.json_body()
    texts = {key: body.get(key) or "" for key in ("Name", "Driver")}
    for key, value in texts.items():
        if not isinstance(value, str):
            raise InvalidRequest(f"{key} must be a string")
    if body.get("ClusterVolumeSpec"):
        raise InvalidRequest("ClusterVolumeSpec is not supported", hint="leave it out: ambi has no swarm mode")
    options, labels = text_map(body.get("DriverOpts"), "DriverOpts"), text_map(body.get("Labels"), "Labels")
    volume = call.engine.volumes.create(texts["Name"], texts["Driver"], options, labels)
    return json_reply(shape(call.engine.volumes, volume), 201)


def remove(call: Call) -> Reply:
    call.engine.volumes.remove(call.name, force=call.query.flag("force"))
    return NO_CONTENT


def prune(call: Call) -> Reply:
    filters = call.query.filters(_PRUNE_FILTERS)
    everything = call.version < _ONLY_ANONYMOUS
    if filters.get("all"):
        everything = one_flag("all", filters["all"]) or everything
    names, freed = call.engine.volumes.prune(filters, everything=everything)
    return json_reply({"VolumesDeleted": names or None, "SpaceReclaimed": freed})


ROUTES = (
    Route("GET", "/volumes", list_volumes),
    Route("GET", "/volumes/{}", inspect),
    Route("DELETE", "/volumes/{}", remove),
    Route("POST", "/volumes/create", create),
    Route("POST", "/volumes/prune", prune),
)
