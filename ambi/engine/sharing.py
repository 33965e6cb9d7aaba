"""Namespaces that a container shares with another one, beside the network: `container:NAME` of --pid and --ipc."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ambi.core.deadline import Deadline
from ambi.core.errors import Conflict, InvalidRequest, NotFound
from ambi.core.model import Isolation
from ambi.engine.endpoints import SHARED
from ambi.engine.records import Record, Run

if TYPE_CHECKING:
    from ambi.engine.core import Core
    from ambi.engine.networks import Attachment

_CALL_S = 30.0


def join(core: Core, record: Record, taken: Attachment) -> None:
    """Add to `taken` what `record` shares. Raises NotFound, Conflict (it does not run), InvalidRequest (it is a VM, or keeps
    its shared memory to itself)."""
    host = record.row.spec.host
    pid, ipc = (str(host.get(key) or "") for key in ("PidMode", "IpcMode"))
    if pid.startswith(SHARED):
        other, run = _running(core, pid.removeprefix(SHARED), "PID")
        if other.row.isolation is Isolation.VM:
            raise InvalidRequest(
                f"--pid {pid} is not possible: '{other.name}' is a VM, whose processes are its guest's",
                hint=f"look at them with: ambi top {other.name}",
            )
        taken.others["pid"] = _descriptor(run, "pid")
    if ipc.startswith(SHARED):
        other, run = _running(core, ipc.removeprefix(SHARED), "IPC")
        if other.row.isolation is Isolation.VM or not _shares_memory(other):
            raise InvalidRequest(
                f"container {other.name}: non-shareable IPC (hint: use IpcMode:shareable for the donor container)",
                hint=f"a VM has memory of its own: run {other.name} as a container"
                if other.row.isolation is Isolation.VM
                else f"create {other.name} with --ipc shareable",
            )
        taken.others["ipc"] = _descriptor(run, "ipc")
        taken.others["mount"] = _descriptor(run, "mount")


def _running(core: Core, name: str, what: str) -> tuple[Record, Run]:
    try:
        other = core.registry.find(name)
    except NotFound as error:
        raise NotFound(f"cannot join {what} of container {name}: {error.message}", hint="`ambi ps` lists them") from error
    run = other.run
    if run is None or run.exit is not None or not other.state.running:
        raise Conflict(f"cannot join {what} of a non running container: {other.id}", hint=f"ambi start {other.name}")
    return other, run


def _shares_memory(other: Record) -> bool:
    mode = str(other.row.spec.host.get("IpcMode") or "")
    return mode in ("shareable", "host") or mode.startswith(SHARED)


def _descriptor(run: Run, kind: str) -> int:
    return run.connection.descriptor("netns", kind=kind, by=Deadline.after(_CALL_S))
