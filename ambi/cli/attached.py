"""A command that is attached to a process: its stream, its terminal, signals passed on, and its exit status.

An engine that is killed meanwhile cuts nothing off: the stream is the shim's, and the question for the exit status is
asked again of an engine that is started anew.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import ExitStack
from types import FrameType, TracebackType
from typing import Any

from ambi.cli.filters import filter_query
from ambi.client.client import Client, Hijacked, Pending, path_of, persistently
from ambi.client.http import Lost
from ambi.client.stream import DEFAULT_DETACH_KEYS, Session
from ambi.client.terminal import OnResize, Raw, size
from ambi.core import words
from ambi.core.errors import AmbiError, InvalidRequest, NotFound, Unavailable

REMOVAL_SECONDS = 10.0  # how long the removal of an instance that could not be started is waited for
# What docker passes on: everything that can be caught, but for SIGCHLD, SIGPIPE, SIGURG, SIGWINCH and faults of our own.
PROXIED = (
    signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGTERM,
    signal.SIGCONT, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGIO, signal.SIGPWR,
)  # fmt: skip


class ExitWait:
    """The exit status of an instance, asked for before it is started. Fits `Session` as what it watches."""

    def __init__(self, client: Client, instance_id: str, condition: str) -> None:
        self._client = client
        self._id = instance_id
        self._path = path_of("containers", instance_id, "wait")
        self._condition = condition
        self._pending: Pending | None = client.background(self._path, {"condition": condition})
        self._answer: dict[str, Any] = {}

    def fileno(self) -> int:
        """-1 once the answer is there."""
        return self._pending.fileno() if self._pending else -1

    def ready(self, seconds: float | None = None) -> None:
        """Take the answer, or ask again where the engine has gone."""
        if self._pending is None:
            return
        try:
            self._answer = self._pending.result(seconds) or {}
            self._pending = None
        except Lost:
            self._ask_again()

    def _ask_again(self) -> None:
        condition = "not-running" if self._condition == "next-exit" else self._condition
        try:
            self._pending = persistently(lambda: self._client.background(self._path, {"condition": condition}))
        except NotFound:
            self._pending = None
            self._answer = {"StatusCode": self._recorded()}

    def _recorded(self) -> int:
        """The exit status of an instance that ended and was removed while no engine ran, from the events that are kept."""
        filters = filter_query([f"container={self._id}", "event=die", "type=container"])
        query = {**filters, "since": "0", "until": str(int(time.time()) + 1)}
        codes = [json.loads(line)["Actor"]["Attributes"]["exitCode"] for line in self._events(query)]
        if not codes:
            hint = "leave --rm out to keep instances that have ended"
            raise Unavailable(f"the exit status of {self._id[:12]} is not known: it ended while no engine ran", hint=hint)
        return int(codes[-1])

    def _events(self, query: dict[str, str]) -> list[bytes]:
        return persistently(lambda: list(self._client.stream("GET", "/events", query).lines()))

    def status(self) -> int:
        """The exit status, waited for."""
        while self._pending is not None:
            self.ready()
        error = self._answer.get("Error") or {}
        if error.get("Message"):
            raise Unavailable(error["Message"])
        return int(self._answer.get("StatusCode", 0))

    def close(self) -> None:
        if self._pending is not None:
            self._pending.close()
            self._pending = None


class SignalProxy:
    """Within it, signals that reach this process are sent to the instance instead; those before `go` are kept for it."""

    def __init__(self, client: Client, instance_id: str, *, wanted: bool) -> None:
        self._client = client.apart()
        self._path = path_of("containers", instance_id, "kill")
        self._signals = PROXIED if wanted else ()
        self._early: list[int] = []
        self._going = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> SignalProxy:
        for number in self._signals:
            self._previous[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._client.close()

    def go(self) -> None:
        self._going = True
        while self._early:
            self._send(self._early.pop(0))

    def _received(self, number: int, frame: FrameType | None) -> None:
        if self._going:
            self._send(number)
        else:
            self._early.append(number)

    def _send(self, number: int) -> None:
        try:
            self._client.post(self._path, {"signal": signal.Signals(number).name})
        except (AmbiError, OSError):  # it has ended in this moment, or the engine is being started again
            pass


def detach_keys(text: str | None) -> bytes:
    return words.detach_keys(text) if text else DEFAULT_DETACH_KEYS


def check_terminal(*, tty: bool, stdin: bool) -> None:
    """Refuse a terminal inside whose keyboard would be a pipe."""
    if tty and stdin and not os.isatty(0):
        hint = "leave -t out, or run the command from a terminal"
        raise InvalidRequest("the input device is not a TTY", hint=hint)


def console_size() -> list[int]:
    """[rows, columns] of our terminal, [0, 0] without one."""
    return list(size(1) if os.isatty(1) else size(0))


def attach(client: Client, instance_id: str, streams: set[str], keys: str | None, *, logs: bool = False) -> Hijacked:
    query = {"stream": "1", **dict.fromkeys(sorted(streams), "1")}
    if keys:
        query["detachKeys"] = keys
    if logs:
        query["logs"] = "1"
    return client.hijack(path_of("containers", instance_id, "attach"), query)


def pump(
    client: Client, hijacked: Hijacked, resize_path: str, *, tty: bool, stdin: bool, keys: bytes, watch: ExitWait | None
) -> bool:
    """Be the terminal of an attached process until its output ends. True when the user detached from it."""
    sys.stdout.flush()
    apart = client.apart()

    def resize(rows: int, columns: int) -> None:
        try:
            apart.post(resize_path, {"h": str(rows), "w": str(columns)})
        except (AmbiError, OSError):  # it has ended, or the engine is being started again: the next change tells
            pass

    with ExitStack() as stack:
        stack.callback(apart.close)
        if tty:
            rows, columns = console_size()
            if rows and columns:
                resize(rows, columns)
            stack.enter_context(OnResize(1 if os.isatty(1) else 0, resize))
            if stdin:
                stack.enter_context(Raw(0))
        session = Session(
            hijacked, framed=not tty, stdin=0 if stdin else None, keys=keys if tty and stdin else b"", watch=watch
        )
        return session.run()
