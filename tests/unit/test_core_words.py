"""Durations and detach keys, as docker writes and reads them."""

import time

import pytest

from ambi.core import words
from ambi.core.errors import InvalidRequest


@pytest.mark.parametrize(
    "seconds,text",
    [
        (0.4, "Less than a second"), (1.9, "1 second"), (59, "59 seconds"), (60, "About a minute"), (119, "About a minute"),
        (120, "2 minutes"), (3599, "59 minutes"), (3600, "About an hour"), (7200, "2 hours"), (47.4 * 3600, "47 hours"),
        (48 * 3600, "2 days"), (13 * 86400, "13 days"), (14 * 86400, "2 weeks"), (59 * 86400, "8 weeks"),
        (60 * 86400, "2 months"), (729 * 86400, "24 months"), (730 * 86400, "2 years"),
    ],
)  # fmt: skip
def test_human_duration(seconds: float, text: str) -> None:
    assert words.human_duration(seconds) == text


@pytest.mark.parametrize(
    "text,keys",
    [
        ("ctrl-p,ctrl-q", b"\x10\x11"),
        ("a", b"a"),
        ("ctrl-@,a,ctrl-[,ctrl-_", b"\0a\x1b\x1f"),
        ("ctrl-A", b"\x01"),
    ],
)
def test_detach_keys(text: str, keys: bytes) -> None:
    assert words.detach_keys(text) == keys


@pytest.mark.parametrize("text", ["", "ab", "ctrl-", "ctrl-1", "a,,b", "é"])
def test_wrong_detach_keys(text: str) -> None:
    with pytest.raises(InvalidRequest, match="Invalid detach keys"):
        words.detach_keys(text)


@pytest.mark.parametrize(
    "text,is_one",
    [("192.0.2.1", True), ("2001:db8::1", True), ("1.2.3", False), ("fe80::1%eth0", False), ("host", False), ("", False)],
)
def test_addresses(text: str, is_one: bool) -> None:
    assert words.is_address(text) is is_one


def test_points_in_time_of_filters() -> None:
    assert words.point_ns("until", "1700000000.25") == 1_700_000_000_250_000_000
    assert words.point_ns("until", "2026-01-02T13:23:37Z") == 1_767_360_217_000_000_000
    assert abs(words.point_ns("until", "24h") / 1e9 - (time.time() - 86400)) < 60


@pytest.mark.parametrize("text", ["", "soon", "9" * 400 + "h", "-1h", "1h30", "0001-01-01", "1.2.3"])
def test_wrong_points_in_time(text: str) -> None:
    with pytest.raises(InvalidRequest, match="invalid filter 'until="):
        words.point_ns("until", text)
