"""Health checks: a command that is run in an instance now and then, and what its results mean.

Docker's rules: `starting` until the first success; a failure counts unless it falls into the start period; `retries` of them
in a row make it `unhealthy`, one success `healthy`. A probe that takes longer than its timeout is killed and has failed.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from ambi.core.deadline import Deadline
from ambi.core.errors import AmbiError
from ambi.core.model import Status
from ambi.engine import execs
from ambi.engine.healthcheck import Check
from ambi.engine.types import Attach

if TYPE_CHECKING:
    from ambi.engine.core import Core
    from ambi.engine.records import ExecRecord, Record, Run

log = logging.getLogger(__name__)

STARTING, HEALTHY, UNHEALTHY = "starting", "healthy", "unhealthy"
OUTPUT_BYTES = 4096
KEPT_RESULTS = 5
_FRAME = 8
_KILL_S = 10.0


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


class Monitor:
    """The probes of one run. Changed under the engine's mutex."""

    def __init__(self, core: Core, record: Record, run: Run, check: Check) -> None:
        self._core, self._record, self._run, self._check = core, record, run, check
        self._begun = time.monotonic()
        self._results: deque[Result] = deque(maxlen=KEPT_RESULTS)
        self._next = 0
        record.health = Health()
        self._later()

    def stop(self) -> None:
        """No probe begins any more."""
        self._core.scheduler.cancel(self._next)

    def _later(self) -> None:
        young = self._in_start_period() and self._record.health is not None and self._record.health.status == STARTING
        pause = min(self._check.start_interval, self._check.interval) if young else self._check.interval
        self._next = self._core.scheduler.later(pause, self._probe)

    def _in_start_period(self) -> bool:
        return time.monotonic() - self._begun < self._check.start_period

    def _current(self) -> bool:
        return self._record.run is self._run and self._run.exit is None and not self._record.removing

    def _probe(self) -> None:
        if not self._current():
            return
        if self._record.state.status is Status.RUNNING:
            begin = time.time_ns()
            try:
                code, output = _execute(self._core, self._record, self._check)
            except AmbiError as error:
                code, output = -1, error.message
            if self._current():
                self._take(Result(begin, time.time_ns(), code, output))
        if self._current():
            self._later()

    def _take(self, result: Result) -> None:
        with self._core.mutex:
            before = self._record.health or Health()
            self._results.append(result)
            status, failures = before.status, before.failures
            if result.code == 0:
                status, failures = HEALTHY, 0
            elif not (self._in_start_period() and status == STARTING):
                failures += 1
                if failures >= self._check.retries:
                    status = UNHEALTHY
            self._record.health = Health(status, failures, tuple(self._results))
            if status != before.status:
                self._core.publish(self._record, f"health_status: {status}")
            self._core.changed.notify_all()


def _execute(core: Core, record: Record, check: Check) -> tuple[int, str]:
    """Run one probe; its exit code and the start of its output."""
    config = {"Cmd": list(check.command), "AttachStdout": True, "AttachStderr": True}
    exec_id = execs.create(core, record.id, config)
    item = core.registry.find_exec(exec_id)
    by = Deadline.after(check.timeout)
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            attach = Attach(stdin=False, stdout=True, stderr=True)
            execs.start(core, exec_id, execs.StartRequest(attach, theirs, b"", None, None))
        output = _read(ours, by)
    done = core.wait_for(lambda: item.exit_code is not None, by if not output.cut else Deadline.after(0))
    if done and item.exit_code is not None:
        return item.exit_code, output.text
    _kill(core, item)
    return -1, f"Health check exceeded timeout ({check.timeout:g}s)" + (f": {output.text}" if output.text else "")


def _kill(core: Core, item: ExecRecord) -> None:
    run = item.instance.run
    if run is None:
        return
    try:
        run.connection.call("signal", signal=int(signal.SIGKILL), exec_id=item.id, by=Deadline.after(_KILL_S))
    except AmbiError as error:  # it has ended meanwhile
        log.info("%s: health check: %s", item.instance.id[:12], error)


class _Output(NamedTuple):
    """text: its first OUTPUT_BYTES. cut: the deadline came before its end."""

    text: str
    cut: bool


def _read(sock: socket.socket, by: Deadline) -> _Output:
    """What comes in docker's frames until the end of the stream or `by`."""
    data, kept, cut = bytearray(), bytearray(), False
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    while True:
        left = by.remaining()
        if not poll.poll(None if left is None else int(left * 1000 + 0.999)):
            cut = True
            break
        piece = sock.recv(65536)
        if not piece:
            break
        data += piece
        while len(data) >= _FRAME and len(data) >= _FRAME + (size := int.from_bytes(data[4:8], "big")):
            kept += data[_FRAME : _FRAME + size][: max(0, OUTPUT_BYTES - len(kept))]
            del data[: _FRAME + size]
    return _Output(os.fsdecode(bytes(kept)).encode("utf-8", "replace").decode(), cut)
