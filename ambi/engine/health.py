"""Health checks: a command that is run in an instance now and then, and what its results mean.

Docker's rules: `starting` until the first success; a failure counts unless it falls into the start period; `retries` failures
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
from typing import TYPE_CHECKING, Any, NamedTuple

from ambi.core.deadline import Deadline
from ambi.core.errors import AmbiError, InvalidRequest
from ambi.core.model import Status
from ambi.engine import execs
from ambi.engine.body import Body
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
_MILLISECOND_NS = 1_000_000
_DEFAULTS = {"Interval": 30.0, "Timeout": 30.0, "StartPeriod": 0.0, "StartInterval": 5.0}


class Check(NamedTuple):
    """A health check that is to be run. command: what is executed. Times in seconds."""

    command: tuple[str, ...]
    interval: float
    timeout: float
    start_period: float
    start_interval: float
    retries: int


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


def check_config(config: Body) -> None:
    """Refuse what cannot be a health check, in Docker's words."""
    body = config.object("Healthcheck")
    test = body.strings("Test")
    if test and test[0] not in ("NONE", "CMD", "CMD-SHELL"):
        raise InvalidRequest(f"Unknown healthcheck type '{test[0]}'", hint='["CMD", ...], ["CMD-SHELL", "..."] or ["NONE"]')
    if test and test[0] != "NONE" and (len(test) < 2 or (test[0] == "CMD-SHELL" and len(test) != 2)):
        raise InvalidRequest(f"Healthcheck {test[0]} needs a command", hint="--health-cmd 'COMMAND'")
    for name in _DEFAULTS:
        value = body.number(name)
        if value and value < _MILLISECOND_NS:
            raise InvalidRequest(f"{name} in Healthcheck cannot be less than 1ms", hint="--health-interval 30s")
    if body.number("Retries") < 0:
        raise InvalidRequest("Retries in Healthcheck cannot be negative", hint="--health-retries 3")


def merged(own: dict[str, Any] | None, image: dict[str, Any] | None) -> dict[str, Any] | None:
    """What an instance has: its own check over that of the image, field by field."""
    if not own:
        return image or None
    if not image:
        return own
    return {**image, **{key: value for key, value in own.items() if value}}


def check_of(config: dict[str, Any]) -> Check | None:
    """The check of a completed config, None without one."""
    body = Body("Config", config).object("Healthcheck")
    test = body.strings("Test")
    if not test or test[0] == "NONE":
        return None
    shell = Body("Config", config).strings("Shell") or ["/bin/sh", "-c"]
    command = (*shell, test[1]) if test[0] == "CMD-SHELL" else tuple(test[1:])
    times = [(body.number(name) / 1e9 or default) for name, default in _DEFAULTS.items()]
    return Check(command, times[0], times[1], times[2], times[3], body.number("Retries") or 3)


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
            attach = Attach(stdin=False, stdout=True, stderr=True, logs=False, stream=True)
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
