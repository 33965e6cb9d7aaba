"""Writes an instance's log in the shape of Docker's json-file driver.

One line an entry: `{"log":"text\\n","stream":"stdout","time":"2026-11-24T11:40:49.123456789Z"}`. A line of more than 16 KiB
is cut into entries without a newline of 16 KiB each; the last piece carries it. Bytes that are not UTF-8 stand as
`\\udcXX`, Python's surrogateescape, so that nothing is lost. The time is that of the read; all lines of one read share it.

Rotation: before an entry would make the file larger than `max_bytes`, `LOG` becomes `LOG.1`, `LOG.1` becomes `LOG.2`, and
so on, `max_files` in all.
"""

from __future__ import annotations

import os
import time
from json.encoder import encode_basestring_ascii as quote

CUT = 16 << 10
STREAMS = {1: "stdout", 2: "stderr"}


def rfc3339(time_ns: int) -> str:
    """UTC, nanoseconds without trailing zeros, as Go's RFC3339Nano."""
    seconds, nanoseconds = divmod(time_ns, 1_000_000_000)
    head = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{head}.{nanoseconds:09d}".rstrip("0").rstrip(".") + "Z" if nanoseconds else head + "Z"


class LogWriter:
    """The only writer of the log at `path`. Lines are held back until their newline, 16 KiB or `finish`.

    A full disk costs the entries that do not fit, never the workload, and never half an entry.
    """

    def __init__(self, path: str, max_bytes: int = 0, max_files: int = 1) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._max_files = max(1, max_files)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        self._size = os.lseek(self._fd, 0, os.SEEK_END)
        if self._size and os.pread(self._fd, 1, self._size - 1) != b"\n":  # a writer was killed: end its half entry
            self._size += os.write(self._fd, b"\n")
        self._held = {1: b"", 2: b""}
        self.dropped = 0  # entries that the disk had no room for

    def write(self, stream: int, data: bytes) -> None:
        """Log what stream 1 or 2 has just printed."""
        head, newline, rest = data.rpartition(b"\n")
        lines = (self._held[stream] + head).split(b"\n") if newline else []
        held = rest if newline else self._held[stream] + rest
        cut = len(held) // CUT * CUT
        self._held[stream] = held[cut:]
        texts: list[str] = []
        for line in lines:
            if len(line) < CUT:
                texts.append(quote(line.decode("utf-8", "surrogateescape") + "\n"))
            else:
                texts.extend(_pieces(line + b"\n"))
        if cut:
            texts.extend(_pieces(held[:cut]))
        if texts:
            self._append(stream, texts)

    def held(self, stream: int) -> bytes:
        """What was printed and is not in the file yet."""
        return self._held[stream]

    def finish(self, stream: int) -> None:
        """Log a last line that has no newline."""
        held, self._held[stream] = self._held[stream], b""
        if held:
            self._append(stream, _pieces(held))

    def close(self) -> None:
        for stream in self._held:
            self.finish(stream)
        os.close(self._fd)

    def _append(self, stream: int, texts: list[str]) -> None:
        tail = f',"stream":"{STREAMS[stream]}","time":"{rfc3339(time.time_ns())}"}}\n'
        if not self._max_bytes:
            self._put(('{"log":' + (tail + '{"log":').join(texts) + tail).encode("ascii"), len(texts))
            return
        batch: list[str] = []
        room = self._max_bytes - self._size
        for text in texts:
            entry = f'{{"log":{text}{tail}'
            if len(entry) > room and (batch or self._size):
                self._put("".join(batch).encode("ascii"), len(batch))
                batch = []
                self._rotate()
                room = self._max_bytes
            batch.append(entry)
            room -= len(entry)
        self._put("".join(batch).encode("ascii"), len(batch))

    def _put(self, data: bytes, entries: int) -> None:
        view, start = memoryview(data), self._size
        try:
            while view:
                written = os.write(self._fd, view)
                self._size += written
                view = view[written:]
        except OSError:
            self.dropped += entries
            self._size = start
            os.ftruncate(self._fd, start)
            os.lseek(self._fd, start, os.SEEK_SET)

    def _rotate(self) -> None:
        """Start a new file; a reader that follows sees that the name has another inode and reads the old one to its end."""
        try:
            for number in range(self._max_files - 1, 0, -1):
                older = f"{self._path}.{number - 1}" if number > 1 else self._path
                if os.path.exists(older):
                    os.rename(older, f"{self._path}.{number}")
            if self._max_files == 1:
                os.unlink(self._path)
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640)
        except OSError:  # the disk or its directory: go on in the file that we have
            return
        os.close(self._fd)
        self._fd, self._size = fd, 0


def _pieces(line: bytes) -> list[str]:
    """A line cut to entries: full ones of 16 KiB, and the rest with its newline. `b"\\n"` alone is no entry of its own."""
    end = len(line)
    newline = line.endswith(b"\n")
    body = end - newline
    cuts = [line[at : min(at + CUT, body)] for at in range(0, body, CUT)] or [b""]
    if newline:
        cuts[-1] += b"\n"
    return [quote(piece.decode("utf-8", "surrogateescape")) for piece in cuts]
