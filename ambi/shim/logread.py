"""Reads what `log.py` writes: whole lines in order, over rotations, and on as the log grows.

Pieces of a cut line are joined again, and `\\udcXX` becomes the byte that it stands for. What cannot be parsed (half an
entry of a killed writer) is skipped.
"""

from __future__ import annotations

import json
import os
import select
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Literal, NamedTuple

from ambi.linux import inotify

LONGEST = 1 << 20  # a longer line comes in several entries, all but the last without a newline
_BLOCK = 256 << 10
_SLACK = 16  # lines before the asked tail that are read too, for lines that were cut around others

Path = str | os.PathLike[str]


class Entry(NamedTuple):
    """One line as it was written, its newline included when it had one. time_ns: when its first piece was read."""

    stream: Literal["stdout", "stderr"]
    time_ns: int
    line: bytes


class Follow(NamedTuple):
    """How long to go on. ended: whether no more will be written; wake: a descriptor that is readable once that is so."""

    ended: Callable[[], bool]
    wake: int | None = None


def entries(
    path: Path,
    *,
    tail: int | None = None,
    since_ns: int | None = None,
    until_ns: int | None = None,
    follow: Follow | None = None,
) -> Iterator[Entry]:
    """The entries of the log at `path`, the oldest first; none when there is no such log (yet, when following).

    tail: only the last N lines of what is there now. since_ns, until_ns: wall clock, inclusive. Close the iterator to free
    its descriptors.
    """
    for entry in _tailed(os.fspath(path), tail, follow, until_ns):
        if until_ns is not None and entry.time_ns > until_ns:
            return
        if since_ns is None or entry.time_ns >= since_ns:
            yield entry


def _tailed(path: str, tail: int | None, follow: Follow | None, until_ns: int | None) -> Iterator[Entry]:
    reader = _Reader(path, tail)
    try:
        joiner = _Joiner()
        present = joiner.join(reader.read()) if follow is not None else chain(joiner.join(reader.read()), joiner.rest())
        yield from present if tail is None else deque(present, tail)
        if follow is not None:
            yield from _follow(reader, joiner, follow, until_ns)
            yield from joiner.rest()
    finally:
        reader.close()


def _follow(reader: _Reader, joiner: _Joiner, follow: Follow, until_ns: int | None) -> Iterator[Entry]:
    with _Growth(reader.path, follow.wake) as growth:
        while True:
            last = follow.ended() or (until_ns is not None and time.time_ns() > until_ns)
            growth.clear()
            progress = reader.position
            yield from joiner.join(reader.read())
            if reader.position != progress:
                continue
            if last:
                return
            growth.wait(until_ns)


