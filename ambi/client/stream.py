"""The bytes of an attached process: frames taken apart, stdin pumped, ends closed one at a time.

Without a terminal the engine sends frames, docker's: one byte stream (1 stdout, 2 stderr), three zero bytes, the length as
32 bits big endian, the payload. With a terminal the stream is raw. Our end of stdin is `shutdown(SHUT_WR)`, after which
output still comes.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator
from typing import Protocol

from ambi.client.client import Hijacked
from ambi.core.errors import Internal

STDOUT, STDERR = 1, 2
HEADER_SIZE = 8
STDIN_AHEAD = 256 << 10  # bytes of stdin held while the engine does not take them
READ_SIZE = 64 << 10
DEFAULT_DETACH_KEYS = b"\x10\x11"  # ctrl-p,ctrl-q


class Frames:
    """Takes a framed stream apart, in whatever pieces it arrives."""

    __slots__ = ("_header", "_left", "_stream")

    def __init__(self) -> None:
        self._header = b""
        self._left = 0
        self._stream = 0

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """(STDOUT or STDERR, bytes) for what is in `data`; a payload may come in several parts. Raises Internal."""
        view = memoryview(data)
        while view:
            if not self._left:
                need = HEADER_SIZE - len(self._header)
                self._header += view[:need]
                view = view[need:]
                if len(self._header) < HEADER_SIZE:
                    return
                self._stream, self._left = self._header[0], int.from_bytes(self._header[4:], "big")
                if self._stream not in (0, STDOUT, STDERR) or self._header[1:4] != b"\0\0\0":
                    raise Internal(f"the engine sent a broken stream: header {self._header.hex()}")
                self._header = b""
                continue
            part = bytes(view[: self._left])
            view = view[len(part) :]
            self._left -= len(part)
            yield (STDERR if self._stream == STDERR else STDOUT), part


class DetachKeys:
    """Looks for a key sequence in what the user types; what only began like it is let through when it goes on otherwise."""

    __slots__ = ("_keys", "_matched")

    def __init__(self, keys: bytes) -> None:
        self._keys = keys
        self._matched = 0

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """What to send, and whether the sequence was completed (what follows it is dropped)."""
        if not self._keys:
            return data, False
        out = bytearray()
        for byte in data:
            if byte != self._keys[self._matched]:
                out += self._keys[: self._matched]
                self._matched = 0
                if byte != self._keys[0]:
                    out.append(byte)
                    continue
            self._matched += 1
            if self._matched == len(self._keys):
                return bytes(out), True
        return bytes(out), False


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data`, also to a descriptor that somebody made non-blocking."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            poll = select.poll()
            poll.register(fd, select.POLLOUT)
            poll.poll()


class Watched(Protocol):
    """Something that becomes readable: `ready` is called then. A negative `fileno` is not waited for."""

    def fileno(self) -> int: ...

    def ready(self) -> None: ...


class Session:
    """Pumps one attached stream until its output ends.

    stdin: a descriptor to read from, None for none. framed: as the engine sends it. keys: the detach sequence, b"" for none.
    watch: one more thing to react to meanwhile. output: where stdout and stderr go.
    """

    def __init__(
        self,
        hijacked: Hijacked,
        *,
        framed: bool,
        stdin: int | None = None,
        keys: bytes = b"",
        watch: Watched | None = None,
        output: tuple[int, int] = (STDOUT, STDERR),
    ) -> None:
        self._sock = hijacked.sock
        self._received = hijacked.received
        self._frames = Frames() if framed else None
        self._stdin = stdin
        self._keys = DetachKeys(keys)
        self._watch = watch
        self._output = output
        self._pending = bytearray()  # stdin that the engine has not taken yet
        self._half_closed = stdin is None
        self._detached = False

    def run(self) -> bool:
        """Pump to the end of the output, and close the socket. True when the user typed the detach sequence.

        A reader of our output that is slow makes the engine wait, and nothing is dropped.
        """
        try:
            if self._received:
                self._show(self._received)
            while not self._detached and self._round():
                pass
        finally:
            self._sock.close()
        return self._detached

    def _round(self) -> bool:
        """Wait for something to do, and do it; False at the end of the output."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN | (select.POLLOUT if self._pending else 0))
        if self._stdin is not None and len(self._pending) < STDIN_AHEAD:
            poll.register(self._stdin, select.POLLIN)
        watched = self._watch.fileno() if self._watch else -1
        if watched >= 0:
            poll.register(watched, select.POLLIN)
        ready = dict(poll.poll())
        if self._watch and watched in ready:
            self._watch.ready()
        if self._stdin is not None and self._stdin in ready:
            self._read_stdin(self._stdin)
        self._send()
        if ready.get(self._sock.fileno(), 0) & ~select.POLLOUT:
            return self._receive()
        return True

    def _read_stdin(self, fd: int) -> None:
        try:
            data = os.read(fd, READ_SIZE)
        except BlockingIOError:
            return
        except OSError:  # a closed descriptor, or a terminal that has gone: there is no more input
            data = b""
        if not data:
            self._stdin = None
            return
        data, self._detached = self._keys.feed(data)
        self._pending += data

    def _send(self) -> None:
        try:
            while self._pending:
                sent = self._sock.send(self._pending[:READ_SIZE], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                del self._pending[:sent]
            if self._stdin is None and not self._half_closed:
                self._half_closed = True
                self._sock.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            pass
        except OSError:  # the process does not want its input any more; its output still counts
            self._pending.clear()
            self._stdin, self._half_closed = None, True

    def _receive(self) -> bool:
        try:
            data = self._sock.recv(READ_SIZE)
        except ConnectionResetError:
            data = b""
        if data:
            self._show(data)
        return bool(data)

    def _show(self, data: bytes) -> None:
        if self._frames is None:
            write_all(self._output[0], data)
            return
        for stream, part in self._frames.feed(data):
            write_all(self._output[stream == STDERR], part)
