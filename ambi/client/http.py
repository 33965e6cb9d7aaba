"""HTTP/1.1 over a Unix socket, as much of it as an engine speaks.

`http.client` costs 35 ms to import, a third of what a command may take, and cannot hand over a hijacked socket with the
bytes that followed its head. A response here is read from one buffer, so nothing of a hijacked stream is lost.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterable, Iterator

from ambi.core.errors import Internal, Unavailable

HEAD_LIMIT = 64 << 10  # bytes of a response's head, or of one chunk's size line
READ_SIZE = 64 << 10
PATH_LIMIT = 107  # bytes of sockaddr_un.sun_path, without the final NUL


def connect(path: str | os.PathLike[str]) -> socket.socket:
    """A stream socket connected to `path`, which may be longer than sockaddr_un allows. Raises OSError."""
    name = os.fspath(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if len(os.fsencode(name)) <= PATH_LIMIT:
            sock.connect(name)
            return sock
        folder = os.open(os.path.dirname(name), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            sock.connect(f"/proc/self/fd/{folder}/{os.path.basename(name)}")
        finally:
            os.close(folder)
        return sock
    except BaseException:
        sock.close()
        raise


class Lost(Unavailable):
    """The connection ended before the answer was complete."""


class Response:
    """The head of an answer, and its body still to be read.

    headers: names in lower case. The body must be read to its end before the connection is used again.
    """

    __slots__ = ("_connection", "_left", "headers", "reason", "status")

    def __init__(self, connection: Connection, status: int, reason: str, headers: dict[str, str]) -> None:
        self._connection = connection
        self.status = status
        self.reason = reason
        self.headers = headers
        self._left = int(headers.get("content-length", -1))

    def chunks(self) -> Iterator[bytes]:
        """The body in pieces, as they arrive."""
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            yield from self._chunked()
        elif self._left >= 0:
            while self._left > 0:
                data = self._connection.receive(self._left)
                self._left -= len(data)
                yield data
        elif self.status not in (204, 304):
            yield from self._connection.receive_all()

    @property
    def reusable(self) -> bool:
        """Whether the connection outlives the body: not where the body's end is that of the connection."""
        return "content-length" in self.headers or "transfer-encoding" in self.headers or self.status in (204, 304)

    def read(self) -> bytes:
        return b"".join(self.chunks())

    def lines(self) -> Iterator[bytes]:
        """The body split at newlines; what follows the last one is the last line."""
        rest = b""
        for chunk in self.chunks():
            *whole, rest = (rest + chunk).split(b"\n")
            yield from (line for line in whole if line.strip())
        if rest.strip():
            yield rest

    def _chunked(self) -> Iterator[bytes]:
        while True:
            size = self._connection.receive_line()
            try:
                left = int(size.split(b";")[0], 16)
            except ValueError:
                raise Internal(f"the engine sent a chunk of size {size[:40]!r}") from None
            if left == 0:
                while self._connection.receive_line():
                    pass
                return
            while left:
                data = self._connection.receive(left)
                left -= len(data)
                yield data
            self._connection.receive_line()


class Connection:
    """One connection to an engine; requests go one after the other."""

    __slots__ = ("_buffer", "path", "sock")

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.sock = connect(path)
        self._buffer = bytearray()

    def close(self) -> None:
        self.sock.close()

    def ended(self) -> bool:
        """Whether the other side has closed it, or has said something unasked."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return bool(self._buffer or poll.poll(0))

    def send(self, method: str, target: str, headers: Iterable[tuple[str, str]], body: bytes = b"") -> None:
        lines = [f"{method} {target} HTTP/1.1", "Host: ambi", *(f"{name}: {value}" for name, value in headers)]
        self.send_bytes("\r\n".join([*lines, "", ""]).encode() + body)

    def send_bytes(self, data: bytes) -> None:
        try:
            self.sock.sendall(data, socket.MSG_NOSIGNAL)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Lost(f"the engine at {self.path} closed the connection: {error.strerror}") from error

    def response(self) -> Response:
        """Read the head of the next answer; interim answers (1xx) but 101 are skipped."""
        while True:
            status_line = self.receive_line().split(b" ", 2)
            if len(status_line) < 2 or not status_line[0].startswith(b"HTTP/1.") or not status_line[1].isdigit():
                raise Internal(f"what listens on {self.path} is not an engine: it does not speak HTTP")
            headers: dict[str, str] = {}
            while line := self.receive_line():
                name, _, value = line.decode("latin-1").partition(":")
                headers[name.strip().lower()] = value.strip()
            status = int(status_line[1])
            if status == 101 or status >= 200:
                return Response(self, status, status_line[2].decode("latin-1") if status_line[2:] else "", headers)

    def take(self) -> tuple[socket.socket, bytes]:
        """The socket, and what has been received beyond the head: the caller's from now on."""
        return self.sock, bytes(self._buffer)

    def receive(self, limit: int) -> bytes:
        """At least one and at most `limit` bytes. Raises Lost at the end of the stream."""
        if not self._buffer:
            self._fill()
        data = bytes(self._buffer[:limit])
        del self._buffer[:limit]
        return data

    def receive_all(self) -> Iterator[bytes]:
        """Everything up to the end of the stream, in pieces."""
        if self._buffer:
            yield self.receive(len(self._buffer))
        while data := self._recv():
            yield data

    def receive_line(self) -> bytes:
        """One line without its CRLF."""
        start = 0
        while (end := self._buffer.find(b"\n", start)) < 0:
            if len(self._buffer) > HEAD_LIMIT:
                raise Internal(f"the engine at {self.path} sent a header line longer than {HEAD_LIMIT} bytes")
            start = len(self._buffer)
            self._fill()
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line.rstrip(b"\r")

    def _fill(self) -> None:
        data = self._recv()
        if not data:
            raise Lost(f"the engine at {self.path} closed the connection before it had answered")
        self._buffer += data

    def _recv(self) -> bytes:
        try:
            return self.sock.recv(READ_SIZE)
        except ConnectionResetError as error:
            raise Lost(f"the engine at {self.path} reset the connection") from error