class _Growth:
    """Waits until something in the log's directory changes."""

    def __init__(self, path: str, wake: int | None) -> None:
        self._poll = select.poll()
        self._inotify: int | None = None
        self._soon = 0
        try:
            events = inotify.IN_MODIFY | inotify.IN_CREATE | inotify.IN_MOVED_TO | inotify.IN_DELETE
            self._inotify = inotify.watch_directory(os.path.dirname(path) or ".", events)
            self._poll.register(self._inotify, select.POLLIN)
        except OSError:  # the user's inotify limits are used up, or the directory is not there yet
            pass
        if wake is not None:
            self._poll.register(wake, select.POLLIN)

    def clear(self) -> None:
        if self._inotify is not None:
            inotify.clear(self._inotify)

    def wait(self, until_ns: int | None) -> None:
        """Return on a change, on the wake descriptor, at `until_ns`, and now and then in any case.

        After a change beside the log, as that of `exit.json`, it returns sooner for a while: who is asked whether the run
        has ended may hear of it a moment later than we do.
        """
        limit_ms = 1000 if self._inotify is not None and not self._soon else 100
        if until_ns is not None:
            limit_ms = max(0, min(limit_ms, (until_ns - time.time_ns()) // 1_000_000 + 1))
        changed = self._poll.poll(limit_ms)
        self._soon = 10 if changed else max(0, self._soon - 1)

    def __enter__(self) -> _Growth:
        return self

    def __exit__(self, *_: object) -> None:
        if self._inotify is not None:
            os.close(self._inotify)


class _Reader:
    """Reads JSON lines from the file where the tail begins to the newest, wherever rotation moves them meanwhile."""

    def __init__(self, path: str, tail: int | None) -> None:
        self.path = path
        self.position = 0  # grows with every byte read, over all files
        self._fd: int | None = None
        self._rest = b""
        if tail is None:
            self._fd = _open(_files(path)[-1]) if _files(path) else None
        else:
            self._seek_tail(tail)

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def read(self) -> Iterator[bytes]:
        """All whole lines from here to the present end."""
        if self._fd is None:
            self._fd = _open(self.path)
        while self._fd is not None:
            yield from self._read_file()
            following = _successor(self.path, self._fd)
            if following is None:
                return
            yield from self._read_file()  # what was written between the end that we saw and the rotation
            os.close(self._fd)
            self._fd, self._rest = following, b""

    def _read_file(self) -> Iterator[bytes]:
        assert self._fd is not None
        while block := os.read(self._fd, _BLOCK):
            self.position += len(block)
            *lines, self._rest = (self._rest + block).split(b"\n")
            yield from lines

    def _seek_tail(self, count: int) -> None:
        """Begin `_SLACK` lines before the last `count`; with 0 at the very end."""
        wanted = count + _SLACK if count else 0
        for name in _files(self.path):
            fd = _open(name)
            if fd is None:
                continue
            self.close()
            self._fd = fd
            found, offset = _back(fd, wanted)
            os.lseek(fd, offset, os.SEEK_SET)
            wanted -= found
            if wanted <= 0:
                return


class _Joiner:
    """Joins the pieces of cut lines; streams are cut independently of each other."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[int, list[bytes], int]] = {}  # stream -> time of the first piece, pieces, bytes

    def join(self, lines: Iterator[bytes]) -> Iterator[Entry]:
        for line in lines:
            entry = _parse(line)
            if entry is None:
                continue
            first, pieces, size = self._open.pop(entry.stream, (entry.time_ns, [], 0))
            pieces.append(entry.line)
            size += len(entry.line)
            if entry.line.endswith(b"\n") or size >= LONGEST:
                yield Entry(entry.stream, first, b"".join(pieces))
            else:
                self._open[entry.stream] = (first, pieces, size)

    def rest(self) -> Iterator[Entry]:
        """Lines that never got their newline."""
        for stream, (first, pieces, _) in sorted(self._open.items(), key=lambda item: item[1][0]):
            yield Entry("stderr" if stream == "stderr" else "stdout", first, b"".join(pieces))
        self._open.clear()


def _parse(line: bytes) -> Entry | None:
    try:
        body = json.loads(line)
        text, stream, stamp = body["log"], body["stream"], parse_time(body["time"])
        return Entry("stderr" if stream == "stderr" else "stdout", stamp, text.encode("utf-8", "surrogateescape"))
    except (ValueError, KeyError, TypeError, AttributeError):  # UnicodeEncodeError is a ValueError
        return None


_second: tuple[str, int] = ("", 0)  # the last second that was parsed: neighbours mostly share it


def parse_time(text: str) -> int:
    """Nanoseconds since the epoch of an RFC 3339 time in UTC. Raises ValueError."""
    global _second
    head, fraction = text[:19], text[19:].rstrip("Z")
    if _second[0] != head:
        year, month, day = int(head[0:4]), int(head[5:7]), int(head[8:10])
        clock = int(head[11:13]) * 3600 + int(head[14:16]) * 60 + int(head[17:19])
        _second = (head, _days(year, month, day) * 86400 + clock)
    return _second[1] * 1_000_000_000 + (int(fraction[1:10].ljust(9, "0")) if fraction else 0)


def _days(year: int, month: int, day: int) -> int:
    """Days since 1970-01-01 in the Gregorian calendar."""
    year -= month <= 2
    shifted = (month + 9) % 12
    return 365 * year + year // 4 - year // 100 + year // 400 + (153 * shifted + 2) // 5 + day - 1 - 719468


def _files(path: str) -> list[str]:
    """The log's files, the newest first."""
    names = [path] if os.path.exists(path) else []
    number = 1
    while os.path.exists(f"{path}.{number}"):
        names.append(f"{path}.{number}")
        number += 1
    return names


def _open(path: str) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None


def _successor(path: str, fd: int) -> int | None:
    """The file that followed the one open as `fd`, opened; None when that is still the newest."""
    mine = os.fstat(fd)
    while True:
        names = _files(path)
        place = next((at for at, name in enumerate(names) if _is(name, mine)), None)
        if place == 0 or not names:
            return None
        newer = names[-1] if place is None else names[place - 1]  # None: rotated away, so the oldest that is left
        following = _open(newer)
        if following is not None and (place is None or _is(names[place], mine)):
            return following
        if following is not None:
            os.close(following)  # rotated while we looked


def _is(name: str, status: os.stat_result) -> bool:
    try:
        found = os.stat(name)
    except FileNotFoundError:
        return False
    return (found.st_ino, found.st_dev) == (status.st_ino, status.st_dev)


def _back(fd: int, wanted: int) -> tuple[int, int]:
    """Go back over the last `wanted` finished lines: how many there were, and where the first begins."""
    end = os.fstat(fd).st_size
    if wanted <= 0:
        return 0, end
    found, at, carry = 0, end, b""
    while at > 0:
        start = max(0, at - _BLOCK)
        data = os.pread(fd, at - start, start) + carry
        first, *lines = data.split(b"\n")
        offset = start + len(data)
        for line in reversed(lines):
            offset -= len(line)
            if _finished(line):
                found += 1
                if found > wanted:
                    return wanted, offset + len(line) + 1
            offset -= 1
        carry, at = first, start
    return found + _finished(carry), 0


def _finished(entry: bytes) -> bool:
    """Whether a JSON line ends a line of output: its text ends with an escaped newline, not a backslash and an n."""
    text = entry[: entry.rfind(b'","stream":"')]
    if not text.endswith(b"\\n"):
        return False
    stem = text[:-1].rstrip(b"\\")
    return (len(text) - 1 - len(stem)) % 2 == 1
