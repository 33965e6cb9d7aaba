"""Waiting for the end of an instance."""

from __future__ import annotations

import threading

from ambi.core.deadline import Deadline
from ambi.core.errors import DeadlineExceeded
from ambi.core.model import ExitStatus
from ambi.engine.types import WaitCondition


class WaitTicket:
    """A registered interest in the end of an instance. The engine settles it once."""

    __slots__ = ("_done", "_status", "condition")

    def __init__(self, condition: WaitCondition) -> None:
        self.condition = condition
        self._done = threading.Event()
        self._status = ExitStatus(0)

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

    def close(self) -> None:
        """Give up; idempotent. The engine forgets the ticket the next time it looks."""
        self._done.set()
