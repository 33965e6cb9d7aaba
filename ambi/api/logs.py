"""`/containers/{}/logs`: what an instance has written, framed or, from a terminal, raw."""

from __future__ import annotations

from ambi.api.exchange import COMMON_HEADERS, MULTIPLEXED_STREAM, RAW_STREAM, Call
from ambi.api.query import Query
from ambi.api.router import Route
from ambi.api.words import log_time
from ambi.core.errors import InvalidRequest
from ambi.engine.types import Instance, LogEntry, LogQuery

_STREAM_NUMBER = {"stdout": 1, "stderr": 2}
_BATCH_BYTES = 64 << 10


def logs(call: Call) -> None:
    query = call.query
    how = _log_query(query)
    instance = call.engine.get(call.name)
    entries = call.engine.logs(instance.id, how)
    render = Renderer(instance, times=query.flag("timestamps"), details=query.flag("details"))
    stream = call.connection.stream(200, (*COMMON_HEADERS, *_content_type(instance, call.version)))
    batch = bytearray()
    for entry in entries:
        if entry is None:
            if call.connection.client_gone():
                return
            continue
        batch += render(entry)
        if how.follow or len(batch) >= _BATCH_BYTES:
            stream.write(bytes(batch))
            batch.clear()
    stream.write(bytes(batch))
    stream.end()


def _log_query(query: Query) -> LogQuery:
    stdout, stderr = query.flag("stdout"), query.flag("stderr")
    if not stdout and not stderr:
        raise InvalidRequest("Bad parameters: you must choose at least one stream")
    tail = query.text("tail") or "all"
    lines = None if tail == "all" else query.number("tail")
    return LogQuery(
        stdout=stdout,
        stderr=stderr,
        follow=query.flag("follow"),
        tail=None if lines is None or lines < 0 else lines,
        since_ns=query.time_ns("since"),
        until_ns=query.time_ns("until") or None,  # 0 is no bound
    )


def _content_type(instance: Instance, version: tuple[int, int]) -> tuple[tuple[str, str], ...]:
    """Versions before 1.42 were told none."""
    if version < (1, 42):
        return ()
    return (("Content-Type", RAW_STREAM if instance.tty else MULTIPLEXED_STREAM),)


class Renderer:
    """Turns an entry into the bytes of the answer: `[head] [TIME ] [DETAILS ] LINE`."""

    def __init__(self, instance: Instance, *, times: bool, details: bool) -> None:
        self._framed = not instance.tty
        self._times = times
        self._details = f"{_log_attributes(instance)} ".encode() if details else b""

    def __call__(self, entry: LogEntry) -> bytes:
        line = self._details + entry.line
        if self._times:
            line = log_time(entry.time_ns).encode() + b" " + line
        return frame(_STREAM_NUMBER[entry.stream], line) if self._framed else line


def frame(stream: int, payload: bytes) -> bytes:
    """`payload` behind the 8-byte head of multiplexed streams: stream, three zeros, length in network order."""
    return bytes((stream, 0, 0, 0)) + len(payload).to_bytes(4, "big") + payload


def _log_attributes(instance: Instance) -> str:
    """`NAME=VALUE,...` of the labels and variables that the log options `labels` and `env` name."""
    options = (instance.spec.host.get("LogConfig") or {}).get("Config") or {}
    env = dict(entry.partition("=")[::2] for entry in instance.spec.config.get("Env") or [])
    chosen = {name: instance.labels[name] for name in options.get("labels", "").split(",") if name in instance.labels}
    chosen.update({name: env[name] for name in options.get("env", "").split(",") if name in env})
    return ",".join(f"{name}={value}" for name, value in sorted(chosen.items()))


ROUTES = (Route("GET", "/containers/{}/logs", logs),)
