"""What an engine finds when it starts: records of before, shims that live on, shims that died, half-made and half-removed
instances.

    record.json  row   means
    yes          yes   an instance
    yes          no    the database is older than the directory, or new: the row is made again from record.json
    no           yes   a removal was under way: it is finished
    no           no    a create or a removal was under way: the directory is removed
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from pathlib import Path

from ambi.core.errors import AmbiError, InvalidRequest, Unavailable
from ambi.core.model import ExecId, ExitStatus, Status
from ambi.core.plan import LaunchPlan
from ambi.engine import diskquota, lifecycle, livemounts, mounts, pausing, snapshots
from ambi.engine.core import KILLED_WITH_SHIM, OTHER_BOOT, Core
from ambi.engine.create import RECORD_FILE, UPPER, read_record
from ambi.engine.records import ExecRecord, Record, Run
from ambi.engine.state import Row
from ambi.engine.volumes import marked_volumes
from ambi.shim import leave

log = logging.getLogger(__name__)

_OTHER_BOOT_CODE = 255  # as Docker's


def restore(core: Core) -> None:
    """Bring the records in, then the shims. An instance that cannot be restored is reported and left alone."""
    core.volumes.restore()
    _restore_records(core)
    _restore_execs(core)
    core.networks.restore()
    for record in core.registry:
        snapshots.sweep(core, record)
        try:
            _restore_run(core, record)
        except (AmbiError, OSError) as error:
            log.error("%s: cannot be restored: %s", record.id[:12], error)
    _clear_run_root(core)
    core.volumes.settled()
    core.networks.adopted()
    with core.mutex:
        core.restarts.begin()


def _restore_records(core: Core) -> None:
    directory = core.roots.data / "instances"
    present = {entry.name for entry in os.scandir(directory) if entry.is_dir(follow_symlinks=False)}
    leaving = []
    for row in core.db.instances():
        if (directory / row.id / RECORD_FILE).exists():
            core.registry.add(Record(mounts.upgraded(row)))
        else:
            leaving.append(row)
        present.discard(row.id)
    for id in sorted(present):
        found = read_record(directory / id)
        if found is not None:
            _insert_again(core, found)
        else:
            log.info("%s: removing what is left of it", id[:12])
            _sweep_leftovers(core, id)
    for row in leaving:  # now that all are known who may use its volumes
        log.info("%s: finishing a removal", row.id[:12])
        core.volumes.drop(marked_volumes(directory / row.id, row))
        _sweep_leftovers(core, row.id)
        core.db.delete(row.id)
    core.volumes.adopted()


def _insert_again(core: Core, row: Row) -> None:
    """An instance whose row is gone. A name that is taken by now gets the id's beginning behind it."""
    if row.name in core.registry.names():
        row = row._replace(name=f"{row.name}_{row.id[:12]}")
    status = leave.read_exit(core.roots.instance_data(row.id))
    if status is not None:
        state = row.state._replace(status=Status.EXITED, exit_code=status.code, finished_ns=status.finished_ns)
        row = row._replace(state=state)
    log.warning("%s: record of '%s' is rebuilt from its directory", row.id[:12], row.name)
    core.db.insert(row)
    core.registry.add(Record(row))


def _restore_execs(core: Core) -> None:
    gone = []
    for row in core.db.execs():
        if row.boot_id != core.boot_id or row.instance not in core.registry:
            gone.append(row.id)
            continue
        item = ExecRecord(ExecId(row.id), core.registry.find(row.instance), row.config)
        item.pid, item.exit_code = row.pid, row.exit_code
        item.started = row.pid > 0 or row.exit_code is not None
        core.registry.add_exec(item)
    core.db.delete_execs(gone)


def _restore_run(core: Core, record: Record) -> None:
    """Adopt the shim of `record`, or account for its end."""
    recorded = record.state.running
    if record.row.boot_id not in ("", core.boot_id):
        if recorded:
            _end(core, record, ExitStatus(_OTHER_BOOT_CODE, OTHER_BOOT, finished_ns=time.time_ns()))
        return
    run_dir = core.roots.instance_run(record.id)
    run = core.shims.adopt(record) if run_dir.exists() else None
    if run is not None:
        _take_over(core, record, run)
        return
    status = _unseen_exit(core, record)
    if recorded or run_dir.exists():
        core.shims.sweep(record.id)
    if recorded or status is not None:
        _end(core, record, status or ExitStatus(137, KILLED_WITH_SHIM, finished_ns=time.time_ns()))


def _unseen_exit(core: Core, record: Record) -> ExitStatus | None:
    """exit.json, when it tells of an end that the record does not know; the one of an earlier run goes at each start."""
    status = leave.read_exit(core.roots.instance_data(record.id))
    return status if status is not None and status.finished_ns > record.state.finished_ns else None


def _take_over(core: Core, record: Record, run: Run) -> None:
    """A shim that lives: find out how far it is. The engine may have died between a start and its record."""
    status = _unseen_exit(core, record)
    run.started = record.state.running or status is not None
    try:
        state = run.connection.call("state", by=lifecycle.soon())
    except (Unavailable, InvalidRequest) as error:
        log.info("%s: its shim ends: %s", record.id[:12], error)
        return  # the end of its connection accounts for the rest
    with core.mutex:
        if state["status"] == Status.CREATED.value:
            return  # only attached to; the next start uses it
        if not record.state.running:
            started = record.state._replace(
                status=Status.RUNNING, pid=int(state["pid"]), exit_code=0, error="", finished_ns=0, started_ns=time.time_ns()
            )
            core.set_state(record, started)
        livemounts.adopted(run, state.get("mounts"))
        pausing.found(core, record, Status(state["status"]))
        run.started = True
        for exec_id, about in (state.get("execs") or {}).items():
            item = record.execs.get(ExecId(exec_id))
            if item is not None:
                item.started, item.pid = True, int(about.get("pid") or 0)
        run.exit = run.exit or status
        core.monitor(record, run)
        core.finish(record, run)


def _end(core: Core, record: Record, status: ExitStatus) -> None:
    """Record the end of a run whose shim is gone, and remove the instance if it was made with `--rm`."""
    with core.mutex:
        core.record_exit(record, status)
    if record.auto_remove:
        threading.Thread(target=_auto_remove, args=(core, record), daemon=True).start()


def _auto_remove(core: Core, record: Record) -> None:
    try:
        lifecycle.auto_remove(core, record)
    except AmbiError as error:
        log.warning("%s: automatic removal: %s", record.id[:12], error)


def _clear_run_root(core: Core) -> None:
    """End shims of instances that are no more, and remove run directories without an instance."""
    directory = core.roots.run / "instances"
    for name in os.listdir(directory):
        if name not in core.registry:
            _sweep_leftovers(core, name)


def _sweep_leftovers(core: Core, id: str) -> None:
    """Nothing of `id` is to stay: not its shim, nothing in the kernel, no directory."""
    try:
        core.shims.kill_shim(id)
        core.shims.sweep(id)
    except AmbiError as error:
        log.error("%s: cannot be swept: %s", id[:12], error)
        return
    diskquota.release(core.roots.instance_data(id) / UPPER)
    for path in (core.roots.instance_run(id), core.roots.instance_data(id)):
        shutil.rmtree(path, ignore_errors=True)


def plan_of(data_dir: Path) -> LaunchPlan | None:
    """The plan of the last run, None when there has been none."""
    try:
        return LaunchPlan.load(data_dir)
    except (OSError, AmbiError):
        return None
