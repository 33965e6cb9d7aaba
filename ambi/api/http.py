"""HTTP/1.1 on a connected stream socket, from the server's side (RFC 9112).

One `Connection` a client, used by one thread: `next_request` and one answer, in turn. Strict where two readings of the
same bytes are possible (line ends, lengths, duplicated headers, folding), because everything that is refused here cannot
confuse anything later. Answers are `reply` (a body with a length), `stream` (chunked) or `hijack` (the socket itself).
Bodies are read from the socket as they are consumed, never collected. A reader of our own and not a library's: this is on
the path of every request, and hijacking needs the bytes that came after the head.
"""

from __future__ import annotations

import io
import select
import socket
import time

from ambi.core.deadline import Deadline
from ambi.core.errors import InvalidRequest

MAX_HEAD_BYTES = 64 << 10
MAX_HEADERS = 100
MAX_CHUNK_LINE_BYTES = 4 << 10
MAX_TRAILER_BYTES = 8 << 10
HEAD_SECONDS = 30.0  # from the first byte of a head to its last
LINGER_BYTES = 64 << 20  # of an unread body that is read and dropped: a client that still writes would not see the answer
LINGER_SECONDS = 1.0

_TOKEN = frozenset(b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_DIGITS = frozenset("0123456789")
_HEX = frozenset(b"0123456789abcdefABCDEF")
_SINGLE = frozenset(("host", "content-length", "transfer-encoding", "content-type", "authorization"))

REASONS = {
    101: "UPGRADED", 200: "OK", 201: "Created", 204: "No Content", 304: "Not Modified", 400: "Bad Request",
    401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed", 408: "Request Timeout",
    409: "Conflict", 411: "Length Required", 413: "Content Too Large", 431: "Request Header Fields Too Large",
    500: "Internal Server Error", 501: "Not Implemented", 503: "Service Unavailable", 505: "HTTP Version Not Supported",
    507: "Insufficient Storage",
}  # fmt: skip


class Malformed(Exception):
    """Bytes that are not a request. The connection is answered with `status` and closed."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class ClientGone(Exception):
    """The client closed the connection, or it broke. Nobody is left to be answered."""


class Request:
    """A request's head, and its body.

    target: as sent, in origin form (`/v1.44/containers/json?all=1`); headers: by lower-case name.
    version: (1, 0) or (1, 1).
    """

    __slots__ = ("body", "headers", "keep_alive", "method", "target", "version")

    def __init__(self, method: str, target: str, version: tuple[int, int], headers: dict[str, str], body: Body) -> None:
        self.method = method
        self.target = target
        self.version = version
        self.headers = headers
        self.body = body
        options = connection_options(headers)
        self.keep_alive = "close" not in options if version == (1, 1) else "keep-alive" in options


def connection_options(headers: dict[str, str]) -> list[str]:
    value = headers.get("connection")
    return [option.strip().lower() for option in value.split(",")] if value else []


class Body(io.RawIOBase):
    """A request's body, read from the connection as it is consumed; at its end reads answer b"".

    Raises InvalidRequest when the client ends it early or breaks the chunked framing.
    """

    def __init__(self, connection: Connection, length: int | None, expects_continue: bool) -> None:
        """`length` in bytes; None for chunked."""
        self._connection = connection
        self._chunked = length is None
        self._left = length or 0  # of the body, or of the chunk being read
        self._first_chunk = True
        self._ended = length == 0
        self._expects_continue = expects_continue

    @property
    def ended(self) -> bool:
        """Every byte of it has been read."""
        return self._ended

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if self._ended or not len(buffer):
            return 0
        self._ask()
        try:
            if self._chunked and not self._left and not self._next_chunk():
                return 0
            count = self._connection.receive_into(memoryview(buffer).cast("B")[: self._left])
        except ClientGone:
            count = 0
        if not count:
            raise self._broken("it ended early")
        self._left -= count
        if not self._left and not self._chunked:
            self._ended = True
        return count

    def read_all(self, limit: int, by: Deadline) -> bytes:
        """The whole body; InvalidRequest when it is longer than `limit` bytes or does not come `by` then."""
        parts = []
        while not self._ended:
            self._ask()
            self._connection.await_input(by)
            part = self.read(min(limit + 1, 64 << 10))
            parts.append(part or b"")
            limit -= len(part or b"")
            if limit < 0:
                raise self._broken("it is too large")
        return b"".join(parts)

    def _ask(self) -> None:
        """Tell a client that waits for it that its body is wanted."""
        if self._expects_continue:
            self._expects_continue = False
            self._connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _next_chunk(self) -> bool:
        """Read the next chunk's size into `_left`; False after the last one and its trailers."""
        if not self._first_chunk and self._connection.receive_line(2) != b"":
            raise self._broken("a chunk is longer than its size")
        self._first_chunk = False
        size = self._connection.receive_line(MAX_CHUNK_LINE_BYTES).split(b";", 1)[0].strip(b" \t")
        if not size or len(size) > 15 or not _HEX.issuperset(size):
            raise self._broken("a chunk size is not a hexadecimal number")
        self._left = int(size, 16)
        if self._left:
            return True
        left = MAX_TRAILER_BYTES
        while line := self._connection.receive_line(left):
            left -= len(line) + 2
        self._ended = True
        return False

    def _broken(self, why: str) -> InvalidRequest:
        self._connection.poisoned = True
        return InvalidRequest(f"cannot read the request body: {why}")


class Stream:
    """A response body of unknown length. `write` sends at once; `end` completes it."""

    __slots__ = ("_chunked", "_connection", "_muted")

    def __init__(self, connection: Connection, chunked: bool, muted: bool) -> None:
        self._connection = connection
        self._chunked = chunked
        self._muted = muted

    def write(self, data: bytes) -> None:
        """Raises ClientGone."""
        if data and not self._muted:
            self._connection.send(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    def end(self) -> None:
        if self._chunked and not self._muted:
            self._connection.send(b"0\r\n\r\n")


class Connection:
    """One client. Not thread-safe.

    poisoned: where the next request would begin is not known, so there is none.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.poisoned = False
        self.hijacked = False
        self.answered = False  # a head has been sent for the current request
        self._request: Request | None = None
        self._buffer = bytearray()
        self._input_ended = False

    # requests

    def next_request(self) -> Request | None:
        """The next request, or None when there is none: the client is done, or the connection cannot go on.

        Raises Malformed, after which only `reply` and `close` make sense.
        """
        if self.poisoned or self.hijacked or not self._finish_previous():
            return None
        self._request = None
        try:
            head = self._receive_head()
        except ClientGone:
            return None
        if head is None:
            return None
        self.answered = False
        self._request = self._parse(head)
        return self._request

    def _finish_previous(self) -> bool:
        request = self._request
        if request is None:
            return True
        return request.keep_alive and (request.body.ended or self._discard(request.body))

    def _discard(self, body: Body) -> bool:
        """Read and drop what is left of `body`, within reason. Whether its end was reached."""
        left, by = LINGER_BYTES, Deadline.after(LINGER_SECONDS)
        try:
            while left > 0 and not body.ended:
                self.await_input(by)
                left -= len(body.read(32 << 10) or b"")
        except (InvalidRequest, ClientGone):
            return False
        return body.ended

    def _receive_head(self) -> bytes | None:
        """The bytes of the next head without its final empty line; None at a clean end of the connection."""
        buffer, by = self._buffer, None
        while True:
            if bytes(buffer[:2]) in (b"\r\n", b"\r"):  # RFC 9112 2.2: empty lines before a request are ignored
                if len(buffer) > 1:
                    del buffer[:2]
                    continue
            else:
                end = buffer.find(b"\r\n\r\n")
                if 0 <= end <= MAX_HEAD_BYTES:
                    head = bytes(buffer[:end])
                    del buffer[: end + 4]
                    return head
                if len(buffer) > MAX_HEAD_BYTES:
                    raise Malformed(431, f"the request's head is longer than {MAX_HEAD_BYTES} bytes")
                if b"\n\n" in buffer:
                    raise Malformed(400, "lines of the request's head must end with CR LF")
            if buffer:
                by = by or Deadline.after(HEAD_SECONDS)
                try:
                    self._await_socket(by)
                except InvalidRequest as error:
                    raise Malformed(408, "the request's head did not come in time") from error
            data = self._receive()
            if not data:
                if buffer:
                    raise Malformed(400, "the request's head ended early")
                self._input_ended = True
                return None
            buffer += data

    def _parse(self, head: bytes) -> Request:
        lines = head.split(b"\r\n")
        method, target, version = _parse_request_line(lines[0])
        headers = _parse_headers(lines[1:])
        if version == (1, 1) and "host" not in headers:
            raise Malformed(400, "the request has no Host header")
        length = _body_length(headers, version)
        expects = version == (1, 1) and headers.get("expect", "").lower() == "100-continue"
        return Request(method, target, version, headers, Body(self, length, expects))

    # answers

    def reply(self, status: int, headers: tuple[tuple[str, str], ...], body: bytes) -> None:
        """Send a complete answer. Raises ClientGone."""
        bodiless = status in (204, 304)
        head = self._head(status, headers, () if bodiless else (("Content-Length", str(len(body))),))
        muted = bodiless or (self._request is not None and self._request.method == "HEAD")
        self.answered = True
        self.send(head if muted else head + body)

    def stream(self, status: int, headers: tuple[tuple[str, str], ...]) -> Stream:
        """Send the head of an answer of unknown length, at once. Raises ClientGone."""
        request = self._request
        assert request is not None
        chunked = request.version == (1, 1)
        if not chunked:
            request.keep_alive = False
        self.answered = True
        self.send(self._head(status, headers, (("Transfer-Encoding", "chunked"),) if chunked else ()))
        return Stream(self, chunked, request.method == "HEAD")

    def pending(self) -> bytes:
        """What the client has sent beyond the current request: the first bytes of a raw stream."""
        return bytes(self._buffer)

    def hijack(self, head: bytes) -> None:
        """Send `head` and never touch the stream again: whoever got the socket and `pending` goes on. Raises ClientGone."""
        self.hijacked = True
        self.answered = True
        self.send(head)

    def client_gone(self) -> bool:
        """Whether the client has closed the connection; one that has only ended its own direction is still there."""
        poll = select.poll()
        poll.register(self.socket, 0)  # POLLHUP and POLLERR are always reported
        return bool(poll.poll(0))

    def _head(self, status: int, headers: tuple[tuple[str, str], ...], more: tuple[tuple[str, str], ...]) -> bytes:
        lines = [f"HTTP/1.1 {status} {REASONS.get(status, 'Unknown')}\r\nDate: {_date()}\r\n"]
        lines += [f"{name}: {_header_text(value)}\r\n" for name, value in headers + more]
        if self.poisoned or self._request is None or not self._request.keep_alive:
            lines.append("Connection: close\r\n")
        elif self._request.version == (1, 0):
            lines.append("Connection: keep-alive\r\n")
        lines.append("\r\n")
        return "".join(lines).encode("latin-1", "replace")

    def close(self) -> None:
        """Close our descriptor; a hijacked socket lives on in other hands. What the client still sends of a body is read
        for a moment, since a socket that is closed with unread input takes the answer with it."""
        if self.hijacked:
            self.socket.close()
            return
        try:
            self.socket.shutdown(socket.SHUT_WR)  # a shim may have a copy, and would keep the client from seeing the end
            if self._input_ended:
                return
            left, by = LINGER_BYTES, Deadline.after(LINGER_SECONDS)
            while left > 0:
                self.await_input(by)
                data = self._receive()
                if not data:
                    break
                left -= len(data)
        except (OSError, InvalidRequest, ClientGone):
            pass
        finally:
            self.socket.close()

    # bytes

    def send(self, data: bytes) -> None:
        try:
            self.socket.sendall(data)
        except OSError as error:
            self.poisoned = True
            raise ClientGone(str(error)) from error

    def receive_into(self, buffer: memoryview) -> int:
        """Some bytes of input into `buffer`, what was read ahead first; 0 at the end."""
        if self._buffer:
            count = min(len(buffer), len(self._buffer))
            buffer[:count] = self._buffer[:count]
            del self._buffer[:count]
            return count
        try:
            return self.socket.recv_into(buffer)
        except OSError as error:
            raise ClientGone(str(error)) from error

    def receive_line(self, limit: int) -> bytes:
        """One line without its CR LF; InvalidRequest when it has more than `limit` bytes or no end."""
        while True:
            end = self._buffer.find(b"\r\n", 0, limit + 2)
            if end >= 0:
                line = bytes(self._buffer[:end])
                del self._buffer[: end + 2]
                return line
            if len(self._buffer) >= limit + 2:
                self.poisoned = True
                raise InvalidRequest("cannot read the request body: a line of its framing is too long")
            data = self._receive()
            if not data:
                self.poisoned = True
                raise InvalidRequest("cannot read the request body: it ended early")
            self._buffer += data

    def await_input(self, by: Deadline) -> None:
        """Return when there is input to read, or its end; InvalidRequest when there is none `by` then."""
        if not self._buffer:
            self._await_socket(by)

    def _await_socket(self, by: Deadline) -> None:
        left = by.remaining()
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        if not poll.poll(None if left is None else left * 1000):
            self.poisoned = True
            raise InvalidRequest("cannot read the request: it did not come in time")

    def _receive(self) -> bytes:
        try:
            return self.socket.recv(64 << 10)
        except OSError as error:
            raise ClientGone(str(error)) from error


def _parse_request_line(line: bytes) -> tuple[str, str, tuple[int, int]]:
    parts = line.split(b" ")
    if len(parts) != 3 or not parts[0] or not _TOKEN.issuperset(parts[0]):
        raise Malformed(400, "the first line is not METHOD TARGET HTTP/VERSION")
    method, target, version = parts
    if version not in (b"HTTP/1.1", b"HTTP/1.0"):
        raise Malformed(
            505 if version.startswith(b"HTTP/") else 400, "the versions of HTTP that are spoken here are 1.0 and 1.1"
        )
    if target.startswith((b"http://", b"https://")):  # absolute form: what proxies send
        slash = target.find(b"/", 8)
        target = target[slash:] if slash > 0 else b"/"
    if not target.startswith(b"/") or min(target) <= 0x20 or max(target) >= 0x7F:
        raise Malformed(400, "the request's target is not a path of printable ASCII")
    return method.decode("ascii"), target.decode("ascii"), (1, 1) if version == b"HTTP/1.1" else (1, 0)


def _parse_headers(lines: list[bytes]) -> dict[str, str]:
    if len(lines) > MAX_HEADERS:
        raise Malformed(431, f"the request has more than {MAX_HEADERS} headers")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not name or not _TOKEN.issuperset(name):
            raise Malformed(400, "a header is not NAME: VALUE")
        if b"\n" in value or b"\r" in value or b"\0" in value:
            raise Malformed(400, "a header's value has a line end or a zero byte in it")
        key, text = name.decode("ascii").lower(), value.strip(b" \t").decode("latin-1")
        if key in headers:
            if key in _SINGLE:
                raise Malformed(400, f"the header {key} is given twice")
            text = f"{headers[key]}, {text}"
        headers[key] = text
    return headers


def _body_length(headers: dict[str, str], version: tuple[int, int]) -> int | None:
    """In bytes; None for a chunked body."""
    coding, length = headers.get("transfer-encoding"), headers.get("content-length")
    if coding is not None:
        if length is not None or version == (1, 0):
            raise Malformed(400, "Transfer-Encoding goes neither with Content-Length nor with HTTP/1.0")
        if coding.lower() != "chunked":
            raise Malformed(501, "the only Transfer-Encoding is chunked")
        return None
    if length is None:
        return 0
    if not length or len(length) > 18 or not _DIGITS.issuperset(length):
        raise Malformed(400, "Content-Length is not a number of bytes")
    return int(length)


def _header_text(value: str) -> str:
    """`value` as it may stand in a head: no control characters."""
    return value if value.isprintable() else "".join(c if c.isprintable() else " " for c in value)


_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_date_cache: tuple[int, str] = (0, "")


def _date() -> str:
    global _date_cache
    now = int(time.time())
    if _date_cache[0] != now:
        at = time.gmtime(now)
        day, month = _DAYS[at.tm_wday], _MONTHS[at.tm_mon - 1]
        _date_cache = (now, f"{day}, {at.tm_mday:02} {month} {at.tm_year} {at.tm_hour:02}:{at.tm_min:02}:{at.tm_sec:02} GMT")
    return _date_cache[1]
