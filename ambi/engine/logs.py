"""Reading an instance's log."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

from ambi.core.errors import InvalidRequest, Unsupported
from ambi.engine.core import Core
from ambi.engine.records import Record
from ambi.engine.types import LogEntry, LogQuery
from ambi.shim import logread

_TICK_S = 1.0
_AHEAD = 256  # entries read before they are asked for


def logs(core: Core, id: str, query: LogQuery) -> Iterator[LogEntry | None]:
    """See `Engine.logs`."""
    record = core.registry.find(id)
    if not (query.stdout or query.stderr):
        raise InvalidRequest("Bad parameters: you must choose at least one stream")
    path = record.snapshot(core.roots).log_path
    if path is None:
        raise Unsupported("configured logging driver does not support reading", hint="create it without --log-driver none")

    def read(follow: logread.Follow | None) -> Iterator[LogEntry]:
        found = logread.entries(path, tail=query.tail, since_ns=query.since_ns, until_ns=query.until_ns, follow=follow)
        return _chosen(found, query)

    return _with_ticks(record, read) if query.follow else read(None)


def _with_ticks(record: Record, read: Callable[[logread.Follow], Iterator[LogEntry]]) -> Iterator[LogEntry | None]:
    """What `read` gives, and None about once a second when it gives nothing. It runs in a thread of its own."""
    passed: queue.Queue[LogEntry | BaseException | None] = queue.Queue(_AHEAD)
    abandoned = threading.Event()

    def put(item: LogEntry | BaseException | None) -> bool:
        while not abandoned.is_set():
            try:
                passed.put(item, timeout=_TICK_S)
                return True
            except queue.Full:
                continue
        return False

    def run() -> None:
        try:
            for entry in read(logread.Follow(lambda: abandoned.is_set() or _ended(record))):
                if not put(entry):
                    return
            put(None)
        except BaseException as error:
            put(error)

    threading.Thread(target=run, name=f"logs {record.id[:12]}", daemon=True).start()
    try:
        while True:
            try:
                item = passed.get(timeout=_TICK_S)
            except queue.Empty:
                yield None
                continue
            if isinstance(item, BaseException):
                raise item
            if item is None:
                return
            yield item
    finally:
        abandoned.set()


def _ended(record: Record) -> bool:
    """Whether no more is going to be logged; the log is complete when an exit is recorded (ambi/shim/PROTOCOL.md)."""
    return record.removing or not record.state.running


def _chosen(found: Iterator[logread.Entry], query: LogQuery) -> Iterator[LogEntry]:
    for entry in found:
        if query.stdout if entry.stream == "stdout" else query.stderr:
            yield LogEntry(entry.stream, entry.time_ns, entry.line)
