"""Start, stop, restart, kill, rename, remove."""

from __future__ import annotations

import logging
import shutil
import signal as signals_module
import time
from pathlib import Path
from typing import Literal

from ambi.core.deadline import Deadline
from ambi.core.errors import AmbiError, Conflict, InvalidRequest, NotFound, NotModified, Unavailable, from_os_error
from ambi.core.model import ExitStatus, Isolation, Status
from ambi.core.plan import LAUNCH_FILE, Layers
from ambi.engine import diskquota, names, pausing, sharing, signals, spec
from ambi.engine.core import Core
from ambi.engine.create import RECORD_FILE, UPPER, write_record, write_whole
from ambi.engine.mountpoints import points_of
from ambi.engine.networks import Attachment
from ambi.engine.records import Record, Run
from ambi.engine.volumes import anonymous_of, mark_volumes

log = logging.getLogger(__name__)

START_S = 120.0  # a VM without KVM boots in seconds, on a loaded machine in many
RESTORE_S = 600.0  # a start from a snapshot, whose disks are copied and read
SHIM_END_S = 60.0  # from init's end to the end of its shim: the driver's clean-up
KILL_S = 30.0
DEFAULT_STOP_S = 10.0
_KILL = int(signals_module.SIGKILL)


def start(core: Core, id: str) -> None:
    record = core.registry.find(id)
    with record.lock:
        check_present(record)
        if record.state.status is Status.PAUSED:
            hint = f"ambi unpause {record.name}"
            raise Conflict("cannot start a paused container, try unpause instead", hint=hint)
        if record.state.running or record.state.status is Status.RESTARTING:
            raise NotModified(f"container {record.id} is already running")
        _by_the_user(core, record)
        try:
            _start(core, record)
        except AmbiError as error:
            _failed(core, record, error)
            raise


def start_from(core: Core, record: Record, snapshot: Path) -> None:
    """Start it where it stood when it was saved. With its lock held, and nothing of it running."""
    _by_the_user(core, record)
    try:
        _start(core, record, snapshot)
    except AmbiError as error:
        _failed(core, record, error)
        raise


def _by_the_user(core: Core, record: Record) -> None:
    """A start that somebody asks for: policies begin anew."""
    with core.mutex:
        core.restarts.call_off(record)
    core.restarts.forget_pause(record)
    hold(core, record, False)
    with core.mutex:
        if record.row.restart_count:
            record.row = record.row._replace(restart_count=0)
            core.db.set_restart_count(record.id, 0)


def hold(core: Core, record: Record, held: bool) -> None:
    """Remember whether the user wants it stopped, before it is: a policy must not start it again."""
    with core.mutex:
        if record.row.held is not held:
            record.row = record.row._replace(held=held)
            core.db.set_held(record.id, held)


def start_again(core: Core, record: Record) -> None:
    """A restart that a policy asks for. One that fails ends there, as with Docker."""
    with record.lock:
        if record.removing or record.row.held or record.state.status is not Status.RESTARTING:
            return
        try:
            _start(core, record)
        except AmbiError as error:
            with core.mutex:
                core.set_state(record, record.state._replace(status=Status.EXITED))
            _failed(core, record, error)
            with core.mutex:
                core.settle(record, "not-running", ExitStatus(record.state.exit_code, error.message))
            raise


def check_present(record: Record) -> None:
    if record.removing:
        raise Conflict(f"container {record.id} is marked for removal and cannot be used")


def _start(core: Core, record: Record, snapshot: Path | None = None) -> None:
    """With the lock of `record` held. On failure no process, no shim and no network of it is left."""
    wait_run_end(core, record)
    net = core.networks.prepare(record)
    try:
        sharing.join(core, record, net)
        _start_on(core, record, net, snapshot)
    except BaseException:
        core.networks.release(record, told=False)
        raise
    finally:
        net.close()


