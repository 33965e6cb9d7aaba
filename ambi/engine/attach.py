"""Handing a client's socket over to the shim, which then owns it."""

from __future__ import annotations

import base64
import logging
import socket
import struct
from collections.abc import Callable
from typing import Any

from ambi.core.deadline import Deadline
from ambi.core.errors import AmbiError, Conflict, Unavailable
from ambi.core.model import Status
from ambi.engine import logs
from ambi.engine.core import Core
from ambi.engine.lifecycle import check_present, wait_run_end
from ambi.engine.records import Record, Run
from ambi.engine.types import Attach, LogQuery

log = logging.getLogger(__name__)

CALL_S = 30.0
_DETACH_KEYS = b"\x10\x11"  # ctrl-p ctrl-q


def wire(attach: Attach, *, stdin: bool, tty: bool, pending: bytes) -> dict[str, Any]:
    """The ATTACH object of ambi/shim/PROTOCOL.md."""
    keys = _DETACH_KEYS if attach.detach_keys is None else attach.detach_keys
    return {
        "stdin": stdin,
        "stdout": attach.stdout,
        "stderr": attach.stderr,
        "logs": attach.logs,
        "stream": attach.stream,
        "framed": attach.framed,
        "detach_keys": list(keys) if tty else [],
        "pending": base64.b64encode(pending).decode(),
    }


def attach(core: Core, id: str, wanted: Attach, sock: socket.socket, pending: bytes, write_head: Callable[[], None]) -> None:
    """See `Engine.attach`. A client that has its answer may ask for the start at once, which waits for the hand-over."""
    record = core.registry.find(id)
    check_present(record)
    if record.state.status is Status.PAUSED:
        raise Conflict(f"Container {record.id} is paused, unpause the container before attach.")
    if record.state.status is Status.RESTARTING:
        raise Conflict(f"Container {record.id} is restarting, wait until the container is running")
    run = _run(core, record) if wanted.stream else record.run
    with core.handing_over(record):
        write_head()
        _hand_over(core, record, run, wanted, sock, pending)


def _hand_over(core: Core, record: Record, run: Run | None, wanted: Attach, sock: socket.socket, pending: bytes) -> None:
    """The client has its answer: whatever goes wrong from here on only ends its stream."""
    config = record.row.spec.config
    if wanted.logs and (run is None or not run.started or run.exit is not None):
        _replay(core, record, wanted, sock)
        wanted = wanted._replace(logs=False)
    if run is None or not (wanted.stream or wanted.logs):
        return
    stdin = wanted.stdin and bool(config.get("OpenStdin"))
    body = wire(wanted, stdin=stdin, tty=bool(config.get("Tty")), pending=pending)
    try:
        run.connection.call("attach", fds=[sock.fileno()], by=Deadline.after(CALL_S), **body)
    except (Conflict, Unavailable):  # the run has ended meanwhile, with nothing more to say than what is logged
        if wanted.logs:
            _replay(core, record, wanted, sock)
        return
    core.publish(record, "attach")


def _run(core: Core, record: Record) -> Run:
    """The run to attach to: the present one, or that of the next start, whose shim is spawned now."""
    with core.mutex:
        run = record.run
        if run is not None and run.exit is None and not run.looks:
            return run
    with record.lock:
        check_present(record)
        wait_run_end(core, record)
        with core.mutex:
            run = record.run
        return run if run is not None else core.shims.spawn(record)


def _replay(core: Core, record: Record, wanted: Attach, sock: socket.socket) -> None:
    """Write what was logged, as the shim would."""
    query = LogQuery(stdout=wanted.stdout, stderr=wanted.stderr)
    try:
        for entry in logs.logs(core, record.id, query):
            if entry is None:
                continue
            number = 1 if entry.stream == "stdout" else 2
            head = struct.pack(">BxxxI", number, len(entry.line)) if wanted.framed else b""
            sock.sendall(head + entry.line)
    except (OSError, AmbiError) as error:  # the client has gone, or there is no log: the live part may still come
        log.debug("%s: replay of the log: %s", record.id[:12], error)
