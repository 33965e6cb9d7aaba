"""The json-file log: Docker's shape, cut lines, foreign bytes, rotation, tail and follow."""

import json
import os
import random
import threading
from pathlib import Path

import pytest

from ambi.shim import logread
from ambi.shim.log import CUT, LogWriter, rfc3339
from ambi.shim.logread import Follow, parse_time


def read(path: Path, **options: object) -> list[tuple[str, bytes]]:
    return [(e.stream, e.line) for e in logread.entries(path, **options)]  # type: ignore[arg-type]


def write(path: Path, *outputs: tuple[int, bytes], **options: int) -> None:
    writer = LogWriter(str(path), **options)
    for stream, data in outputs:
        writer.write(stream, data)
    writer.close()


def test_shape_of_an_entry(tmp_path: Path) -> None:
    write(tmp_path / "log", (1, b"hello\n"), (2, b'"quo\\te"\t\n'))
    first, second = (tmp_path / "log").read_text().splitlines()
    assert first.startswith('{"log":"hello\\n","stream":"stdout","time":"20') and first.endswith('Z"}')
    assert list(json.loads(first)) == ["log", "stream", "time"]
    assert json.loads(second)["log"] == '"quo\\te"\t\n'


@pytest.mark.parametrize(
    "time_ns,text",
    [
        (0, "1970-01-01T00:00:00Z"),
        (1, "1970-01-01T00:00:00.000000001Z"),
        (1_795_521_477_657_655_610, "2026-11-24T11:57:57.65765561Z"),
        (951_782_400_500_000_000, "2000-02-29T00:00:00.5Z"),
        (4_107_542_400_000_000_000, "2100-03-01T00:00:00Z"),
    ],
)
def test_times(time_ns: int, text: str) -> None:
    assert rfc3339(time_ns) == text
    assert parse_time(text) == time_ns


def test_lines_are_held_until_their_newline_or_the_end(tmp_path: Path) -> None:
    writer = LogWriter(str(tmp_path / "log"))
    writer.write(1, b"one ")
    writer.write(2, b"err\n")
    assert writer.held(1) == b"one "
    assert read(tmp_path / "log") == [("stderr", b"err\n")]
    writer.write(1, b"line\ntwo")
    writer.close()
    assert read(tmp_path / "log") == [("stderr", b"err\n"), ("stdout", b"one line\n"), ("stdout", b"two")]


@pytest.mark.parametrize("length", [0, 1, CUT - 1, CUT, CUT + 1, 2 * CUT, 100_000])
def test_long_lines_are_cut_and_joined(tmp_path: Path, length: int) -> None:
    line = b"x" * length + b"\n"
    write(tmp_path / "log", (1, line + b"after\n"))
    sizes = [len(json.loads(entry)["log"]) for entry in (tmp_path / "log").read_text().splitlines()]
    assert max(sizes) <= CUT + 1
    assert read(tmp_path / "log") == [("stdout", line), ("stdout", b"after\n")]


def test_a_line_in_many_writes_equals_one_write(tmp_path: Path) -> None:
    line = random.Random(1).randbytes(3 * CUT + 77).replace(b"\n", b"") + b"\n"
    write(tmp_path / "log", *((1, line[at : at + 1000]) for at in range(0, len(line), 1000)))
    assert read(tmp_path / "log") == [("stdout", line)]


def test_no_byte_is_lost(tmp_path: Path) -> None:
    generator = random.Random(7)
    data = bytes(range(256)) * 3 + "ä€😀\ud800x".encode("utf-8", "surrogatepass") + b"\xff" + generator.randbytes(300_000)
    write(tmp_path / "log", *((1, data[at : at + 65536]) for at in range(0, len(data), 65536)))
    assert b"".join(line for _, line in read(tmp_path / "log")) == data


def test_streams_are_cut_apart_from_each_other(tmp_path: Path) -> None:
    writer = LogWriter(str(tmp_path / "log"))
    writer.write(1, b"a" * (CUT + 10))
    writer.write(2, b"b" * (CUT + 10))
    writer.write(1, b"A\n")
    writer.write(2, b"B\n")
    writer.close()
    assert read(tmp_path / "log") == [
        ("stdout", b"a" * (CUT + 10) + b"A\n"),
        ("stderr", b"b" * (CUT + 10) + b"B\n"),
    ]


def test_rotation_keeps_the_newest_and_cuts_no_entry(tmp_path: Path) -> None:
    write(tmp_path / "log", *((1, b"line %05d\n" % n) for n in range(200)), max_bytes=2000, max_files=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "log.1", "log.2"]
    for path in tmp_path.iterdir():
        assert path.stat().st_size <= 2000
        assert path.read_bytes().endswith(b"}\n")
    lines = [line for _, line in read(tmp_path / "log")]
    assert lines == [b"line %05d\n" % n for n in range(200 - len(lines), 200)] and len(lines) > 50


def test_rotation_within_one_write_of_many_lines(tmp_path: Path) -> None:
    write(tmp_path / "log", (1, b"".join(b"line %05d\n" % n for n in range(100))), max_bytes=1000, max_files=100)
    assert [line for _, line in read(tmp_path / "log")] == [b"line %05d\n" % n for n in range(100)]


def test_one_file_starts_anew(tmp_path: Path) -> None:
    write(tmp_path / "log", *((1, b"line %05d\n" % n) for n in range(100)), max_bytes=1000, max_files=1)
    assert [p.name for p in tmp_path.iterdir()] == ["log"]
    assert read(tmp_path / "log")[-1] == ("stdout", b"line 00099\n")


