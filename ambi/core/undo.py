"""The rollback stack: acquire, register the undo, use."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")


class Undo:
    """Runs what was registered, last first, unless `keep` was called. An undo that fails becomes a note on the error.

    with Undo() as undo:
        path.mkdir()
        undo.add(f"remove {path}", path.rmdir)
        ...
        undo.keep()
    """

    __slots__ = ("_steps",)

    def __init__(self) -> None:
        self._steps: list[tuple[str, Callable[[], object]]] = []

    def add(self, what: str, action: Callable[[], object]) -> None:
        """Register `action`; `what` names it (`remove cgroup /ambi/3f2a`) should it fail itself."""
        self._steps.append((what, action))

    def enter(self, resource: AbstractContextManager[T]) -> T:
        """Enter `resource`; its exit is the undo."""
        value = resource.__enter__()
        self.add(f"leave {type(resource).__name__}", lambda: resource.__exit__(None, None, None))
        return value

    def keep(self) -> None:
        """The work succeeded: forget every undo."""
        self._steps.clear()

    def run(self) -> list[str]:
        """Undo everything now. Returns one line for each undo that failed; all of them are tried."""
        failures = []
        while self._steps:
            what, action = self._steps.pop()
            try:
                action()
            except Exception as error:  # every other undo must still run
                failures.append(f"could not undo: {what}: {error}")
        return failures

    def __enter__(self) -> Undo:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for line in self.run():
            if error is not None:
                error.add_note(line)
