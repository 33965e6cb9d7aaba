"""The instances in memory: what is stored of them, and what only a running engine knows."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ambi.core.errors import Conflict, InvalidRequest, NotFound
from ambi.core.model import ExecId, ExitStatus, InstanceId
from ambi.core.roots import Roots
from ambi.engine import logopts
from ambi.engine.endpoints import asked_for
from ambi.engine.mountpoints import Point, points_of
from ambi.engine.netstate import NetState
from ambi.engine.request import argv_of
from ambi.engine.state import Row
from ambi.engine.types import Exec, Instance, State
from ambi.engine.wait import WaitTicket
from ambi.shim.client import ShimConnection

if TYPE_CHECKING:
    from ambi.engine.health import Health, Monitor


class Run:
    """One shim, from its birth to the end of its connection. Changed under the engine's mutex.

    starting: a start is on its way. started: init runs or ran, and is recorded so. failed: the start failed. exit: how init
    ended, known before `gone`. recorded: so is its end. gone: the connection has ended, and what the kernel held of the
    instance is free. looks: how often somebody has looked into the root by a shim that runs nothing. files: what has been
    written anew of the small files of its plan, by path; None while that is not known, of a run of an earlier engine.
    mounts: what was attached while it ran, by target.
    """

    __slots__ = ("connection", "exit", "failed", "files", "gone", "looks", "mounts", "recorded", "started", "starting")

    connection: ShimConnection

    def __init__(self) -> None:
        self.failed = False
        self.files: dict[str, str] | None = {}
        self.looks = 0
        self.mounts: dict[str, Point] = {}
        self.recorded = False
        self.starting = False
        self.started = False
        self.exit: ExitStatus | None = None
        self.gone = threading.Event()


class ExecRecord:
    """One exec. Changed under the engine's mutex. `answered` is clear while the shim is asked to start it."""

    __slots__ = ("answered", "config", "exit_code", "id", "instance", "pid", "started")

    def __init__(self, exec_id: ExecId, instance: Record, config: dict[str, object]) -> None:
        self.id = exec_id
        self.instance = instance
        self.config = config
        self.answered = threading.Event()
        self.answered.set()
        self.pid = 0
        self.started = False
        self.exit_code: int | None = None

    def snapshot(self) -> Exec:
        running = self.started and self.exit_code is None
        return Exec(self.id, self.instance.id, self.config, running, self.exit_code, self.pid)


class Record:
    """One instance. `lock` is held through start, stop, rename and remove; everything else changes under the mutex."""

    __slots__ = (
        "attaching",
        "execs",
        "health",
        "lock",
        "monitor",
        "net",
        "oom_told",
        "removing",
        "row",
        "run",
        "state",
        "tickets",
    )

    def __init__(self, row: Row) -> None:
        self.row = row
        self.state: State = row.state
        self.lock = threading.RLock()
        self.run: Run | None = None
        self.execs: dict[ExecId, ExecRecord] = {}
        self.tickets: list[WaitTicket] = []
        self.removing = False
        self.oom_told = False  # in this run
        self.health: Health | None = None  # of this run or the last one; None without a check
        self.monitor: Monitor | None = None
        self.net: NetState | None = None  # None: as the request asks for it, see Networks.state
        self.attaching = 0  # clients that have been answered, but that the shim does not have yet

    @property
    def id(self) -> InstanceId:
        return self.row.id

    @property
    def name(self) -> str:
        return self.row.name

    @property
    def auto_remove(self) -> bool:
        return bool(self.row.spec.host.get("AutoRemove"))

    def attached(self) -> tuple[Point, ...]:
        """The mounts that it has for this run alone."""
        run = self.run
        return tuple(run.mounts.values()) if run is not None else ()

    def snapshot(self, roots: Roots) -> Instance:
        row = self.row
        data = roots.instance_data(row.id)
        return Instance(
            id=row.id,
            name=row.name,
            workload=row.workload,
            isolation=row.isolation,
            image=row.image,
            image_id=row.image_id,
            spec=row.spec,
            argv=argv_of(row.spec.config),
            created_ns=row.created_ns,
            state=self.state,
            restart_count=row.restart_count,
            exec_ids=tuple(item.id for item in list(self.execs.values()) if item.exit_code is None),
            data_dir=data,
            run_dir=roots.instance_run(row.id),
            health=self.health,
            net=self.net if self.net is not None else NetState(asked_for(row.spec)),
            mounts=(*points_of(row.mounts), *self.attached()),
            log_path=logopts.log_path(row.spec.host, data, row.id),
        )


class Registry:
    """Records by id, name and prefix, under a lock of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._records: dict[str, Record] = {}
        self._names: dict[str, str] = {}  # name to id; also names that a create has reserved
        self._execs: dict[str, ExecRecord] = {}

    def __iter__(self) -> Iterator[Record]:
        with self._lock:
            return iter(list(self._records.values()))

    def __contains__(self, id: str) -> bool:
        return id in self._records

    def names(self) -> set[str]:
        with self._lock:
            return set(self._names)

    def reserve(self, name: str, id: str) -> None:
        """Take `name` for the instance `id`. Raises Conflict with Docker's words."""
        with self._lock:
            owner = self._names.setdefault(name, id)
        if owner != id:
            raise Conflict(
                f'Conflict. The container name "/{name}" is already in use by container "{owner}". You have to remove'
                " (or rename) that container to be able to reuse that name.",
                hint=f"ambi rm -f {name}, or ambi rename {name} NEW, or another --name",
            )

    def release(self, name: str) -> None:
        with self._lock:
            self._names.pop(name, None)

    def add(self, record: Record) -> None:
        with self._lock:
            self._records[record.id] = record
            self._names[record.name] = record.id

    def drop(self, record: Record) -> None:
        with self._lock:
            self._records.pop(record.id, None)
            self._names.pop(record.name, None)
            for exec_id in record.execs:
                self._execs.pop(exec_id, None)

    def find(self, id: str) -> Record:
        """By id, name or unique prefix of an id, in this order."""
        name = id.removeprefix("/")
        with self._lock:
            record = self._records.get(id) or self._records.get(self._names.get(name, ""))
            if record is None and id:
                found = [r for key, r in self._records.items() if key.startswith(id)]
                if len(found) > 1:
                    raise InvalidRequest(
                        f"Multiple IDs found with provided prefix: {id}", hint="give more of the ID, or the name"
                    )
                record = found[0] if found else None
        if record is None:
            raise NotFound(f"No such container: {id}")
        return record

    def add_exec(self, record: ExecRecord) -> None:
        with self._lock:
            self._execs[record.id] = record
            record.instance.execs[record.id] = record

    def drop_old_execs(self, instance: Record, keep: int) -> list[str]:
        """Forget all but the last `keep` ended execs of an instance; returns the ids of the forgotten."""
        with self._lock:
            ended = [exec_id for exec_id, item in instance.execs.items() if item.exit_code is not None]
            gone: list[str] = list(ended[: max(0, len(ended) - keep)])
            for exec_id in gone:
                instance.execs.pop(ExecId(exec_id))
                self._execs.pop(exec_id, None)
        return gone

    def find_exec(self, id: str) -> ExecRecord:
        with self._lock:
            record = self._execs.get(id)
            if record is None and len(id) >= 4:
                found = [r for key, r in self._execs.items() if key.startswith(id)]
                record = found[0] if len(found) == 1 else None
        if record is None:
            raise NotFound(f"No such exec instance: {id}")
        return record
