"""Restart policies, as Docker has them: `no`, `always`, `unless-stopped`, `on-failure[:N]`.

The first restart comes after 100 ms, each further one after twice as long, a minute at most; ten seconds of running begin it
anew. An instance that its user has stopped or killed is *held*: no policy starts it again. With a new boot of the host the
policies apply to what ran before it, and `always` to held instances as well.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, NamedTuple

from ambi.core.errors import AmbiError
from ambi.core.model import ExitStatus, Status
from ambi.engine.body import Body

if TYPE_CHECKING:
    from ambi.engine.core import Core
    from ambi.engine.records import Record

log = logging.getLogger(__name__)

FIRST_S, LONGEST_S = 0.1, 60.0
LONG_RUN_S = 10.0  # after such a run the next restart comes quickly again


class Policy(NamedTuple):
    """most: restarts of `on-failure`, 0 for any number."""

    name: str
    most: int = 0

    def wants(self, code: int, count: int) -> bool:
        """Whether it starts an instance again that has ended with `code` after `count` restarts."""
        if self.name in ("always", "unless-stopped"):
            return True
        return self.name == "on-failure" and code != 0 and (not self.most or count < self.most)


def policy_of(host: dict[str, object]) -> Policy:
    body = Body("HostConfig", host).object("RestartPolicy")
    return Policy(body.text("Name") or "no", body.number("MaximumRetryCount"))


class Restarts:
    """The restarts of one engine that are waited for. Called with the engine's mutex held, but for `close`."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._pauses: dict[str, float] = {}  # instance to seconds before its next restart
        self._waiting: dict[str, int] = {}  # instance to the number of its action
        self._lock = threading.Lock()
        self._open = False  # whether the engine has found what lives on; a restart before would race with that

    def begin(self) -> None:
        """The engine knows its instances: start those that policies want to run."""
        self._open = True
        for record in self._core.registry:
            if record.run is None:
                self._restored(record, booted=record.row.boot_id not in ("", self._core.boot_id))

    def wanted(self, record: Record, status: ExitStatus) -> bool:
        """Whether the policy of `record` starts it again after this end."""
        if record.row.held or record.removing:
            return False
        return policy_of(record.row.spec.host).wants(status.code, record.row.restart_count)

    def count(self, record: Record) -> None:
        """One more restart is on its way."""
        record.row = record.row._replace(restart_count=record.row.restart_count + 1)
        try:
            self._core.db.set_restart_count(record.id, record.row.restart_count)
        except AmbiError as error:  # it is restarted all the same
            log.error("%s: restart count: %s", record.id[:12], error)

    def schedule(self, record: Record) -> None:
        """Start `record` again after its pause, unless that is called off."""
        if not self._open:
            return
        ran_s = (record.state.finished_ns - record.state.started_ns) / 1e9
        with self._lock:
            pause = FIRST_S if ran_s >= LONG_RUN_S else self._pauses.get(record.id, FIRST_S)
            self._pauses[record.id] = min(pause * 2, LONGEST_S)
            self._waiting[record.id] = self._core.scheduler.later(pause, lambda: self._again(record))

    def _again(self, record: Record) -> None:
        from ambi.engine import lifecycle

        with self._lock:
            if self._waiting.pop(record.id, None) is None:
                return
        try:
            lifecycle.start_again(self._core, record)
        except AmbiError as error:
            log.warning("%s: restart: %s", record.id[:12], error)

    def call_off(self, record: Record) -> bool:
        """Whether a restart was waited for; it does not come now, and the instance counts as exited."""
        with self._lock:
            number = self._waiting.pop(record.id, None)
            self._pauses.pop(record.id, None)
        if number is not None:
            self._core.scheduler.cancel(number)
        if record.state.status is not Status.RESTARTING:
            return False
        self._core.set_state(record, record.state._replace(status=Status.EXITED))
        status = ExitStatus(record.state.exit_code, record.state.error)
        for condition in ("not-running", "next-exit"):
            self._core.settle(record, condition, status)
        return True

    def forget_pause(self, record: Record) -> None:
        """The user starts it: the next restarts come as the first ones."""
        with self._lock:
            self._pauses.pop(record.id, None)

    def _restored(self, record: Record, *, booted: bool) -> None:
        """An instance that does not run. booted: the host has been started since it did."""
        if record.state.status is Status.RESTARTING:
            self.schedule(record)
            return
        policy, state = policy_of(record.row.spec.host), record.state
        if not booted or state.status is not Status.EXITED or (record.row.held and policy.name != "always"):
            return
        if policy.wants(state.exit_code, record.row.restart_count):
            record.row = record.row._replace(held=False)
            self._core.db.set_held(record.id, False)
            self._core.set_state(record, state._replace(status=Status.RESTARTING))
            self.schedule(record)