def test_an_entry_larger_than_the_limit_is_kept_whole(tmp_path: Path) -> None:
    write(tmp_path / "log", (1, b"x" * 5000 + b"\n"), (1, b"y\n"), max_bytes=1000, max_files=2)
    assert [line for _, line in read(tmp_path / "log")] == [b"x" * 5000 + b"\n", b"y\n"]


@pytest.mark.parametrize("count", [0, 1, 5, 99, 100, 1000])
def test_tail_over_rotated_files(tmp_path: Path, count: int) -> None:
    write(tmp_path / "log", *((1 + n % 2, b"line %d\n" % n) for n in range(100)), max_bytes=1000, max_files=100)
    assert [line for _, line in read(tmp_path / "log", tail=count)] == [b"line %d\n" % n for n in range(100)][
        100 - min(count, 100) :
    ]


def test_tail_counts_joined_lines(tmp_path: Path) -> None:
    big = b"z" * (40 * CUT)
    write(tmp_path / "log", (1, b"first\n" + big + b"\nlast\n"))
    assert [line for _, line in read(tmp_path / "log", tail=2)] == [big + b"\n", b"last\n"]


def test_tail_is_not_fooled_by_text_that_looks_like_an_end(tmp_path: Path) -> None:
    tricky = b'\\n","stream":"stdout"'
    lines = [b"%d " % n + tricky + b"\\\\\\n\n" for n in range(50)]
    write(tmp_path / "log", (1, b"".join(lines) + b"no newline \\n"))
    assert [line for _, line in read(tmp_path / "log", tail=3)] == [*lines[-2:], b"no newline \\n"]


def test_since_and_until_are_inclusive(tmp_path: Path) -> None:
    with open(tmp_path / "log", "w") as file:
        for n in range(10):
            file.write(json.dumps({"log": f"{n}\n", "stream": "stdout", "time": rfc3339(10**18 + n)}) + "\n")
    found = read(tmp_path / "log", since_ns=10**18 + 3, until_ns=10**18 + 5)
    assert [line for _, line in found] == [b"3\n", b"4\n", b"5\n"]


def test_half_an_entry_of_a_killed_writer_costs_only_itself(tmp_path: Path) -> None:
    write(tmp_path / "log", (1, b"before\n"))
    with open(tmp_path / "log", "ab") as file:
        file.write(b'{"log":"half an en')
    write(tmp_path / "log", (1, b"after\n"))
    assert read(tmp_path / "log") == [("stdout", b"before\n"), ("stdout", b"after\n")]


@pytest.mark.parametrize(
    "line",
    [
        b"null",
        b"[]",
        b'{"log":1,"stream":"stdout","time":"2026-11-24T11:57:57Z"}',
        b"\xff\xfe",
        b'{"log":"x","time":"x"}',
        b"",
    ],
)
def test_foreign_lines_are_skipped(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "log").write_bytes(line + b"\n")
    write(tmp_path / "log", (1, b"good\n"))
    assert read(tmp_path / "log") == [("stdout", b"good\n")]


def test_no_log_is_no_entries(tmp_path: Path) -> None:
    assert read(tmp_path / "log") == []


def test_a_full_disk_costs_entries_not_the_writer(tmp_path: Path) -> None:
    writer = LogWriter(str(tmp_path / "log"))
    writer.write(1, b"kept\n")
    kept, full = os.dup(writer._fd), os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, writer._fd)  # ENOSPC from the kernel, on the very descriptor
    with pytest.raises(OSError):
        os.write(writer._fd, b"x")
    os.dup2(kept, writer._fd)
    os.close(full)
    os.close(kept)
    writer.write(1, b"again\n")
    writer.close()
    assert [line for _, line in read(tmp_path / "log")] == [b"kept\n", b"again\n"]


def test_follow_over_rotation_to_the_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    ended = threading.Event()
    wake_read, wake_write = os.pipe()
    lines = [b"line %05d %s\n" % (n, b"x" * (n % 300)) for n in range(3000)]

    def produce() -> None:
        writer = LogWriter(str(path), max_bytes=20_000, max_files=1000)
        for line in lines:
            writer.write(1, line)
        writer.write(1, b"no newline")
        writer.close()
        ended.set()
        os.write(wake_write, b"!")

    producer = threading.Thread(target=produce)
    producer.start()
    found = [entry.line for entry in logread.entries(path, follow=Follow(ended.is_set, wake_read))]
    producer.join()
    os.close(wake_read)
    os.close(wake_write)
    assert found == [*lines, b"no newline"]


def test_follow_begins_with_the_tail(tmp_path: Path) -> None:
    write(tmp_path / "log", (1, b"a\nb\nc\n"))
    entries = logread.entries(tmp_path / "log", tail=1, follow=Follow(lambda: False))
    assert next(entries).line == b"c\n"
    write(tmp_path / "log", (1, b"d\n"))
    assert next(entries).line == b"d\n"
    entries.close()  # type: ignore[attr-defined]


def test_follow_ends_at_until(tmp_path: Path) -> None:
    write(tmp_path / "log", (1, b"a\n"))
    import time

    entries = logread.entries(tmp_path / "log", until_ns=time.time_ns() + 50_000_000, follow=Follow(lambda: False))
    assert [entry.line for entry in entries] == [b"a\n"]
