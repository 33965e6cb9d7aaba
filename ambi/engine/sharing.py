"""Namespaces that a container shares with another one, beside the network: `--pid container:NAME`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ambi.core.deadline import Deadline
from ambi.core.errors import Conflict, InvalidRequest, NotFound
from ambi.core.model import Isolation
from ambi.engine.endpoints import SHARED
from ambi.engine.records import Record

if TYPE_CHECKING:
    from ambi.engine.core import Core
    from ambi.engine.networks import Attachment

_CALL_S = 30.0


def join(core: Core, record: Record, taken: Attachment) -> None:
    """Add to `taken` what `record` shares. Raises NotFound, Conflict (it does not run), InvalidRequest (it is a VM)."""
    mode = str(record.row.spec.host.get("PidMode") or "")
    if not mode.startswith(SHARED):
        return
    name = mode.removeprefix(SHARED)
    try:
        other = core.registry.find(name)
    except NotFound as error:
        raise NotFound(f"cannot join PID of container {name}: {error.message}", hint="`ambi ps` lists them") from error
    if other.row.isolation is Isolation.VM:
        raise InvalidRequest(
            f"--pid {mode} is not possible: '{other.name}' is a VM, whose processes are its guest's",
            hint=f"look at them with: ambi top {other.name}",
        )
    run = other.run
    if run is None or run.exit is not None or not other.state.running:
        raise Conflict(f"cannot join PID of a non running container: {other.id}", hint=f"ambi start {other.name}")
    taken.others["pid"] = run.connection.descriptor("netns", kind="pid", by=Deadline.after(_CALL_S))
