"""Health checks: a command that is run in an instance now and then, and what its results mean.

Docker's rules: `starting` until the first success; a failure counts unless it falls into the start period; `retries` of them
in a row make it `unhealthy`, one success `healthy`. A probe that takes longer than its timeout is killed and has failed.
"""

from __future__ import annotations

import logging
import select
import signal
import socket
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from ambi.core.deadline import Deadline
from ambi.core.errors import AmbiError, Conflict
from ambi.core.model import ExecId, Status
from ambi.engine import execs
from ambi.engine.healthcheck import Check
from ambi.engine.types import Attach

if TYPE_CHECKING:
    from ambi.engine.core import Core
    from ambi.engine.records import Record, Run

log = logging.getLogger(__name__)

STARTING, HEALTHY, UNHEALTHY = "starting", "healthy", "unhealthy"
OUTPUT_BYTES = 4096
KEPT_RESULTS = 5
_FRAME = 8
_KILL_S = 10.0
_OUTPUT_S = 0.5  # what an ended probe has printed is on its way


class Result(NamedTuple):
    """One probe. code: 0 is healthy, -1 is a probe that could not be run to its end."""

    start_ns: int
    end_ns: int
    code: int
    output: str


class Health(NamedTuple):
    """What is known of an instance's health."""

    status: str = STARTING
    failures: int = 0  # in a row
    results: tuple[Result, ...] = ()


class Probe:
    """A check that runs. Changed under the engine's mutex; closed once."""

    __slots__ = ("begun_ns", "code", "id", "late", "sock", "started", "timer")

    def __init__(self, exec_id: ExecId, sock: socket.socket) -> None:
        self.id, self.sock = exec_id, sock
        self.begun_ns = time.time_ns()
        self.code: int | None = None  # once it has ended
        self.late = False
        self.started = False  # its start is answered
        self.timer = 0


