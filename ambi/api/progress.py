"""Progress of long work as Docker streams it: one JSON object a line, each ended by CR LF.

    {"status": "Extracting", "id": "3f2a...", "progressDetail": {"current": 1, "total": 2}}
    {"stream": "Loaded image: x:latest\\n"}
    {"errorDetail": {"message": "..."}, "error": "..."}      the last line of work that failed

The 200 goes out with the first line, so work that fails before it has done anything is answered with a status.
"""

from __future__ import annotations

import time
from typing import Any

from ambi.api.exchange import Call, to_json
from ambi.api.http import ClientGone, Stream
from ambi.core.errors import AmbiError
from ambi.core.events import Progress

_MIN_SECONDS = 0.1  # between two lines about the same unit and status


class ProgressStream:
    """A sink of Progress, and of lines of its own. Used as a context: an error of the tree becomes the last line.

    quiet: Progress is not shown. A client that goes away ends the work: the sink raises ClientGone through it.
    """

    def __init__(self, call: Call, *, quiet: bool = False) -> None:
        self._call = call
        self._quiet = quiet
        self._stream: Stream | None = None
        self._last: tuple[str, str] = ("", "")
        self._next = 0.0

    def __call__(self, step: Progress) -> None:
        if self._quiet:
            return
        key, now = (step.unit, step.status), time.monotonic()
        if key == self._last and now < self._next and step.done != step.total:
            return
        self._last, self._next = key, now + _MIN_SECONDS
        line: dict[str, Any] = {"status": step.status}
        if step.done or step.total:
            detail = {"current": step.done}
            if step.total:
                detail["total"] = step.total
            line["progressDetail"] = detail
        if step.unit:
            line["id"] = step.unit
        self.line(line)

    def line(self, value: dict[str, Any]) -> None:
        if self._stream is None:
            self._stream = self._call.stream()
        self._stream.write(to_json(value)[:-1] + b"\r\n")

    def __enter__(self) -> ProgressStream:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        """Swallows an error of the tree that could be told in the stream."""
        if self._stream is None or isinstance(error, ClientGone):
            return False
        if isinstance(error, AmbiError):
            detail = {"code": error.http_status, "message": error.message}
            line: dict[str, Any] = {"errorDetail": detail, "error": error.message}
            if error.hint:
                line["hint"] = error.hint
            self.line(line)
        elif error is not None:
            return False
        self._stream.end()
        return True
