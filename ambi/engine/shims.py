"""The shims of the instances: spawned, adopted, listened to, and swept after when they die."""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import threading
import time
from typing import Any

from ambi.core.deadline import Deadline
from ambi.core.errors import AmbiError, Internal, Unavailable, from_os_error
from ambi.core.model import ExitStatus, Status
from ambi.core.plan import LaunchPlan
from ambi.engine import execs
from ambi.engine.core import KILLED_WITH_SHIM, Core
from ambi.engine.records import Record, Run
from ambi.linux import unix
from ambi.shim import client, drivers, leave
from ambi.shim import record as shim_record

log = logging.getLogger(__name__)

_START_OUTCOME_S = 300.0  # a start that is under way has a result by then
_DEATH_S = 10.0
_FORGET_TRIES = 5
_GRACE_S = 10.0  # for a shim that still serves what clients have not read


class Shims:
    """Every shim of this engine. Safe to use from any thread."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._zygote = client.ZygoteClient(core.roots.run)
        self._closed = False

    def zygote_pid(self) -> int:
        """Starts the zygote when there is none. Raises Unavailable."""
        return int(self._zygote.ping()["pid"])

    def warm_up(self) -> None:
        """Start the zygote before somebody waits for it."""
        threading.Thread(target=self._warm_up, name="warm-up", daemon=True).start()

    def forget_layers(self) -> None:
        """Have layers unmounted that the store has removed: as long as they are mounted they take space on the disk."""
        threading.Thread(target=self._forget_layers, name="forget", daemon=True).start()

    def _forget_layers(self) -> None:
        try:
            for _ in range(_FORGET_TRIES):
                stored = {name.partition(".")[0] for name in os.listdir(self._core.roots.images / "layers")}
                mounted = [name for name in os.listdir(self._core.roots.layers) if not name.startswith(".")]
                gone = {name for name in mounted if name not in stored}
                if not gone or self._closed or not gone - set(self._zygote.forget(sorted(gone))):
                    return
                time.sleep(1.0)  # the kernel is still taking down the namespace of the last instance that read them
        except FileNotFoundError:  # nothing has ever been mounted
            return
        except AmbiError as error:
            log.warning("layers that are not needed stay mounted: %s", error)

    def _warm_up(self) -> None:
        try:
            self.zygote_pid()
            self._forget_layers()
        except AmbiError as error:
            log.error("%s", error)

    def close(self) -> None:
        """Let go of every shim and end the zygote; instances run on, and keep the layers' mount namespace."""
        self._closed = True
        for record in self._core.registry:
            if record.run is not None:
                record.run.connection.close()
        self._zygote.stop()

    def spawn(self, record: Record, *, starts: bool = True) -> Run:
        """A new shim for the next run of `record`, whose lock is held. Nothing has been started. starts: it will be."""
        core = self._core
        run_dir = core.roots.instance_run(record.id)
        try:
            run_dir.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise from_os_error(f"cannot start container {record.id}", error) from error
        run = Run()
        run.connection = self._zygote.spawn(
            record.id,
            record.row.isolation.value,
            core.roots.instance_data(record.id),
            run_dir,
            starts=starts,
            on_event=lambda event: self._on_event(record, run, event),
            on_close=lambda: self._on_close(record, run),
        )
        with core.mutex:
            if not run.gone.is_set():
                record.run = run
        return run

    def adopt(self, record: Record) -> Run | None:
        """Connect to the living shim of `record`, None when there is none. Raises Unsupported for one of another version."""
        core = self._core
        run = Run()
        run.files = None
        connection = client.connect(
            record.id,
            core.roots.instance_run(record.id),
            on_event=lambda event: self._on_event(record, run, event),
            on_close=lambda: self._on_close(record, run),
        )
        if connection is None:
            return None
        run.connection = connection
        with core.mutex:
            if not run.gone.is_set():
                record.run = run
        return run

    def _on_event(self, record: Record, run: Run, event: dict[str, Any]) -> None:
        """In the callbacks' thread: short, and never waits for anybody."""
        kind = event.get("event")
        if kind == "exit":
            self._core.exited(record, run, ExitStatus(**event["exit"]))
        elif kind == "exec_exit":
            execs.ended(self._core, record, event["exec_id"], int(event["exit"]["code"]))
        elif kind == "oom":
            with self._core.mutex:
                self._core.tell_oom(record)
        elif kind == "detach":
            self._core.publish(record, "detach")

    def _on_close(self, record: Record, run: Run) -> None:
        if not self._closed:
            threading.Thread(target=self._ended, args=(record, run), name=f"end {record.id[:12]}", daemon=True).start()

    def _ended(self, record: Record, run: Run) -> None:
        """The connection of `run` is gone: account for how, see that nothing is left, and free the record."""
        core = self._core
        core.wait_for(lambda: not run.starting, Deadline.after(_START_OUTCOME_S))
        try:
            if run.exit is None and run.started:
                self._lost(record, run)
            elif run.failed:
                self.kill_shim(record.id, grace_s=_GRACE_S)
                self.sweep(record.id)
        except Exception:
            log.exception("%s: after the end of its shim", record.id[:12])
        finally:
            core.ended(record, run)

    def _lost(self, record: Record, run: Run) -> None:
        """No exit was told: exit.json has it, or the shim was killed. A shim that lives is not let go on unwatched."""
        status = leave.read_exit(self._core.roots.instance_data(record.id))
        if status is None:
            self.kill_shim(record.id)
            status = leave.read_exit(self._core.roots.instance_data(record.id))
            self.sweep(record.id)
            log.warning("%s: %s", record.id[:12], KILLED_WITH_SHIM)
        self._core.exited(record, run, status or ExitStatus(137, KILLED_WITH_SHIM, finished_ns=time.time_ns()))

    def end(self, record: Record, run: Run) -> None:
        """Kill the shim of `run`; its init dies with it, the rest is swept. Returns when it is gone."""
        self.kill_shim(record.id)
        run.connection.close()
        if not run.gone.wait(_START_OUTCOME_S):
            raise Unavailable(f"container {record.id}: its shim is dead, but what it left could not be removed")

    def account(self, record: Record) -> None:
        """End a run that this engine has no connection to: one of a shim of another version, above all."""
        self.kill_shim(record.id)
        status = leave.read_exit(self._core.roots.instance_data(record.id))
        self.sweep(record.id)
        with self._core.mutex:
            if record.state.running and record.run is None:
                reason = status or ExitStatus(137, KILLED_WITH_SHIM, finished_ns=time.time_ns())
                self._core.record_exit(record, reason)

    def kill_shim(self, id: str, *, grace_s: float = 0.0) -> None:
        """SIGKILL for the process in shim.json, if it is still that process after `grace_s`; returns when it is dead."""
        found = shim_record.read(self._core.roots.instance_run(id))
        if found is None or not found.alive():
            return
        try:
            pidfd = os.pidfd_open(found.pid)
        except OSError:
            return
        try:
            if select.select([pidfd], [], [], grace_s)[0] or not found.alive():
                return
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            if not select.select([pidfd], [], [], _DEATH_S)[0]:
                raise Internal(f"shim {found.pid} of {id} does not die")
        except ProcessLookupError:
            return
        finally:
            os.close(pidfd)

    def sweep(self, id: str) -> None:
        """Remove whatever a dead shim left of the instance's last run. Idempotent."""
        try:
            plan = LaunchPlan.load(self._core.roots.instance_data(id))
        except (OSError, AmbiError):
            return  # never started: nothing was made
        drivers.load(plan.isolation.value).sweep(plan)


class Notices:
    """Listens on notify.sock for shims that ended without a connection to an engine. Answering is the acknowledgement."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._listener = unix.listen(core.roots.notify_socket)
        threading.Thread(target=self._serve, name="notices", daemon=True).start()

    def close(self) -> None:
        try:
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError:  # its thread has ended already
            pass
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with sock:
                try:
                    sock.settimeout(5.0)
                    if unix.peer(sock).uid != os.geteuid():
                        continue
                    message = unix.receive(sock)
                    if message is not None:
                        self._take(message.body)
                        unix.send(sock, {"ok": {}})
                except (AmbiError, OSError, KeyError, TypeError, ValueError) as error:
                    log.warning("a shim's notice: %s", error)

    def _take(self, body: dict[str, Any]) -> None:
        """Record an exit that only this notice tells of; the restore of this engine has mostly done so from exit.json."""
        id, status = str(body["id"]), ExitStatus(**body["exit"])
        if id not in self._core.registry:
            return
        record = self._core.registry.find(id)
        with self._core.mutex:
            run = record.run
            if run is not None:
                self._core.exited(record, run, status)
            elif record.state.running:
                self._core.record_exit(record, status)
                if record.state.status is Status.RESTARTING:
                    self._core.restarts.schedule(record)
