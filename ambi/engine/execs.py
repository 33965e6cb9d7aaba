"""Running one more program in a running instance."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, NamedTuple

from ambi.core import words
from ambi.core.deadline import Deadline
from ambi.core.errors import AmbiError, Conflict, InvalidRequest, Unavailable
from ambi.core.model import ExecId, Status
from ambi.engine import names, netnames, spec
from ambi.engine.attach import CALL_S, wire
from ambi.engine.body import Body
from ambi.engine.core import Core
from ambi.engine.records import ExecRecord, Record, Run
from ambi.engine.state import ExecRow
from ambi.engine.types import Attach, Exec

EXEC_S = 60.0
MOST = 4096  # execs of one instance that have not ended
KEPT = 256  # ended execs of one instance that can still be asked for
_SLACK = 64  # by how many more they are let grow before the oldest go


def create(core: Core, id: str, config: dict[str, Any]) -> ExecId:
    """See `Engine.exec_create`."""
    record = core.registry.find(id)
    _running(record)
    body = Body("ExecConfig", config)
    if not body.strings("Cmd"):
        raise InvalidRequest("No exec command specified")
    for item in body.strings("Env"):
        if not item or item.startswith("="):
            raise InvalidRequest(f"invalid environment variable: {item}")
    spec.exec_process(record.row.spec, body)
    if sum(item.exit_code is None for item in list(record.execs.values())) >= MOST:
        raise Conflict(f"container {record.id} has {MOST} execs that have not ended")
    made = ExecRecord(ExecId(names.new_id()), record, config)
    core.db.insert_exec(ExecRow(made.id, record.id, config, 0, None, core.boot_id))
    core.registry.add_exec(made)
    if len(record.execs) > KEPT + _SLACK:
        core.db.delete_execs(core.registry.drop_old_execs(record, KEPT))
    core.publish(record, f"exec_create: {_command(made)}", execID=made.id)
    return made.id


def _command(item: ExecRecord) -> str:
    return " ".join(Body("ExecConfig", item.config).strings("Cmd"))


def _running(record: Record) -> Run:
    """The run to execute in. Raises Conflict."""
    run = record.run
    if record.state.status is Status.PAUSED:
        raise Conflict(f"Container {record.id} is paused, unpause the container before exec")
    if record.state.status is Status.RESTARTING:
        raise Conflict(f"Container {record.id} is restarting, wait until the container is running")
    if not record.state.running or run is None or record.removing:
        raise Conflict(f"Container {record.id} is not running", hint=f"ambi start {record.name}")
    return run


class StartRequest(NamedTuple):
    """The arguments of `Engine.exec_start`."""

    attach: Attach | None
    sock: socket.socket | None
    pending: bytes
    write_head: Callable[[], None] | None
    size: tuple[int, int] | None
    within_s: float = EXEC_S  # until its program runs


def start(core: Core, exec_id: str, wanted: StartRequest) -> None:
    """See `Engine.exec_start`."""
    item = core.registry.find_exec(exec_id)
    record = item.instance
    run = _running(record)
    with core.mutex:
        if item.started:
            raise Conflict(f"Error: Exec command {item.id} is already running")
        item.started = True
        item.answered.clear()
    body = Body("ExecConfig", item.config)
    try:
        request = _fields(core, record, item, body, wanted)
        if wanted.write_head is not None:
            wanted.write_head()
    except BaseException:
        item.started = False
        item.answered.set()
        raise
    core.publish(record, f"exec_start: {_command(item)}", execID=item.id)
    fds = [wanted.sock.fileno()] if wanted.attach is not None and wanted.sock is not None else []
    try:
        answer = run.connection.call("exec", fds=fds, by=Deadline.after(wanted.within_s), **request)
    except AmbiError as error:
        code = 127 if error.exit_status == 127 else 126
        ended(core, record, item.id, 137 if isinstance(error, Unavailable) else code)
        raise
    finally:
        item.answered.set()
    with core.mutex:
        item.pid = int(answer.get("pid") or 0)


def _fields(core: Core, record: Record, item: ExecRecord, body: Body, wanted: StartRequest) -> dict[str, Any]:
    """The fields of `exec`. Framing follows the start request, the terminal follows the exec."""
    tty, stdin = body.flag("Tty"), False
    attach = None
    if wanted.attach is not None:
        how = wanted.attach
        stdin = how.stdin and body.flag("AttachStdin")
        keys = body.text("DetachKeys")
        if keys and how.detach_keys is None:
            how = how._replace(detach_keys=words.detach_keys(keys))
        attach = wire(how, stdin=stdin, tty=tty, pending=wanted.pending)
    process = spec.exec_process(record.row.spec, body, netnames.env_of(core.networks, record))
    rows, columns = wanted.size or _console_size(body) or (0, 0)
    if tty and rows > 0 and columns > 0:
        process["consoleSize"] = {"height": rows, "width": columns}
    return {"exec_id": item.id, "process": process, "stdin": stdin, "attach": attach}


def _console_size(body: Body) -> tuple[int, int] | None:
    size = body.data.get("ConsoleSize")
    if isinstance(size, list) and len(size) == 2 and all(isinstance(x, int) and 0 < x < 1 << 16 for x in size):
        return size[0], size[1]
    return None


def ended(core: Core, record: Record, exec_id: str, code: int) -> None:
    """Record the end of an exec; only the first is."""
    with core.mutex:
        item = record.execs.get(ExecId(exec_id))
        if item is None or item.exit_code is not None:
            return
        item.exit_code = code
        core.store_exec(item)
        if record.monitor is not None:
            record.monitor.exec_ended(exec_id, code)
        core.publish(record, "exec_die", execID=item.id, exitCode=str(code))


def get(core: Core, exec_id: str) -> Exec:
    """A client asks for the exit code as soon as its stream has ended, which the shim may have told it before us; of a
    program that cannot run, the shim knows nothing any more once it has answered."""
    item = core.registry.find_exec(exec_id)
    run = item.instance.run
    if item.started and item.exit_code is None and run is not None:
        try:
            execs = run.connection.call("state", by=Deadline.after(CALL_S)).get("execs") or {}
        except Unavailable:
            execs = {}
        status = (execs.get(item.id) or {}).get("exit")
        if status is not None:
            ended(core, item.instance, item.id, int(status["code"]))
        else:
            item.answered.wait(CALL_S)
    with core.mutex:
        return item.snapshot()


def resize(core: Core, exec_id: str, rows: int, columns: int) -> None:
    item = core.registry.find_exec(exec_id)
    run = _running(item.instance)
    if not item.started or item.exit_code is not None:
        raise Conflict(f"Exec {item.id} is not running")
    run.connection.call("resize", rows=rows, columns=columns, exec_id=item.id, by=Deadline.after(CALL_S))
    core.publish(item.instance, "resize", height=str(rows), width=str(columns))