def _start_on(core: Core, record: Record, net: Attachment, snapshot: Path | None) -> None:
    data = core.roots.instance_data(record.id)
    prepared = spec.prepare(record.id, record.row.isolation, record.row.spec, data, net.files, points_of(record.row.mounts))
    core.volumes.check_start(record)
    plan = spec.plan(record.id, record.row.isolation, record.row.spec, layers_of(core, record), core.roots, prepared)
    try:
        write_whole(data / LAUNCH_FILE, plan.to_json())
        (data / "exit.json").unlink(missing_ok=True)
    except OSError as error:
        raise from_os_error(f"cannot start container {record.id}", error) from error
    run = waiting_run(core, record) or core.shims.spawn(record)
    core.wait_for(lambda: record.attaching == 0, soon())
    with core.mutex:
        waiting = list(record.tickets)
    for ticket in waiting:
        ticket.share(run.connection)
    run.starting, run.failed, run.looks, record.oom_told = True, False, 0, False
    core.volumes.mounted(record)
    try:
        core.volumes.hold(record)
        shared = net.namespaces
        by = Deadline.after(START_S if snapshot is None else RESTORE_S)
        source = None if snapshot is None else str(snapshot)
        answer = run.connection.call("start", fds=shared.values(), namespaces=[*shared], snapshot=source, by=by)
    except AmbiError:
        with core.mutex:
            run.starting, run.failed = False, True
            core.changed.notify_all()
        _drop(core, record, run)
        core.volumes.unmounted(record)
        raise
    with core.mutex:
        run.starting = False
        now = time.time_ns()
        state = record.state._replace(
            status=Status.RUNNING,
            pid=int(answer.get("pid") or 0),
            exit_code=0,
            error="",
            oom_killed=False,
            started_ns=min(now, (run.exit and run.exit.finished_ns) or now),  # it may have ended before we were told
            finished_ns=0,
        )
        core.set_state(record, state)
        core.publish(record, "start")
        run.started = True
        core.monitor(record, run)
        core.finish(record, run)


def waiting_run(core: Core, record: Record) -> Run | None:
    """The shim that clients have been attached to, if it still lives."""
    with core.mutex:
        run = record.run
    if run is not None and run.connection.closed:
        run.gone.wait(SHIM_END_S)
        return None
    return run


def layers_of(core: Core, record: Record) -> Layers:
    form: Literal["erofs"] | None = "erofs" if record.row.isolation is Isolation.VM else None
    try:
        image = core.store.resolve(record.row.image_id)
    except NotFound as error:
        raise NotFound(f"No such image: {record.row.image}", hint=error.hint) from error
    return Layers(core.store.layers(image, form), core.roots.instance_data(record.id) / UPPER)


def _drop(core: Core, record: Record, run: Run) -> None:
    """A start has failed: have the shim remove what it made and end. A shim that cannot is ended and swept."""
    try:
        run.connection.call("delete", by=Deadline.after(KILL_S))
    except AmbiError as error:
        log.info("%s: shim after a failed start: %s", record.id[:12], error)
        core.shims.end(record, run)
    if not run.gone.wait(SHIM_END_S):
        core.shims.end(record, run)


def _failed(core: Core, record: Record, error: AmbiError) -> None:
    """Record why a start failed, as Docker does: the status stays, the code is 126, 127 or 128."""
    code = error.exit_status if error.exit_status in (126, 127) else 128
    with core.mutex:
        core.set_state(record, record.state._replace(exit_code=code, error=error.message, pid=0))
        core.settle(record, "next-exit", ExitStatus(code, error.message))
    if record.auto_remove:
        try:
            _remove(core, record, volumes=True)
        except AmbiError as problem:
            error.add_note(f"automatic removal: {problem}")


def wait_run_end(core: Core, record: Record) -> None:
    """See that no shim of an earlier run is left; one that was only attached to stays."""
    with core.mutex:
        run = record.run
    if run is None or (run.exit is None and not run.started):
        return
    if not run.gone.wait(SHIM_END_S):
        raise Unavailable(f"container {record.id}: its last run is not cleaned up after {SHIM_END_S:.0f} s")


