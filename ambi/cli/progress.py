"""Progress of long work: one line that changes on a terminal, plain lines elsewhere, nothing for what ends within a second.

The engine sends one JSON object a line: `{"status", "id", "progressDetail": {"current", "total"}}` for a step,
`{"stream"}` for text, `{"status": "sha256:..."}` for the image that was made, and as the last one of work that failed
`{"errorDetail": {"code", "message"}, "error", "hint"}`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from ambi.cli.humanize import shorten, size
from ambi.cli.output import one_line
from ambi.client.client import error_of
from ambi.client.http import Response
from ambi.core.errors import Internal

QUIET_SECONDS = 1.0  # what ends sooner needs no word
LINE_SECONDS = 5.0  # between two lines about one step, where lines cannot be changed
BAR_WIDTH = 20


class Bar:
    """Shows the latest step on stderr. May be told from several threads. As a context, cleans the line up at its end."""

    def __init__(self) -> None:
        self._tty = sys.stderr.isatty() and not os.environ.get("AMBI_NO_PROGRESS") and os.environ.get("TERM") != "dumb"
        self._silent = bool(os.environ.get("AMBI_NO_PROGRESS"))
        self._begin = time.monotonic()
        self._step = ""
        self._next = self._begin + QUIET_SECONDS
        self._shown = False
        self._lock = threading.Lock()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._shown and self._tty:
                sys.stderr.write("\r\033[K")
                sys.stderr.flush()

    def tell(self, step: str, done: int = 0, total: int = 0) -> None:
        """`step` is a phrase; done and total are bytes, total 0 when it is not known."""
        now = time.monotonic()
        with self._lock:
            if self._silent or now - self._begin < QUIET_SECONDS:
                return
            if self._tty:
                if now >= self._next or step != self._step:
                    self._draw(step, done, total)
                    self._next = now + 0.1
            elif step != self._step or now >= self._next:
                print(f"{step}{_figures(done, total)}", file=sys.stderr, flush=True)
                self._next = now + LINE_SECONDS
            self._step = step

    def _draw(self, step: str, done: int, total: int) -> None:
        width = shutil.get_terminal_size().columns - 1
        bar = ""
        if total > 0:
            filled = min(BAR_WIDTH, done * BAR_WIDTH // total)
            bar = f" [{'=' * filled}{' ' * (BAR_WIDTH - filled)}]"
        text = shorten(f"{step}{bar}{_figures(done, total)}", max(width, 10))
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()
        self._shown = True


class Waiting:
    """Shows `text` on the terminal at stderr once it has taken a second, and takes it away at the end."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._shown = False
        self._timer = threading.Timer(QUIET_SECONDS, self._show)
        self._timer.daemon = True

    def __enter__(self) -> Waiting:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self._timer.join()
        if self._shown:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()

    def _show(self) -> None:
        self._shown = True
        sys.stderr.write(f"\r\033[K{shorten(self._text, max(shutil.get_terminal_size().columns - 1, 10))}")
        sys.stderr.flush()


def _figures(done: int, total: int) -> str:
    if total > 0:
        return f" {size(done)} / {size(total)}"
    return f" {size(done)}" if done else ""


def entries(response: Response) -> Iterator[dict[str, Any]]:
    """The objects of a progress stream. Raises the error that the work ended with."""
    for line in response.lines():
        try:
            entry = json.loads(line)
        except ValueError:
            raise Internal(f"the engine sent progress that is no JSON: {line[:80]!r}") from None
        if "errorDetail" in entry or "error" in entry:
            detail = entry.get("errorDetail") or {}
            message = str(detail.get("message") or entry.get("error"))
            raise error_of(int(detail.get("code") or 500), message, entry.get("hint"))
        yield entry


def follow(response: Response, bar: Bar) -> Iterator[dict[str, Any]]:
    """The objects of a progress stream that are results rather than steps, which `bar` shows."""
    for entry in entries(response):
        if "status" in entry and not str(entry["status"]).startswith("sha256:"):
            detail = entry.get("progressDetail") or {}
            step = " ".join(filter(None, (entry.get("status"), entry.get("id"))))
            bar.tell(one_line(step), int(detail.get("current") or 0), int(detail.get("total") or 0))
            continue
        yield entry
