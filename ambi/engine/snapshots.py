"""Snapshots of virtual machines: saved by the shim, published here, listed, removed; and a start that goes on from one.

They lie below the instance's own directory (hyper/vm/snapshots.py has the files) and go with it. What was being made when
its maker died is removed by the next engine.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ambi.core.deadline import Deadline
from ambi.core.errors import AmbiError, Conflict, NotFound, Unsupported, from_os_error
from ambi.core.model import Isolation, Status
from ambi.core.plan import LaunchPlan
from ambi.engine import connect, lifecycle
from ambi.engine.core import Core
from ambi.engine.records import Record, Run
from hyper.vm import snapshots as files

log = logging.getLogger(__name__)

SAVE_S = 600.0  # disks and memory to be written, and on the disk
END_S = 60.0  # from the end of a save to the end of its machine


class Info(NamedTuple):
    """A snapshot as it is listed. problem: why it is of no use, "" for one that can be read; the rest is then not known.

    size_bytes: what its files take on the disk. still_ns: how long the guest stood still for it.
    """

    instance_id: str
    instance_name: str
    name: str
    created_ns: int = 0
    size_bytes: int = 0
    memory_bytes: int = 0
    parent: str = ""
    still_ns: int = 0
    problem: str = ""


def directory(core: Core, record: Record) -> Path:
    return core.roots.instance_data(record.id) / files.DIRECTORY


def save(core: Core, id: str, name: str, *, stop: bool) -> str:
    """A snapshot of a running VM: its name, which is the first free `sN` when none is given.

    stop: the VM ends with it. Raises InvalidRequest (the name), Conflict (it is taken, or nothing runs), Unsupported,
    StorageFull; then there is nothing of it, and the VM runs on.
    """
    record = core.registry.find(id)
    if name:
        files.check_name(name)
    with record.lock:
        run = _savable(core, record, stop=stop)
        home = directory(core, record) / (name or _free_name(directory(core, record)))
        files.make(home)
        try:
            with _held(core, record, stop):
                by = Deadline.after(SAVE_S)
                answer = run.connection.call("save", home=str(home), notes=_notes(core, record, run), ends=stop, by=by)
                if not stop:
                    files.publish(home, answer["manifest"], by)
        except BaseException:
            files.discard(home)
            raise
        core.publish(record, "checkpoint", checkpoint=home.name)
        if stop:
            _wait_end(core, record, run)
        return home.name


def _savable(core: Core, record: Record, *, stop: bool) -> Run:
    lifecycle.check_present(record)
    if record.row.isolation is not Isolation.VM:
        raise Unsupported(
            f"{record.name} is a container, and only virtual machines can be saved",
            hint="run it as one: ambi run --isolation vm",
        )
    if record.state.status is Status.RESTARTING or not record.state.running or record.run is None:
        raise Conflict(f"Container {record.id} is not running", hint=f"ambi start {record.name}")
    if stop and record.auto_remove:
        raise Conflict(
            f"{record.name} is removed when it ends, and its snapshots with it",
            hint="save it without --stop (docker checkpoint create --leave-running)",
        )
    return record.run


def _notes(core: Core, record: Record, run: Run) -> dict[str, str]:
    """What the small files of ours in it say, as far as that is known."""
    plan = LaunchPlan.load(core.roots.instance_data(record.id))
    return {str(file.path): file.content for file in plan.files} | (run.files or {})


def _free_name(home: Path) -> str:
    number = 1
    while (home / f"s{number}").exists():
        number += 1
    return f"s{number}"


@contextmanager
def _held(core: Core, record: Record, stop: bool) -> Iterator[None]:
    """With `stop` no policy starts it again, but for a save that fails: then all is as before."""
    before = record.row.held
    if stop:
        lifecycle.hold(core, record, True)
    try:
        yield
    except BaseException:
        if stop:
            lifecycle.hold(core, record, before)
        raise


def _wait_end(core: Core, record: Record, run: Run) -> None:
    if not core.wait_for(lambda: not record.state.running or record.run is not run, Deadline.after(END_S)):
        core.shims.end(record, run)
    core.publish(record, "stop")


def listed(core: Core, id: str) -> list[Info]:
    """Of one instance, the oldest first."""
    record = core.registry.find(id)
    home = directory(core, record)
    return sorted((_info(record, home / name) for name in files.names(home)), key=lambda it: (it.created_ns, it.name))


def everything(core: Core) -> list[Info]:
    """Of all instances, by name."""
    return [it for record in sorted(core.registry, key=lambda record: record.name) for it in listed(core, record.id)]


def _info(record: Record, home: Path) -> Info:
    empty = Info(record.id, record.name, home.name)
    try:
        found = files.read(home)
        return empty._replace(
            created_ns=found.created_ns,
            size_bytes=found.allocated_bytes(),
            memory_bytes=found.memory_bytes,
            parent=found.parent or "",
            still_ns=found.still_ns,
        )
    except AmbiError as error:
        return empty._replace(problem=error.message)
    except OSError as error:  # a file of it is gone
        return empty._replace(problem=from_os_error(f"snapshot {home.name} is damaged", error).message)


def remove(core: Core, id: str, name: str) -> None:
    """Raises NotFound, Conflict (others follow it; they are named)."""
    record = core.registry.find(id)
    with record.lock:
        lifecycle.check_present(record)
        home = _home(core, record, name)
        if followers := files.children(home.parent, home.name):
            raise Conflict(
                f"snapshot {name} of {record.name} is what others are a difference to: {', '.join(followers)}",
                hint=f"remove those first: ambi snapshot rm {record.name} {' '.join(followers)}",
            )
        try:
            files.remove(home)
        except OSError as error:
            raise from_os_error(f"cannot remove snapshot {name} of {record.name}", error) from error


def _home(core: Core, record: Record, name: str) -> Path:
    home = directory(core, record) / name
    if name not in files.names(home.parent):
        raise NotFound(f"{record.name} has no snapshot {name!r}", hint=f"ambi snapshot ls {record.name}")
    return home


def restore(core: Core, id: str, name: str, *, force: bool) -> None:
    """Start the instance where it stood when `name` was saved. force: one that runs is killed first, after a check.

    Raises NotFound, Corrupt, Unsupported, Conflict (it runs).
    """
    record = core.registry.find(id)
    with record.lock:
        lifecycle.check_present(record)
        home = _home(core, record, name)
        if record.row.isolation is not Isolation.VM:
            raise Unsupported(f"{record.name} is a container, and only virtual machines are saved", hint="ambi start")
        alive = record.state.alive
        if alive and not force:
            raise Conflict(
                f"{record.name} is running, and what it has done since would be lost",
                hint=f"ambi stop {record.name}, or ambi snapshot restore --force {record.name} {name}",
            )
        if alive and record.auto_remove:
            raise Conflict(f"{record.name} is removed when it ends, and its snapshots with it", hint="make it without --rm")
        if alive:
            for it in files.chain(files.read(home)):
                files.verify(it, Deadline.after(SAVE_S))
            lifecycle.end_by_force(core, record)
        lifecycle.start_from(core, record, home)
        run = record.run
        if run is not None:
            run.files = files.read(home).notes
            connect.update_files(core.networks, record, run)


def sweep(core: Core, record: Record) -> None:
    """Remove what another engine did not finish."""
    try:
        files.sweep(directory(core, record))
    except OSError as error:
        log.warning("%s: what is left of a snapshot: %s", record.id[:12], error)