def stop(core: Core, id: str, timeout_s: float | None, signal: str | None) -> None:
    record = core.registry.find(id)
    number = signals.parse(signal) if signal else None
    with record.lock:
        with core.mutex:
            if core.restarts.call_off(record):
                hold(core, record, True)
                core.publish(record, "stop")
                return
        if not record.state.running:
            raise NotModified(f"container {record.id} is not running")
        hold(core, record, True)
        _stop(core, record, timeout_s, number)


def _stop(core: Core, record: Record, timeout_s: float | None, number: int | None) -> None:
    """With the lock held and the instance running."""
    config = record.row.spec.config
    if timeout_s is None:
        own = config.get("StopTimeout")
        timeout_s = DEFAULT_STOP_S if own is None else float(own)
    run = record.run
    send(core, record, number or _stop_signal(record))
    by = Deadline.never() if timeout_s < 0 else Deadline.after(timeout_s)
    if not core.wait_for(lambda: not record.state.running or record.run is not run, by):
        send(core, record, _KILL)
        _wait_killed(core, record, run)
    core.publish(record, "stop")


def _wait_killed(core: Core, record: Record, run: Run | None) -> None:
    """After SIGKILL: an init that does not go, or a shim that does not tell, is ended with its shim."""
    patience = Deadline.after(KILL_S if run is not None else 0)
    if core.wait_for(lambda: not record.state.running or record.run is not run, patience):
        return
    if run is not None:
        core.shims.end(record, run)
    else:
        core.shims.account(record)
    if not core.wait_for(lambda: not record.state.running, Deadline.after(KILL_S)):
        raise Unavailable(f"container {record.id}: tried to kill it, but did not receive an exit event")


def send(core: Core, record: Record, number: int) -> None:
    """Signal init. One that has just ended is no error."""
    with core.mutex:
        run = record.run
    if run is None:
        return
    core.publish(record, "kill", signal=str(number))
    try:
        run.connection.call("signal", signal=number, exec_id=None, by=soon())
    except (Conflict, Unavailable) as error:  # it has ended meanwhile
        log.info("%s: signal %d: %s", record.id[:12], number, error)
    if number in (_KILL, _stop_signal(record)):
        pausing.release(core, record, run)


def _stop_signal(record: Record) -> int:
    return signals.parse(record.row.spec.config.get("StopSignal") or "SIGTERM")


def restart(core: Core, id: str, timeout_s: float | None, signal: str | None) -> None:
    record = core.registry.find(id)
    number = signals.parse(signal) if signal else None
    with record.lock:
        check_present(record)
        if record.state.running:
            hold(core, record, True)  # until it has stopped, no policy interferes
            _stop(core, record, timeout_s, number)
        _by_the_user(core, record)
        try:
            _start(core, record)
        except AmbiError as error:
            _failed(core, record, error)
            raise
        core.publish(record, "restart")


def kill(core: Core, id: str, signal: str | None) -> None:
    """Does not take the lock: a stop that waits must not keep a kill out."""
    record = core.registry.find(id)
    number = signals.parse(signal) if signal else _KILL
    if record.state.status is Status.RESTARTING:
        with record.lock, core.mutex:  # behind the restart, should it be under way
            if core.restarts.call_off(record):
                hold(core, record, True)
                return
    if not record.state.running:
        hint = "`ambi ps` lists what runs"
        raise Conflict(f"Cannot kill container: {id}: Container {record.id} is not running", hint=hint)
    run = record.run
    if number in (_KILL, _stop_signal(record)):
        hold(core, record, True)
    send(core, record, number)
    if number == _KILL:
        _wait_killed(core, record, run)


