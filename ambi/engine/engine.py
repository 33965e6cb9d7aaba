"""The engine: instances and images of one data root. Everything blocks and is safe to call from any thread.

Wherever an id is asked for, a name, an id or a unique prefix of one will do.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

from ambi.core.deadline import Deadline
from ambi.core.errors import Conflict
from ambi.core.model import ExecId, ExitStatus, InstanceId, Status, Usage
from ambi.core.roots import Roots
from ambi.engine import (
    adopt,
    attach,
    commit,
    create,
    doctor,
    execs,
    lifecycle,
    livemounts,
    logs,
    pausing,
    query,
    snapshots,
    trees,
    update,
)
from ambi.engine.bus import EventStream
from ambi.engine.core import Core
from ambi.engine.filters import Filters
from ambi.engine.images import ImageService
from ambi.engine.networks import Networks
from ambi.engine.records import Run
from ambi.engine.shims import Shims
from ambi.engine.state import StateDb
from ambi.engine.types import (
    Attach,
    Check,
    CreateSpec,
    EngineInfo,
    Event,
    Exec,
    Instance,
    LogEntry,
    LogQuery,
    WaitCondition,
)
from ambi.engine.volumes import Volumes
from ambi.engine.wait import WaitTicket
from images.store import Store

__all__ = ["Engine", "Event", "EventStream", "WaitTicket"]

InstanceList = list[Instance]
_CALL_S = 30.0


class Engine:
    """See the module. Public attributes: `images`, an `ambi.engine.images.ImageService`, `networks`, an
    `ambi.engine.networks.Networks`, `volumes`, an `ambi.engine.volumes.Volumes`."""

    @classmethod
    def open(cls, roots: Roots) -> Engine:
        """Open the data root: restore the state, adopt living shims, sweep the dead.

        Raises Unsupported (a newer data root), Conflict (another engine has it open).
        """
        roots.data.mkdir(mode=0o711, parents=True, exist_ok=True)
        for path in (roots.data / "instances", roots.run / "instances"):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with ExitStack() as undo:
            db = StateDb(roots.state_db)
            undo.callback(db.close)
            store = Store.open(roots.images)
            undo.callback(store.close)
            engine = cls(Core(roots, db, store, _boot_id()))
            undo.pop_all()
        return engine

    def __init__(self, core: Core) -> None:
        """Use `open`. Takes over `core`, whose records are read here."""
        self._core = core
        self.images = ImageService(core)
        self._id = core.db.meta("engine_id", lambda: secrets.token_hex(16))
        core.shims = Shims(core)
        self.networks = core.networks = Networks(core)
        self.volumes = core.volumes = Volumes(core)
        core.on_auto_remove = lambda record: lifecycle.auto_remove(core, record)
        adopt.restore(core)
        core.on_removed = self.images.remove_unused  # not before: it believes that it knows all instances
        core.on_removed()
        core.shims.warm_up()
        core.networks.warm_up()

    def close(self) -> None:
        """Let go of everything; instances run on."""
        self._core.scheduler.close()
        self._core.bus.close()
        self._core.networks.close()
        self._core.shims.close()
        self._core.store.close()
        self._core.db.close()

    def create(self, name: str | None, spec: CreateSpec) -> tuple[InstanceId, list[str]]:
        """Create an instance; returns its id and warnings.

        Raises NotFound (`No such image: X`), Conflict (the name), InvalidRequest (a field that is wrong or not supported).
        """
        return create.create(self._core, name, spec)

    def get(self, id: str) -> Instance:
        """Raises NotFound (`No such container: X`), InvalidRequest (an ambiguous prefix)."""
        record = self._core.registry.find(id)
        with self._core.mutex:
            return record.snapshot(self._core.roots)

    def list(
        self, all: bool, filters: Filters, limit: int = 0, before: str | None = None, since: str | None = None
    ) -> InstanceList:
        """Newest first. Raises InvalidRequest for an unknown filter."""
        return query.list_instances(self._core, query.Page(all, limit, before, since), filters)

    def start(self, id: str) -> None:
        """Raises NotModified (it runs), CommandNotFound, CommandNotExecutable, Unsupported, ..."""
        lifecycle.start(self._core, id)

    def stop(self, id: str, timeout_s: float | None = None, signal: str | None = None) -> None:
        """Ask with the stop signal, wait, then kill. timeout_s: None for the instance's own, negative for no limit.

        Raises NotModified when it does not run.
        """
        lifecycle.stop(self._core, id, timeout_s, signal)

    def restart(self, id: str, timeout_s: float | None = None, signal: str | None = None) -> None:
        lifecycle.restart(self._core, id, timeout_s, signal)

    def kill(self, id: str, signal: str | None = None) -> None:
        """`signal`: `TERM`, `SIGTERM` or `15`; SIGKILL by default. Raises Conflict when it does not run."""
        lifecycle.kill(self._core, id, signal)

    def rename(self, id: str, name: str) -> None:
        lifecycle.rename(self._core, id, name)

    def remove(self, id: str, force: bool = False, volumes: bool = False) -> None:
        """Raises Conflict when it runs and `force` is not set. volumes: its anonymous volumes, too."""
        lifecycle.remove(self._core, id, force, volumes=volumes)

    def prune(self, filters: Filters) -> tuple[tuple[InstanceId, ...], int]:
        """Remove every instance that does not run; returns their ids and the bytes freed."""
        return query.prune(self._core, filters)

    def resize(self, id: str, rows: int, columns: int) -> None:
        record = self._core.registry.find(id)
        run = record.run
        if run is None or run.exit is not None:
            raise Conflict(f"Container {record.id} is not running")
        run.connection.call("resize", rows=rows, columns=columns, exec_id=None, by=Deadline.after(_CALL_S))
        self._core.publish(record, "resize", height=str(rows), width=str(columns))

    def attach(self, id: str, how: Attach, sock: socket.socket, pending: bytes, write_head: Callable[[], None]) -> None:
        """Hand `sock` to the instance's shim, with the bytes that the client has sent already.

        `write_head` is called once, after every check and before the shim may write: it writes the HTTP head. An error
        before that call can still be answered with a status; after it `sock` belongs to the shim. The caller closes its
        own descriptor in both cases. Raises NotFound, Conflict.
        """
        attach.attach(self._core, id, how, sock, pending, write_head)

    def wait(self, id: str, condition: WaitCondition = "not-running") -> WaitTicket:
        """The interest is registered when this returns."""
        core = self._core
        record = core.registry.find(id)
        ticket = WaitTicket(condition, record)
        with core.mutex:
            if condition == "not-running" and not record.state.alive:
                ticket.settle(ExitStatus(record.state.exit_code, record.state.error))
            else:
                record.tickets = [kept for kept in record.tickets if not kept.settled] + [ticket]
        return ticket

    @contextmanager
    def shared_wait(self, ticket: WaitTicket, client: socket.socket, *, chunked: bool) -> Iterator[None]:
        """Send the head of the answer to `client` in the `with`: it is answered then even if this engine dies.

        chunked: how the body is framed. The caller answers as ever, and closes the ticket before the socket.
        """
        core, record = self._core, ticket.record
        with core.handing_over(record):
            yield
            ticket.answers_to(client, chunked=chunked)
            with core.mutex:
                run = record.run if record.run is not None and record.run.exit is None else None
            if run is not None:
                ticket.share(run.connection)

    def logs(self, id: str, wanted: LogQuery) -> Iterator[LogEntry | None]:
        """Checks at once, then an iterator; it ends with the run when following.

        None comes about once a second when nothing does, so that the caller can look at its client.
        """
        return logs.logs(self._core, id, wanted)

    def exec_create(self, id: str, config: dict[str, Any]) -> ExecId:
        """`config`: Docker's ExecConfig. Raises Conflict when the instance does not run, InvalidRequest."""
        return execs.create(self._core, id, config)

    def exec_start(
        self,
        exec_id: str,
        attach: Attach | None,
        sock: socket.socket | None = None,
        pending: bytes = b"",
        write_head: Callable[[], None] | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        """Run it; `attach` None is detached. As with `attach`, `write_head` is called after every check.

        size: rows and columns of its terminal at start. An error of the program itself (CommandNotFound, ...) comes after
        the head: the shim has then written its text to `sock`, and it is raised as well.
        """
        execs.start(self._core, exec_id, execs.StartRequest(attach, sock, pending, write_head, size))

    def exec_get(self, exec_id: str) -> Exec:
        """Raises NotFound (`No such exec instance: X`)."""
        return execs.get(self._core, exec_id)

    def exec_resize(self, exec_id: str, rows: int, columns: int) -> None:
        execs.resize(self._core, exec_id, rows, columns)

    def pause(self, id: str) -> None:
        """Raises Conflict when it does not run or is paused, Unsupported."""
        pausing.pause(self._core, id)

    def unpause(self, id: str) -> None:
        """Raises Conflict when it is not paused."""
        pausing.unpause(self._core, id)

    def save(self, id: str, name: str, *, stop: bool = False) -> str:
        """A snapshot of a running VM, which runs on, or ends with it: its name. See snapshots.save."""
        return snapshots.save(self._core, id, name, stop=stop)

    def snapshots(self, id: str | None = None) -> Sequence[snapshots.Info]:
        """Of one instance, or of all."""
        return snapshots.everything(self._core) if id is None else snapshots.listed(self._core, id)

    def remove_snapshot(self, id: str, name: str) -> None:
        """Raises NotFound, Conflict (others are a difference to it)."""
        snapshots.remove(self._core, id, name)

    def restore(self, id: str, name: str, *, force: bool = False) -> None:
        """Start it where it stood when `name` was saved. force: one that runs is killed first."""
        snapshots.restore(self._core, id, name, force=force)

    def attach_volume(self, id: str, volume: str) -> None:
        """Mount `volume`, SOURCE:TARGET[:MODE] as `-v` has it, in a running instance, until it is detached or the run ends.

        Raises NotFound, InvalidRequest, Conflict, Unsupported; nothing is mounted then.
        """
        livemounts.attach(self._core, id, volume)

    def detach_volume(self, id: str, target: str, *, force: bool = False) -> None:
        """Unmount it. force: also while it is in use. Raises NotFound, InvalidRequest, Conflict."""
        livemounts.detach(self._core, id, target, force=force)

    def update(self, id: str, changes: dict[str, Any]) -> Sequence[str]:
        """Change limits and the restart policy, now and for later runs; returns warnings.

        `changes`: fields of HostConfig. Raises InvalidRequest, Conflict (below what is in use), Unsupported (while it runs).
        """
        return update.update(self._core, id, changes)

    def top(self, id: str) -> tuple[dict[str, Any], ...]:
        """The shape of `ambi.core.driver.Created.processes`. Raises Conflict when it does not run."""
        answer = self._running(id).connection.call("processes", by=Deadline.after(_CALL_S))
        return tuple(answer["processes"])

    def usage(self, id: str) -> Usage:
        """Raises Conflict when it does not run."""
        return Usage(**self._running(id).connection.call("usage", by=Deadline.after(_CALL_S)))

    def machine(self, id: str) -> dict[str, Any]:
        """What the driver tells of the machine behind a running instance; {} of a container. Raises Conflict."""
        return self._running(id).connection.call("inspect", by=Deadline.after(_CALL_S))

    def traffic(self, id: str) -> dict[str, dict[str, int]]:
        """rx_bytes, tx_packets, ... of each interface by its name; {} without a network of ours."""
        return self.networks.counters(self._core.registry.find(id))

    def _running(self, id: str) -> Run:
        record = self._core.registry.find(id)
        run = record.run
        if run is None or not record.state.running:
            raise Conflict(f"Container {record.id} is not running")
        return run

    def path_stat(self, id: str, path: str) -> trees.PathStat:
        """What is at `path` in the instance, running or not. Raises NotFound (`Could not find the file ...`)."""
        return trees.stat(self._core, id, path)

    def archive(self, id: str, path: str) -> AbstractContextManager[tuple[trees.PathStat, BinaryIO]]:
        """What is at `path` as a tar stream; the end of the `with` raises what went wrong after its beginning."""
        return trees.get(self._core, id, path)

    def unpack(self, id: str, path: str, chunks: Iterable[bytes], *, no_overwrite: bool, copy_ids: bool) -> None:
        """Put a plain tar archive into the directory `path`. Raises NotFound, InvalidRequest (no directory, read-only)."""
        trees.put(self._core, id, path, chunks, no_overwrite=no_overwrite, copy_ids=copy_ids)

    def changes(self, id: str) -> Sequence[trees.Change]:
        """What the instance has changed in its image, by path."""
        return trees.changes(self._core, id)

    def export(self, id: str) -> AbstractContextManager[BinaryIO]:
        """The whole root as a tar stream."""
        return trees.export(self._core, id)

    def commit(self, id: str, wanted: commit.Wanted, *, pause: bool) -> str:
        """An image of the instance's changes on its own image; its id."""
        return commit.commit(self._core, id, wanted, pause=pause)

    def events(self, since_ns: int | None, until_ns: int | None, filters: Filters) -> EventStream:
        """Replay from `since_ns`, then live; with `until_ns` it ends there. Registered when this returns."""
        return self._core.bus.open(since_ns, until_ns, filters)

    def info(self) -> EngineInfo:
        core = self._core
        statuses = [record.state.status for record in core.registry]
        paused = statuses.count(Status.PAUSED)
        running = statuses.count(Status.RUNNING) + statuses.count(Status.RESTARTING)
        return EngineInfo(
            version=_version(),
            pid=os.getpid(),
            zygote_pid=core.shims.zygote_pid(),
            started_ns=core.started_ns,
            data_root=core.roots.data,
            run_root=core.roots.run,
            socket=core.roots.socket,
            running=running,
            paused=paused,
            stopped=len(statuses) - running - paused,
            images=self.images.count(),
            layer_form=self.images.layer_form(),
            cgroup_version=doctor.cgroup_version(),
            engine_id=self._id,
        )

    def doctor(self) -> tuple[Check, ...]:
        return doctor.checks(self._core)


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _version() -> str:
    try:
        return metadata.version("ambi")
    except metadata.PackageNotFoundError:
        return "0.1.0"
