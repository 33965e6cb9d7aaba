"""What the parts of the engine share: the state, the records, the events, the shims, and how a run ends."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ambi.core.deadline import Deadline
from ambi.core.errors import AmbiError
from ambi.core.model import ExitStatus, Status
from ambi.core.roots import Roots
from ambi.engine.bus import EventBus, attributes_of
from ambi.engine.records import ExecRecord, Record, Registry, Run
from ambi.engine.restart import Restarts
from ambi.engine.schedule import Scheduler
from ambi.engine.state import StateDb
from ambi.engine.types import State

if TYPE_CHECKING:
    from ambi.engine.networks import Networks
    from ambi.engine.shims import Shims
    from ambi.engine.volumes import Volumes
    from images.store import Store

log = logging.getLogger(__name__)

# How a run may end when its shim cannot tell.
KILLED_WITH_SHIM = "the shim was killed"
OTHER_BOOT = "the host was restarted"


class Core:
    """One open engine. `mutex` guards states, runs, execs and tickets, and is held for moments only; the lock of a record
    comes before it, never after. `changed` is notified whenever a state changes or a run ends.
    """

    def __init__(self, roots: Roots, db: StateDb, store: Store, boot_id: str) -> None:
        self.roots = roots
        self.db = db
        self.store = store
        self.boot_id = boot_id
        self.bus = EventBus(db)
        self.registry = Registry()
        self.mutex = threading.RLock()
        self.changed = threading.Condition(self.mutex)
        self.started_ns = time.time_ns()
        self.shims: Shims
        self.networks: Networks
        self.volumes: Volumes
        self.scheduler = Scheduler()
        self.restarts = Restarts(self)
        self.claims: Counter[str] = Counter()  # images of which instances are being made
        self.on_auto_remove: Callable[[Record], None] = lambda _: None
        self.on_removed: Callable[[], None] = lambda: None  # an instance is gone, or was not made after all

    @contextmanager
    def claim(self, image_id: str) -> Iterator[None]:
        """The image counts as used until the end of the `with`."""
        with self.mutex:
            self.claims[image_id] += 1
        try:
            yield
        finally:
            with self.mutex:
                self.claims[image_id] -= 1
            self.on_removed()

    @contextmanager
    def handing_over(self, record: Record) -> Iterator[None]:
        """A start of `record` waits for the end of the `with`: a client that has its answer may ask for it at once."""
        with self.mutex:
            record.attaching += 1
        try:
            yield
        finally:
            with self.mutex:
                record.attaching -= 1
                self.changed.notify_all()

    def publish(self, record: Record, action: str, **own: str) -> None:
        """An event of an instance, with its labels, image and name as Docker has them."""
        row = record.row
        attributes = attributes_of(row.spec.config.get("Labels"), image=row.image, name=row.name, **own)
        self.bus.publish("container", action, row.id, attributes)

    def tell_oom(self, record: Record) -> None:
        """The event `oom`, once a run. With the mutex held."""
        if not record.oom_told:
            record.oom_told = True
            self.publish(record, "oom")

    def set_state(self, record: Record, state: State) -> None:
        """Store and show `state`. With the mutex held."""
        record.state = state
        try:
            self.db.set_state(record.id, state, self.boot_id)
        except AmbiError as error:  # it is true all the same, and exit.json tells the next engine
            log.error("%s: state %s is not stored: %s", record.id[:12], state.status.value, error)
        self.changed.notify_all()

    def store_exec(self, item: ExecRecord) -> None:
        """With the mutex held."""
        try:
            self.db.set_exec(item.id, item.pid, item.exit_code)
        except AmbiError as error:
            log.error("exec %s: its end is not stored: %s", item.id[:12], error)

    def settle(self, record: Record, condition: str, status: ExitStatus) -> None:
        """Answer the tickets of `record` that wait for `condition`. With the mutex held."""
        kept = []
        for ticket in record.tickets:
            if ticket.condition == condition:
                ticket.settle(status)
            if not ticket.settled:
                kept.append(ticket)
        record.tickets = kept

    def exited(self, record: Record, run: Run, status: ExitStatus) -> None:
        """Init of `run` has ended; known from its shim, from exit.json, or by its death. The first counts."""
        with self.mutex:
            if run.exit is None:
                run.exit = status
                self.finish(record, run)

    def finish(self, record: Record, run: Run) -> None:
        """Record the end of `run` once both its start and its end are known. With the mutex held."""
        if run.started and run.exit is not None and not run.recorded:
            run.recorded = True
            self.record_exit(record, run.exit)

    def record_exit(self, record: Record, status: ExitStatus) -> None:
        """The state, the events and the waiters of an exit. With the mutex held, once a run."""
        finished = status.finished_ns or time.time_ns()
        if record.monitor is not None:
            record.monitor.stop()
            record.monitor = None
        again = self.restarts.wanted(record, status)
        state = record.state._replace(
            status=Status.RESTARTING if again else Status.EXITED,
            pid=0,
            exit_code=status.code,
            error=status.reason,
            oom_killed=status.oom_killed,
            finished_ns=finished,
        )
        for item in record.execs.values():
            if item.started and item.exit_code is None:
                item.exit_code = 137
                self.store_exec(item)
        if again:
            self.restarts.count(record)
        self.set_state(record, state)
        if status.oom_killed:
            self.tell_oom(record)
        elapsed = max(0, finished - state.started_ns) // 1_000_000_000
        self.publish(record, "die", execDuration=str(elapsed), exitCode=str(status.code))
        self.settle(record, "not-running", status)
        self.settle(record, "next-exit", status)

    def monitor(self, record: Record, run: Run) -> None:
        """Begin the health checks of a run that has one. With the mutex held."""
        from ambi.engine.health import Monitor
        from ambi.engine.healthcheck import check_of

        check = check_of(record.row.spec.config)
        record.monitor = Monitor(self, record, run, check) if check is not None else None

    def ended(self, record: Record, run: Run) -> None:
        """The connection of `run` has ended and everything of it is swept: its instance can be started or removed."""
        if run.started:  # a start that failed has let go itself, and the next one may be on its way
            self.networks.release(record)
            self.volumes.unmounted(record)
        with self.mutex:
            if record.run is run:
                record.run = None
            run.gone.set()
            self.changed.notify_all()
            over = run.exit is not None and run.started
            if over and record.state.status is Status.RESTARTING:
                self.restarts.schedule(record)
        if over and record.auto_remove:
            try:
                self.on_auto_remove(record)
            except AmbiError as error:
                log.warning("%s: automatic removal: %s", record.id[:12], error)

    def wait_for(self, condition: Callable[[], bool], by: Deadline) -> bool:
        """Wait until `condition` holds, looked at with the mutex held; false when `by` has passed."""
        with self.mutex:
            return self.changed.wait_for(condition, by.remaining())