def rename(core: Core, id: str, name: str) -> None:
    record = core.registry.find(id)
    if not name:
        raise InvalidRequest("Neither old nor new names may be empty", hint="ambi rename OLD NEW")
    with record.lock:
        check_present(record)
        old, new = record.name, names.checked(name)
        if new == old:
            raise InvalidRequest("Renaming a container with the same name as its current name", hint="choose another name")
        try:
            core.registry.reserve(new, record.id)
        except Conflict as error:
            raise Conflict(f"Error when allocating new name: {error}", hint=error.hint) from error
        try:
            row = record.row._replace(name=new)
            write_record(core.roots.instance_data(record.id), row)
            core.db.set_name(record.id, new)
        except OSError as error:
            core.registry.release(new)
            raise from_os_error(f"cannot rename container {record.id}", error) from error
        with core.mutex:
            record.row = record.row._replace(name=new)
        core.registry.release(old)
        core.publish(record, "rename", oldName=f"/{old}")


def remove(core: Core, id: str, force: bool, *, volumes: bool = False) -> None:
    record = core.registry.find(id)
    if force:
        end_by_force(core, record)  # before the lock, which a stop may hold for long
    if record.removing:
        raise Conflict(f"removal of container {record.id} is already in progress")
    with record.lock:
        core.registry.find(record.id)  # it may be gone since
        if force:  # a restart was under way
            end_by_force(core, record)
        _remove(core, record, volumes=volumes)


def end_by_force(core: Core, record: Record) -> None:
    if record.state.status is Status.RESTARTING:
        hold(core, record, True)
        with core.mutex:
            core.restarts.call_off(record)
    if record.state.running:
        hold(core, record, True)
        run = record.run
        send(core, record, _KILL)
        _wait_killed(core, record, run)


def _remove(core: Core, record: Record, *, volumes: bool) -> None:
    """With the lock held. volumes: its anonymous ones, too. Raises Conflict when it runs or is being removed already."""
    with core.mutex:
        if record.removing:
            raise Conflict(f"removal of container {record.id} is already in progress")
        if record.state.running or record.state.status is Status.RESTARTING:
            paused = record.state.status is Status.PAUSED
            procedure = "Unpause and then stop" if paused else "Stop"
            raise Conflict(
                f"You cannot remove a {record.state.status.value} container {record.id}. {procedure} the container before"
                " attempting removal or force remove",
                hint=f"ambi stop {record.name}, or ambi rm -f {record.name}",
            )
        record.removing = True
    try:
        end_shim(core, record)
        discard(core, record, anonymous_of(record.row) if volumes else [])
    except BaseException:
        record.removing = False
        raise
    with core.mutex:
        core.registry.drop(record)
        core.publish(record, "destroy")
        status = ExitStatus(record.state.exit_code, record.state.error)
        for condition in ("removed", "next-exit", "not-running"):
            core.settle(record, condition, status)
        core.changed.notify_all()
    core.on_removed()


def end_shim(core: Core, record: Record) -> None:
    """See that no shim of `record` is left, whatever it is doing. With the lock held."""
    with core.mutex:
        run = record.run
    if run is None:
        return
    if run.exit is None and not run.started:
        _drop(core, record, run)
    elif not run.gone.wait(SHIM_END_S):
        core.shims.end(record, run)


def discard(core: Core, record: Record, volumes: list[str]) -> None:
    """Remove `volumes`, the directories and the row. The record goes first: a directory without one is a removal to be
    finished, and a mark in it says that its volumes go, too."""
    data, run = core.roots.instance_data(record.id), core.roots.instance_run(record.id)
    try:
        if volumes:
            mark_volumes(data)
        (data / RECORD_FILE).unlink(missing_ok=True)
        core.volumes.drop(volumes, record.id)
        core.db.delete(record.id)
        diskquota.release(data / UPPER)
        for directory in (run, data):
            if directory.exists():
                shutil.rmtree(directory)
    except OSError as error:
        raise from_os_error(f"cannot remove container {record.id}", error) from error


def auto_remove(core: Core, record: Record) -> None:
    """After the end of a run of an instance made with `--rm`."""
    with record.lock:
        if record.removing or record.state.running:
            return
        _remove(core, record, volumes=True)


def soon() -> Deadline:
    """When a shim that is asked for something small has answered."""
    return Deadline.after(KILL_S)
