"""`tree`: looking into the root of a run, or into a root that is prepared for nothing else."""

from __future__ import annotations

import os
from typing import Any

from ambi.core.deadline import Deadline
from ambi.core.driver import Driver
from ambi.core.errors import AmbiError, InvalidRequest, Unsupported
from ambi.core.loop import Loop
from ambi.core.plan import LaunchPlan
from ambi.core.undo import Undo
from ambi.shim.control import Request

FIELDS = ("verb", "path", "follow", "no_overwrite_dir_non_dir", "copy_ids")
LEAVE = "leave"
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
    tree({name: request.body[name] for name in FIELDS if name in request.body}, fd, lambda result: _answer(request, result))


def _answer(request: Request, result: dict[str, Any] | AmbiError) -> None:
    if isinstance(result, AmbiError):
        request.fail(result)
    else:
        request.answer(result)
