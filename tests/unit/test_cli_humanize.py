"""Sizes and times, as docker prints them and as people type them."""

from __future__ import annotations

import time

import pytest

from ambi.cli import humanize
from ambi.core import words
from ambi.core.errors import InvalidRequest


@pytest.mark.parametrize(
    "count,text",
    [
        (0, "0B"),
        (999, "999B"),
        (1000, "1kB"),
        (1234, "1.23kB"),
        (124_512_345, "125MB"),
        (999_900, "1000kB"),
        (5_300_000_000, "5.3GB"),
    ],
)
def test_size(count: int, text: str) -> None:
    assert humanize.size(count) == text


@pytest.mark.parametrize(
    "count,text", [(0, "0B"), (1024, "1KiB"), (1_220_608, "1.164MiB"), (8 << 30, "8GiB"), (1023, "1023B")]
)
def test_binary_size(count: int, text: str) -> None:
    assert humanize.binary_size(count) == text


@pytest.mark.parametrize(
    "text,count",
    [
        ("0", 0),
        ("512", 512),
        ("512b", 512),
        ("64m", 64 << 20),
        ("64MB", 64 << 20),
        ("64MiB", 64 << 20),
        ("1.5g", 3 << 29),
        ("2 k", 2048),
    ],
)
def test_parse_size(text: str, count: int) -> None:
    assert humanize.parse_size("--memory", text) == count


@pytest.mark.parametrize("text", ["", "m", "lots", "-1", "1x", "1..5m", "1e3", "0x10", "\N{ARABIC-INDIC DIGIT ONE}m"])
def test_parse_bad_size(text: str) -> None:
    with pytest.raises(InvalidRequest, match="--memory"):
        humanize.parse_size("--memory", text)


@pytest.mark.parametrize(
    "text,seconds",
    [
        ("42m", 2520),
        ("1h30m", 5400),
        ("500ms", 0.5),
        ("1.5s", 1.5),
        ("x", None),
        ("", None),
        ("5", None),
        ("5d", None),
        ("m5", None),
    ],
)
def test_parse_duration(text: str, seconds: float | None) -> None:
    assert words.parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text,seconds",
    [
        ("1767359017", "1767359017.000000000"),
        ("1767359017.5", "1767359017.500000000"),
        ("2026-01-02T13:03:37Z", "1767359017.000000000"),
        ("2026-01-02T13:03:37.123456789Z", "1767359017.123456789"),
        ("2026-01-02T14:03:37.5+01:00", "1767359017.500000000"),
    ],
)
def test_parse_time(text: str, seconds: str) -> None:
    assert words.parse_time("--since", text) == seconds


def test_times_ago_and_local_times() -> None:
    assert abs(float(words.parse_time("--since", "1h")) - (time.time() - 3600)) < 60
    assert float(words.parse_time("--since", "2026-01-02")) == time.mktime((2026, 1, 2, 0, 0, 0, 0, 0, -1))


@pytest.mark.parametrize("text", ["yesterday", "2026-13-01", "12:00", "-5"])
def test_bad_time(text: str) -> None:
    with pytest.raises(InvalidRequest, match="--since"):
        words.parse_time("--since", text)
