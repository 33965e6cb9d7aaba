"""The engine: instances and images of one data root. Everything blocks and is safe to call from any thread.

Wherever an id is asked for, a name, an id or a unique prefix of one will do.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ambi.core.deadline import Deadline
from ambi.core.model import ExecId, ExitStatus, InstanceId, Usage
from ambi.core.roots import Roots
from ambi.engine.types import (
    Attach,
    Check,
    CreateSpec,
    EngineInfo,
    Event,
    Exec,
    Instance,
    LogEntry,
    LogQuery,
    WaitCondition,
)

Filters = Mapping[str, list[str]]  # {"label": ["a=b"], ...}: the API brings both JSON shapes to this one
InstanceList = list[Instance]


class WaitTicket:
    """A registered interest in the end of an instance."""

    def result(self, by: Deadline) -> ExitStatus:
        """Block until the condition holds. Raises DeadlineExceeded; may be called again then."""
        raise NotImplementedError

    def close(self) -> None:
        """Give up; idempotent."""


class EventStream:
    """An iterator of events. None comes about once a second when nothing happens, so the caller can look at its client."""

    def __iter__(self) -> Iterator[Event | None]:
        raise NotImplementedError

    def close(self) -> None:
        """End the iteration, from any thread; idempotent."""


class Engine:
    """See the module. Public attribute: `images`, an `ambi.engine.images.ImageService`."""

    @classmethod
    def open(cls, roots: Roots) -> Engine:
        """Open the data root: restore the state, adopt living shims, sweep the dead.

        Raises Unsupported (a newer data root), Conflict (another engine has it open).
        """
        raise NotImplementedError

    def close(self) -> None:
        """Let go of everything; instances run on."""

    def create(self, name: str | None, spec: CreateSpec) -> tuple[InstanceId, list[str]]:
        """Create an instance; returns its id and warnings.

        Raises NotFound (`No such image: X`), Conflict (the name), InvalidRequest (a field that is wrong or not supported).
        """
        raise NotImplementedError

    def get(self, id: str) -> Instance:
        """Raises NotFound (`No such container: X`), InvalidRequest (an ambiguous prefix)."""
        raise NotImplementedError

    def list(
        self, all: bool, filters: Filters, limit: int = 0, before: str | None = None, since: str | None = None
    ) -> InstanceList:
        """Newest first. Raises InvalidRequest for an unknown filter."""
        raise NotImplementedError

    def start(self, id: str) -> None:
        """Raises NotModified (it runs), CommandNotFound, CommandNotExecutable, Unsupported, ..."""
        raise NotImplementedError

    def stop(self, id: str, timeout_s: float | None = None, signal: str | None = None) -> None:
        """Ask with the stop signal, wait, then kill. timeout_s: None for the instance's own, negative for no limit.

        Raises NotModified when it does not run.
        """
        raise NotImplementedError

    def restart(self, id: str, timeout_s: float | None = None, signal: str | None = None) -> None:
        raise NotImplementedError

    def kill(self, id: str, signal: str | None = None) -> None:
        """`signal`: `TERM`, `SIGTERM` or `15`; SIGKILL by default. Raises Conflict when it does not run."""
        raise NotImplementedError

    def rename(self, id: str, name: str) -> None:
        raise NotImplementedError

    def remove(self, id: str, force: bool = False, volumes: bool = False) -> None:
        """Raises Conflict when it runs and `force` is not set."""
        raise NotImplementedError

    def prune(self, filters: Filters) -> tuple[tuple[InstanceId, ...], int]:
        """Remove every instance that does not run; returns their ids and the bytes freed."""
        raise NotImplementedError

    def resize(self, id: str, rows: int, columns: int) -> None:
        raise NotImplementedError

    def attach(self, id: str, attach: Attach, sock: socket.socket, pending: bytes, write_head: Callable[[], None]) -> None:
        """Hand `sock` to the instance's shim, with the bytes that the client has sent already.

        `write_head` is called once, after every check and before the shim may write: it writes the HTTP head. An error
        before that call can still be answered with a status; after it `sock` belongs to the shim. The caller closes its
        own descriptor in both cases. Raises NotFound, Conflict.
        """
        raise NotImplementedError

    def wait(self, id: str, condition: WaitCondition = "not-running") -> WaitTicket:
        """The interest is registered when this returns."""
        raise NotImplementedError

    def logs(self, id: str, query: LogQuery) -> Iterator[LogEntry | None]:
        """Checks at once, then an iterator; it ends with the run when following.

        None comes about once a second when nothing does, so that the caller can look at its client.
        """
        raise NotImplementedError

    def exec_create(self, id: str, config: dict[str, Any]) -> ExecId:
        """`config`: Docker's ExecConfig. Raises Conflict when the instance does not run, InvalidRequest."""
        raise NotImplementedError

    def exec_start(
        self,
        exec_id: str,
        attach: Attach | None,
        sock: socket.socket | None = None,
        pending: bytes = b"",
        write_head: Callable[[], None] | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        """Run it; `attach` None is detached. As with `attach`, `write_head` is called after every check.

        size: rows and columns of its terminal at start. An error of the program itself (CommandNotFound, ...) comes after
        the head: the shim has then written its text to `sock`, and it is raised as well.
        """
        raise NotImplementedError

    def exec_get(self, exec_id: str) -> Exec:
        """Raises NotFound (`No such exec instance: X`)."""
        raise NotImplementedError

    def exec_resize(self, exec_id: str, rows: int, columns: int) -> None:
        raise NotImplementedError

    def top(self, id: str) -> tuple[dict[str, Any], ...]:
        """The shape of `ambi.core.driver.Created.processes`. Raises Conflict when it does not run."""
        raise NotImplementedError

    def usage(self, id: str) -> Usage:
        """Raises Conflict when it does not run."""
        raise NotImplementedError

    def events(self, since_ns: int | None, until_ns: int | None, filters: Filters) -> EventStream:
        """Replay from `since_ns`, then live; with `until_ns` it ends there. Registered when this returns."""
        raise NotImplementedError

    def info(self) -> EngineInfo:
        raise NotImplementedError

    def doctor(self) -> tuple[Check, ...]:
        raise NotImplementedError
