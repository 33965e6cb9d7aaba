"""Changing the limits and the restart policy of an instance, while it runs where its driver can."""

from __future__ import annotations

from typing import Any

from ambi.core.errors import Conflict, InvalidRequest, from_os_error
from ambi.engine import request, resources
from ambi.engine.body import Body
from ambi.engine.core import Core
from ambi.engine.create import write_record
from ambi.engine.lifecycle import soon
from ambi.engine.records import Record
from ambi.engine.types import CreateSpec

_LIMITS = frozenset((
    "CpuPeriod", "CpuQuota", "CpuShares", "CpusetCpus", "CpusetMems", "Memory", "MemoryReservation", "MemorySwap",
    "NanoCpus", "PidsLimit",
))  # fmt: skip
_BOTH = {"memory": ("limit", "swap"), "cpu": ("quota", "period")}  # written together, whichever changes


def update(core: Core, id: str, asked: dict[str, Any]) -> list[str]:
    """See `Engine.update`. Nothing has changed when it fails."""
    record = core.registry.find(id)
    with record.lock:
        if record.removing:
            raise Conflict(f'Cannot update container {record.id}: Container is marked for removal and cannot be "update".')
        old = record.row.spec
        new = CreateSpec(old.config, merged(old.host, asked), old.networking)
        request.check_host(new)
        limits = changes(resources.limits(Body("HostConfig", old.host)), resources.limits(Body("HostConfig", new.host)))
        run = record.run
        if limits and record.state.running and run is not None:
            run.connection.call("update", resources=limits, by=soon())
        _store(core, record, new)
        core.publish(record, "update")
    return []


def merged(host: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """`host` with what `asked` sets; zero, "" and null set nothing. Raises InvalidRequest for what can never be changed."""
    given = {key: value for key, value in asked.items() if not request.neutral(key, value)}
    policy = given.pop("RestartPolicy", None)
    for key in given:
        if key not in _LIMITS:
            raise InvalidRequest(
                f"{request.flag_of(key)} cannot be changed once the instance is there",
                hint="create it anew; `ambi update --help` lists what can be changed",
            )
    for key, other in (("CpuPeriod", "CPU Period"), ("CpuQuota", "CPU Quota")):
        if given.get(key) and host.get("NanoCpus"):
            raise Conflict(
                f"Conflicting options: {other} cannot be updated as NanoCPUs has already been set", hint="use --cpus"
            )
        if given.get("NanoCpus") and host.get(key):
            raise Conflict(
                f"Conflicting options: NanoCPUs cannot be updated as {other} has already been set",
                hint="use --cpu-period and --cpu-quota",
            )
    if Body("HostConfig", given).number("PidsLimit") < 0:
        given["PidsLimit"] = -1
    if Body("RestartPolicy", policy).text("Name"):
        if host.get("AutoRemove") and policy["Name"] != "no":
            raise Conflict("Restart policy cannot be updated because AutoRemove is enabled for the container")
        given["RestartPolicy"] = policy
    return {**host, **given}


def changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The OCI resources that bring a run from `old` to `new`; -1 takes a limit away."""
    found: dict[str, Any] = {}
    for kind in sorted({*old, *new}):
        before, after = old.get(kind) or {}, new.get(kind) or {}
        differ = {name: after.get(name, -1) for name in {*before, *after} if before.get(name) != after.get(name)}
        pair = _BOTH.get(kind, ())
        if differ.keys() & set(pair):
            differ.update({name: after[name] for name in pair if name in after})
        if differ:
            found[kind] = differ
    return found


def _store(core: Core, record: Record, spec: CreateSpec) -> None:
    """In record.json and the database: the next start has it, too."""
    try:
        write_record(core.roots.instance_data(record.id), record.row._replace(spec=spec))
    except OSError as error:
        raise from_os_error(f"cannot update container {record.id}", error) from error
    core.db.set_spec(record.id, spec)
    with core.mutex:
        record.row = record.row._replace(spec=spec)
