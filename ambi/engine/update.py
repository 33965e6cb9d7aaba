"""Changing the limits and the restart policy of an instance, while it runs where its driver can."""

from __future__ import annotations

from typing import Any

from ambi.core.deadline import Deadline
from ambi.core.errors import Conflict, InvalidRequest, from_os_error
from ambi.core.model import Isolation, VmShape
from ambi.engine import diskquota, request, resources
from ambi.engine.body import Body
from ambi.engine.core import Core
from ambi.engine.create import write_record
from ambi.engine.lifecycle import soon
from ambi.engine.records import Record
from ambi.engine.types import CreateSpec

_LIMITS = frozenset((
    "BlkioWeight", "CpuPeriod", "CpuQuota", "CpuShares", "CpusetCpus", "CpusetMems", "Memory", "MemoryReservation",
    "MemorySwap", "NanoCpus", "PidsLimit", "StorageOpt",
))  # fmt: skip
GROW_S = 300.0  # 90 GiB more take a second under emulation, 2 TiB half a minute
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
        size = disk_bytes(old.host, new.host)
        limits = changes(resources.limits(Body("HostConfig", old.host)), resources.limits(Body("HostConfig", new.host)))
        run = record.run
        warnings: list[str] = []
        if record.state.running and run is not None:
            if size:
                run.connection.call("grow", disk_bytes=size, by=Deadline.after(GROW_S))
            if limits:
                warnings = _warnings(run.connection.call("update", resources=limits, by=soon()))
        _store(core, record, new)
        core.publish(record, "update")
    return warnings


def _warnings(answer: dict[str, Any]) -> list[str]:
    found = answer.get("warnings")
    return [str(text) for text in found] if isinstance(found, list) else []


def disk_bytes(old: dict[str, Any], new: dict[str, Any]) -> int:
    """The size that the disk of a VM is to grow to; 0 for the one that it has. Raises InvalidRequest, in a hint how else."""
    if old.get("StorageOpt") == new.get("StorageOpt"):
        return 0
    isolation = request.isolation_of(Body("HostConfig", new))
    if isolation is not Isolation.VM:
        raise InvalidRequest(
            "--storage-opt cannot be changed for a container: its size was set when it was made",
            hint="create it anew, or run it as a VM: --isolation vm",
        )
    size = diskquota.wanted_bytes(Body("HostConfig", new), isolation)
    now = diskquota.wanted_bytes(Body("HostConfig", old), isolation) or VmShape().disk_bytes
    if size < now:
        raise InvalidRequest(
            f"the disk of a VM cannot shrink from {now >> 20} MiB to {size >> 20} MiB",
            hint="ask for more, or create the VM anew with --storage-opt",
        )
    return size if size > now else 0


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
