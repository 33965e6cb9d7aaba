"""Attach, exec and wait: the requests of which a running `docker run` and `docker exec` consist."""

from __future__ import annotations

import socket
import threading
from typing import Any, cast

from ambi.api import websocket
from ambi.api.containers import terminal_size
from ambi.api.exchange import Call, Reply, json_reply, to_json
from ambi.api.router import Route
from ambi.core.deadline import Deadline
from ambi.core.errors import AmbiError, DeadlineExceeded, InvalidRequest
from ambi.core.words import detach_keys
from ambi.engine.types import Attach, Exec, WaitCondition

_CLIENT_CHECK_SECONDS = 5.0  # how long a waiting thread outlives its client at most


def _keys(text: str) -> bytes | None:
    """None for Docker's usual ones. Raises InvalidRequest."""
    return detach_keys(text) if text else None


def _attach_of(call: Call, *, framed: bool) -> Attach:
    query = call.query
    return Attach(
        stdin=query.flag("stdin"),
        stdout=query.flag("stdout"),
        stderr=query.flag("stderr"),
        logs=query.flag("logs"),
        stream=query.flag("stream"),
        framed=framed,
        detach_keys=_keys(query.text("detachKeys")),
    )


def attach(call: Call) -> None:
    instance = call.engine.get(call.name)
    how = _attach_of(call, framed=not instance.tty)
    call.json_body()  # a body would stand before the raw stream
    engine, id = call.engine, instance.id
    call.hand_over(lambda sock, pending, head: engine.attach(id, how, sock, pending, head), framed=how.framed)


def attach_websocket(call: Call) -> None:
    """The streams unframed in binary messages, as Docker has them. This thread stays between client and shim."""
    head = websocket.switch(call.request.headers)
    how = _attach_of(call, framed=False)
    instance, connection = call.engine.get(call.name), call.connection
    ours, theirs = socket.socketpair()
    bridge = websocket.Bridge(connection.socket, ours, connection.pending())
    thread = threading.Thread(target=bridge.run, name="websocket", daemon=True)  # a log is written before attach returns

    def write_head() -> None:
        connection.hijack(head)
        thread.start()

    try:
        with theirs:
            call.engine.attach(instance.id, how, theirs, b"", write_head)
    finally:
        if thread.ident is not None:
            thread.join()
        ours.close()


def wait(call: Call) -> None:
    """The head goes out at once: clients start the instance only after they have seen it."""
    condition = call.query.text("condition") or "not-running"
    if condition not in ("not-running", "next-exit", "removed"):
        raise InvalidRequest(f'invalid condition: "{condition}"', hint="conditions: not-running, next-exit, removed")
    ticket = call.engine.wait(call.name, cast(WaitCondition, condition))
    try:
        with call.engine.shared_wait(ticket, call.connection.socket, chunked=call.request.version == (1, 1)):
            stream = call.stream()
        while True:
            try:
                result: dict[str, Any] = {"StatusCode": ticket.result(Deadline.after(_CLIENT_CHECK_SECONDS)).code}
            except DeadlineExceeded:
                if call.connection.client_gone():
                    return
                continue
            except AmbiError as error:
                result = {"StatusCode": error.exit_status, "Error": {"Message": error.message}}
            stream.write(to_json(result))
            stream.end()
            return
    finally:
        ticket.close()


def exec_create(call: Call) -> Reply:
    body = call.json_body()
    return json_reply({"Id": call.engine.exec_create(call.name, body)}, 201)


def exec_start(call: Call) -> Reply | None:
    """Framing follows Tty of this request, not of the exec: docker-py creates with one and starts without."""
    body = call.json_body()
    engine, id = call.engine, call.name
    if body.get("Detach"):
        engine.exec_start(id, None)
        return Reply(200)
    config = engine.exec_get(id).config
    terminal = bool(body.get("Tty"))
    how = Attach(
        stdin=bool(config.get("AttachStdin")),
        stdout=bool(config.get("AttachStdout")),
        stderr=bool(config.get("AttachStderr")),
        framed=not terminal,
        detach_keys=_keys(_text(config.get("DetachKeys"), "DetachKeys")),
    )
    size = _console_size(body.get("ConsoleSize")) if terminal and call.version >= (1, 42) else None
    call.hand_over(lambda sock, pending, head: engine.exec_start(id, how, sock, pending, head, size), framed=how.framed)
    return None


def _text(value: object, name: str) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    raise InvalidRequest(f"{name} must be a text")


def _console_size(value: object) -> tuple[int, int] | None:
    if value is None:
        return None
    if isinstance(value, list) and len(value) == 2 and all(isinstance(n, int) and 0 <= n < 1 << 16 for n in value):
        return value[0], value[1]
    raise InvalidRequest("ConsoleSize must be [height, width]")


def exec_inspect(call: Call) -> Reply:
    return json_reply(exec_shape(call.engine.exec_get(call.name)))


def exec_shape(it: Exec) -> dict[str, Any]:
    config = it.config
    argv = config.get("Cmd") or [""]
    process: dict[str, Any] = {
        "tty": it.tty,
        "entrypoint": argv[0],
        "arguments": list(argv[1:]),
        "privileged": bool(config.get("Privileged")),
    }
    if config.get("User"):
        process["user"] = config["User"]
    if config.get("WorkingDir"):
        process["workingdir"] = config["WorkingDir"]
    return {
        "ID": it.id,
        "Running": it.running,
        "ExitCode": it.exit_code,
        "ProcessConfig": process,
        "OpenStdin": bool(config.get("AttachStdin")),
        "OpenStderr": bool(config.get("AttachStderr")),
        "OpenStdout": bool(config.get("AttachStdout")),
        "CanRemove": not it.running and it.exit_code is not None,
        "ContainerID": it.instance_id,
        "DetachKeys": "",
        "Pid": it.pid,
    }


def exec_resize(call: Call) -> Reply:
    call.engine.exec_resize(call.name, *terminal_size(call.query))
    return Reply(200)


ROUTES = (
    Route("POST", "/containers/{}/attach", attach),
    Route("GET", "/containers/{}/attach/ws", attach_websocket),
    Route("POST", "/containers/{}/wait", wait),
    Route("POST", "/containers/{}/exec", exec_create),
    Route("POST", "/exec/{}/start", exec_start),
    Route("POST", "/exec/{}/resize", exec_resize),
    Route("GET", "/exec/{}/json", exec_inspect),
)
