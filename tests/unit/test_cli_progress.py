"""Progress streams: steps are shown while they take time, results are returned, errors come back as their class."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import pytest

from ambi.cli import progress
from ambi.core import errors


class Lines:
    """A response with these objects as its body."""

    def __init__(self, *entries: Any) -> None:
        self._entries = entries

    def lines(self) -> Iterator[bytes]:
        return (json.dumps(entry).encode() for entry in self._entries)


def results(*entries: Any) -> list[Any]:
    return list(progress.follow(Lines(*entries), progress.Bar()))  # type: ignore[arg-type]


def test_results_are_told_from_steps() -> None:
    made = {"status": "sha256:" + "ab" * 32}
    loaded = {"stream": "Loaded image: a:latest\n"}
    detail = {"status": "Extracting", "id": "3f2a", "progressDetail": {"current": 1, "total": 2}}
    assert results(detail, {"status": "running apt-get update..."}, loaded, made) == [loaded, made]


@pytest.mark.parametrize("code,kind", [(507, errors.StorageFull), (400, errors.InvalidRequest), (500, errors.Internal)])
def test_an_error_in_the_stream(code: int, kind: type[errors.AmbiError]) -> None:
    with pytest.raises(kind) as caught:
        results({"errorDetail": {"code": code, "message": "no space"}, "error": "no space", "hint": "df"})
    assert (caught.value.message, caught.value.hint) == ("no space", "df")


def test_an_error_of_old() -> None:
    with pytest.raises(errors.Internal, match="it broke"):
        results({"error": "it broke"})


def captured(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What stderr is from now on; in the test itself, because pytest puts its own in place after the fixtures."""
    text = io.StringIO()
    monkeypatch.setattr("sys.stderr", text)
    return text


def test_what_is_quick_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = captured(monkeypatch)
    with progress.Bar() as bar:
        bar.tell("Extracting", 1, 2)
    assert stderr.getvalue() == ""


def test_plain_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = captured(monkeypatch)
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    with progress.Bar() as bar:
        for done in range(0, 5000, 1000):
            bar.tell("Extracting", done, 4000)
        bar.tell("Done")
    assert stderr.getvalue() == "Extracting 0B / 4kB\nDone\n"


def test_one_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = captured(monkeypatch)
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with progress.Bar() as bar:
        bar.tell("Extracting", 2000, 4000)
    assert stderr.getvalue() == "\r\033[KExtracting [==========          ] 2kB / 4kB\r\033[K"
