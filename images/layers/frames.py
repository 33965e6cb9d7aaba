"""Frames on a pipe: four bytes of length, so much JSON, and as many bytes as its `data` says."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from typing import Any

from ambi.core.errors import Corrupt

_LENGTH = struct.Struct("<I")
MAX_FRAME = 1 << 20
_READ = 256 << 10


class FrameWriter:
    """Writes to a pipe that stays the caller's."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._queue = bytearray()

    def frame(self, body: dict[str, Any]) -> None:
        """A frame; `body["data"]` bytes must follow through `data`."""
        text = json.dumps(body, separators=(",", ":")).encode()
        self._queue += _LENGTH.pack(len(text)) + text
        if body.get("end") or len(self._queue) >= _READ:
            self._flush()

    def data(self, piece: memoryview) -> None:
        self._flush()
        while piece:
            piece = piece[os.write(self._fd, piece) :]

    def _flush(self) -> None:
        view = memoryview(bytes(self._queue))
        self._queue.clear()
        while view:
            view = view[os.write(self._fd, view) :]


class FrameReader:
    """Reads what a `FrameWriter` wrote. The writer is not trusted: a wrong length is Corrupt."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._buffer = memoryview(b"")

    def _exactly(self, count: int) -> bytes | None:
        """`count` bytes; None at the end before the first."""
        parts, left = [], count
        while left:
            if not self._buffer:
                self._buffer = memoryview(os.read(self._fd, _READ))
                if not self._buffer:
                    if left == count:
                        return None
                    raise Corrupt("the image worker's output is cut short")
            part, self._buffer = self._buffer[:left], self._buffer[left:]
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    def frame(self) -> dict[str, Any] | None:
        """The next frame's body, or None at the end of the pipe."""
        head = self._exactly(4)
        if head is None:
            return None
        (length,) = _LENGTH.unpack(head)
        text = self._exactly(length) if 0 < length <= MAX_FRAME else None
        try:
            body = json.loads(text or b"")
        except ValueError as error:
            raise Corrupt(f"the image worker sent a damaged frame: {error}") from None
        if not isinstance(body, dict) or type(body.get("data")) is not int or body["data"] < 0:
            raise Corrupt("the image worker sent a frame of another form")
        return body

    def copy(self, count: int, take: Callable[[memoryview], object]) -> None:
        """Give the next `count` bytes to `take`, piece by piece."""
        for piece in self._pieces(count):
            take(piece)

    def _pieces(self, left: int) -> Iterator[memoryview]:
        while left:
            if not self._buffer:
                self._buffer = memoryview(os.read(self._fd, _READ))
                if not self._buffer:
                    raise Corrupt("the image worker's output is cut short")
            part, self._buffer = self._buffer[:left], self._buffer[left:]
            left -= len(part)
            yield part
