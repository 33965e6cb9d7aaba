"""Waiting for the end of an instance."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING

from ambi.core.deadline import Deadline
from ambi.core.errors import DeadlineExceeded
from ambi.core.model import ExitStatus
from ambi.engine.types import WaitCondition

if TYPE_CHECKING:
    from ambi.engine.records import Record
    from ambi.shim.client import ShimConnection


class WaitTicket:
    """A registered interest in the end of an instance. The engine settles it once."""

    __slots__ = ("_chunked", "_client", "_done", "_known_to", "_lock", "_status", "condition", "record")

    def __init__(self, condition: WaitCondition, record: Record) -> None:
        self.condition = condition
        self.record = record
        self._done = threading.Event()
        self._status = ExitStatus(0)
        self._lock = threading.Lock()  # of the client's socket: a number that is passed on must still be that socket's
        self._client: socket.socket | None = None
        self._chunked = False
        self._known_to: ShimConnection | None = None

    def settle(self, status: ExitStatus) -> None:
        if not self._done.is_set():
            self._status = status
            self._done.set()

    @property
    def settled(self) -> bool:
        return self._done.is_set()

    def result(self, by: Deadline) -> ExitStatus:
        """Block until the condition holds. Raises DeadlineExceeded; may be called again then."""
        if not self._done.wait(by.remaining()):
            raise DeadlineExceeded(f"the condition {self.condition} did not come true in time")
        return self._status

    def answers_to(self, client: socket.socket, *, chunked: bool) -> None:
        """The result goes to `client`, which has had the head of its answer. It stays the caller's, until `close`."""
        with self._lock:
            self._client, self._chunked = client, chunked

    def share(self, shim: ShimConnection) -> None:
        """Have `shim` answer the client if this engine cannot, see ambi/shim/PROTOCOL.md; once for each shim."""
        with self._lock:
            if self._client is None or self._known_to is shim or self._done.is_set():
                return
            self._known_to = shim
            shim.tell("wait", fds=[self._client.fileno()], chunked=self._chunked)

    def close(self) -> None:
        """Give up; idempotent. The engine forgets the ticket the next time it looks."""
        self._done.set()
        with self._lock:
            self._client = None