class Monitor:
    """The probes of one run. No thread waits for a probe: its end and its timeout both come as actions of the scheduler."""

    def __init__(self, core: Core, record: Record, run: Run, check: Check) -> None:
        """With the engine's mutex held. A run that is older than this engine is probed as if it had always been watched."""
        self._core, self._record, self._run, self._check = core, record, run, check
        self._probe: Probe | None = None
        record.health = Health(results=record.health.results if record.health is not None else ())
        self._next = core.scheduler.later(max(0.0, self._pause() - self._age()), self._begin)

    def stop(self) -> None:
        """The run has ended. What ends unhealthy is Docker's word for it. With the mutex held."""
        self._core.scheduler.cancel(self._next)
        self._close()
        if self._record.health is not None:
            self._record.health = self._record.health._replace(status=UNHEALTHY)

    def _close(self) -> None:
        probe, self._probe = self._probe, None
        if probe is not None:
            self._core.scheduler.cancel(probe.timer)
            probe.sock.close()

    def _age(self) -> float:
        """Seconds since the start of the run."""
        return max(0.0, (time.time_ns() - self._record.state.started_ns) / 1e9)

    def _in_start_period(self) -> bool:
        return self._age() < self._check.start_period

    def _pause(self) -> float:
        starting = self._record.health is not None and self._record.health.status == STARTING
        return self._check.start_interval if starting and self._in_start_period() else self._check.interval

    def _current(self) -> bool:
        return self._record.monitor is self and self._run.exit is None and not self._record.removing

    def _begin(self) -> None:
        core, record = self._core, self._record
        if not self._current():
            return
        if record.state.status is not Status.RUNNING:  # nothing can be asked while it is paused
            self._again()
            return
        begun = time.time_ns()
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                exec_id = execs.create(core, record.id, self._exec())
                with core.mutex:
                    probe = self._probe = Probe(exec_id, ours)
                    probe.timer = core.scheduler.later(self._check.timeout, lambda: self._overdue(probe))
                attach = Attach(stdin=False, stdout=True, stderr=True)
                wanted = execs.StartRequest(attach, theirs, b"", None, None, self._check.timeout)
                execs.start(core, exec_id, wanted)
            with core.mutex:
                probe.started = True
                if probe.code is not None:  # it has ended already
                    core.scheduler.later(0, lambda: self._finish(probe))
        except AmbiError as error:
            ours.close()
            with core.mutex:
                self._close()
                if not self._current():
                    return
                if not isinstance(error, Conflict):  # else it stands still, as for a commit, or ends
                    self._take(Result(begun, time.time_ns(), -1, error.message))
                self._again()

    def _exec(self) -> dict[str, Any]:
        """Docker's ExecConfig of a probe."""
        return {"Cmd": list(self._check.command), "AttachStdout": True, "AttachStderr": True}

    def exec_ended(self, exec_id: str, code: int) -> None:
        """An exec of the instance has ended. With the mutex held."""
        probe = self._probe
        if probe is not None and probe.id == exec_id and probe.code is None:
            probe.code = code
            if probe.started:  # else `_begin` goes on with it, or knows better why it could not be started
                self._core.scheduler.later(0, lambda: self._finish(probe))

    def _overdue(self, probe: Probe) -> None:
        """It takes too long: kill it. Its end comes as any other, or never."""
        with self._core.mutex:
            if self._probe is not probe or probe.code is not None:
                return
            probe.late = True
            probe.timer = self._core.scheduler.later(_KILL_S, lambda: self._finish(probe))
        try:
            self._run.connection.call("signal", signal=int(signal.SIGKILL), exec_id=probe.id, by=Deadline.after(_KILL_S))
        except AmbiError as error:  # it has ended meanwhile
            log.info("%s: health check: %s", self._record.id[:12], error)

    def _finish(self, probe: Probe) -> None:
        with self._core.mutex:
            if self._probe is not probe:
                return
            probe.sock.setblocking(False)
        output = _read(probe.sock, Deadline.after(_OUTPUT_S))
        with self._core.mutex:
            if self._probe is not probe or not self._current():
                return
            self._close()
            if self._record.state.status is Status.RUNNING:  # else it has been late because it was paused
                code = -1 if probe.late or probe.code is None else probe.code
                text = f"Health check exceeded timeout ({self._check.timeout:g}s)" if probe.late else ""
                self._take(Result(probe.begun_ns, time.time_ns(), code, ": ".join(filter(None, (text, output)))))
            self._again()

    def _again(self) -> None:
        self._next = self._core.scheduler.later(self._pause(), self._begin)

    def _take(self, result: Result) -> None:
        """With the mutex held."""
        before = self._record.health or Health()
        status, failures = before.status, before.failures
        if result.code == 0:
            status, failures = HEALTHY, 0
        elif not (self._in_start_period() and status == STARTING):
            failures += 1
            if failures >= self._check.retries:
                status = UNHEALTHY
        self._record.health = Health(status, failures, (*before.results, result)[-KEPT_RESULTS:])
        if status != before.status:
            self._core.publish(self._record, f"health_status: {status}")
        self._core.changed.notify_all()


def _read(sock: socket.socket, by: Deadline) -> str:
    """What has come in docker's frames, its first OUTPUT_BYTES, until the end of the stream or `by`."""
    data, kept = bytearray(), bytearray()
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    try:
        while len(kept) <= OUTPUT_BYTES and poll.poll(int((by.remaining() or 0) * 1000)):
            piece = sock.recv(65536)
            if not piece:
                break
            data += piece
            while len(data) >= _FRAME and len(data) >= _FRAME + (size := int.from_bytes(data[4:8], "big")):
                kept += data[_FRAME : _FRAME + size]
                del data[: _FRAME + size]
    except OSError:  # the run has ended, and the socket with it
        pass
    return kept[:OUTPUT_BYTES].decode("utf-8", "replace") + ("..." if len(kept) > OUTPUT_BYTES else "")
