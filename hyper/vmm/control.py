"""The monitor's side of the control socket: hyper/vmm/PROTOCOL.md."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from typing import Any

from ambi.core.errors import AmbiError
from ambi.core.loop import POLLIN, Loop

MAX_MESSAGE = 64 << 10
MAX_FDS = 40  # of a snapshot, with those that it is a difference to
MAX_DETAIL = 2000  # characters of a cause's explanation

Verb = Callable[[dict[str, Any], list[int]], dict[str, Any]]


class Control:
    """Answers requests by `verbs`, each called with the request and its descriptors, which stay ours to close.

    on_hangup: called once, when the driver is gone. Owns `sock`.
    """

    __slots__ = ("_loop", "_on_hangup", "_socket", "_verbs")

    def __init__(self, loop: Loop, sock: socket.socket, verbs: dict[str, Verb], on_hangup: Callable[[], None]) -> None:
        sock.setblocking(False)
        self._loop = loop
        self._socket = sock
        self._verbs = verbs
        self._on_hangup = on_hangup
        loop.watch(sock.fileno(), POLLIN, self._ready)

    def _ready(self, _: int) -> None:
        try:
            data, fds, _flags, _address = socket.recv_fds(self._socket, MAX_MESSAGE, MAX_FDS)
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        try:
            if not data:
                self._loop.unwatch(self._socket.fileno())
                self._on_hangup()
                return
            self._answer(json.loads(data), fds)
        finally:
            for fd in fds:
                os.close(fd)

    def _answer(self, request: dict[str, Any], fds: list[int]) -> None:
        verb = self._verbs.get(str(request.get("op")))
        answer: dict[str, Any] = {"id": request.get("id")}
        try:
            if verb is None:
                raise AmbiError(f"the monitor does not know the operation {request.get('op')!r}")
            answer["ok"] = verb(request, fds)
        except AmbiError as error:
            answer["error"] = {"kind": type(error).__name__, "message": error.message}
        except OSError as error:
            answer["error"] = {"kind": "Internal", "message": f"{request.get('op')}: {error.strerror or error}"}
        self._send(answer)

    def end(self, cause: str, detail: str = "", kind: str = "") -> None:
        """The last message: why this monitor ends."""
        self._send({"event": "end", "cause": cause, "detail": detail[:MAX_DETAIL], **({"kind": kind} if kind else {})})

    def _send(self, message: dict[str, Any]) -> None:
        """A driver that does not read, or is gone, is not waited for."""
        try:
            self._socket.send(json.dumps(message, separators=(",", ":")).encode())
        except OSError:
            pass

    def close(self) -> None:
        self._loop.unwatch(self._socket.fileno())
        self._socket.close()
