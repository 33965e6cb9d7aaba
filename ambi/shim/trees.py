"""`tree`: looking into the root of a run, or into a root that is prepared for nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from ambi.core.deadline import Deadline
from ambi.core.driver import Driver
from ambi.core.errors import AmbiError, InvalidRequest, Unsupported
from ambi.core.loop import Loop
from ambi.core.model import Status
from ambi.core.plan import LaunchPlan
from ambi.core.undo import Undo
from ambi.shim.control import Request

FIELDS = ("verb", "path", "follow", "no_overwrite_dir_non_dir", "copy_ids")
LEAVE = "leave"
HOLD_SECONDS = 30.0
CLOSE_SECONDS = 15.0  # a guest writes back its disk


class Browser:
    """The root of an instance that does not run, from the first request about it to `close`."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._undo = Undo()
        self._opened: Any = None

    def open(self, driver: Driver, plan: LaunchPlan, by: Deadline) -> Any:
        """What can look: a `Browsable`. Made once. Raises what the driver raises; nothing is left then."""
        browse: Any = getattr(driver, "browse", None)
        if browse is None:
            raise Unsupported(f"isolation {plan.isolation.value} cannot look into an instance that does not run")
        if self._opened is None:
            try:
                self._opened = browse(plan, self._undo, by, self._loop)
            except BaseException:
                self._undo.run()
                raise
            self._undo.keep()
        return self._opened

    def close(self) -> None:
        """Let go of the root; raises what the driver raises."""
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.delete(Deadline.after(CLOSE_SECONDS))


def begin(browsable: object, request: Request) -> None:
    """Have `browsable` do `request`, which is answered when that is done."""
    fd = request.message.fds.pop() if request.message.fds else None
    try:
        if request.message.fds:
            raise InvalidRequest("'tree' wants at most one descriptor")
        tree: Any = getattr(browsable, "tree", None)
        if tree is None:
            raise Unsupported("this isolation cannot look into an instance")
    except AmbiError:
        if fd is not None:
            os.close(fd)
        raise
    let_go = _hold(browsable) if request.body.get("still") is True else None

    def done(result: dict[str, Any] | AmbiError) -> None:
        if let_go is not None:
            let_go()
        if isinstance(result, AmbiError):
            request.fail(result)
        else:
            request.answer(result)

    tree({name: request.body[name] for name in FIELDS if name in request.body}, fd, done)


def _hold(created: Any) -> Callable[[], None] | None:
    """Have what runs stand still, until what is returned is called. None where nothing runs, or the driver cannot.

    Here and not in the engine: one that is killed meanwhile leaves nothing standing.
    """
    pause, resume = getattr(created, "pause", None), getattr(created, "resume", None)
    if pause is None or resume is None or created.state() is not Status.RUNNING:
        return None
    pause(Deadline.after(HOLD_SECONDS))

    def let_go() -> None:
        try:
            resume(Deadline.after(HOLD_SECONDS))
        except (AmbiError, OSError):  # it has been ended
            pass

    return let_go
