"""The server's side of a websocket that carries a raw stream (RFC 6455): the handshake, frames, and the bridge between them.

No extension and no subprotocol. Payload of data frames is the stream, whatever messages it is cut into; what goes out is
binary. Nothing is collected: a frame's payload is passed on as it arrives.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import hashlib
import select
import socket
import time
from collections.abc import Iterator

from ambi.api.http import connection_options
from ambi.core.errors import InvalidRequest

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, 1.3
_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING, _PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
NORMAL, GOING_AWAY, PROTOCOL_ERROR, NOT_UTF8 = 1000, 1001, 1002, 1007
_CODES = {1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014}
_CHUNK, _FULL = 64 << 10, 256 << 10  # bytes: read at once; waiting for a side before the other is not read
_CLOSE_S = 2.0  # for the client to answer our Close


def switch(headers: dict[str, str]) -> bytes:
    """The head that accepts the handshake of a request with `headers`. Raises InvalidRequest for one that is none."""
    key = headers.get("sec-websocket-key", "").strip()
    try:
        valid = len(base64.b64decode(key, validate=True)) == 16
    except (binascii.Error, ValueError):
        valid = False
    upgrade = [word.strip().lower() for word in headers.get("upgrade", "").split(",")]
    if "websocket" not in upgrade or "upgrade" not in connection_options(headers) or not valid:
        raise InvalidRequest("this is no websocket handshake", hint="Connection: Upgrade, Upgrade: websocket (RFC 6455)")
    if headers.get("sec-websocket-version", "").strip() != "13":
        raise InvalidRequest("unsupported websocket version", hint="Sec-WebSocket-Version: 13")
    accept = base64.b64encode(hashlib.sha1(key.encode() + _GUID, usedforsecurity=False).digest())
    lines = (b"HTTP/1.1 101 Switching Protocols", b"Upgrade: websocket", b"Connection: Upgrade")
    return b"\r\n".join((*lines, b"Sec-WebSocket-Accept: " + accept, b"", b""))


class ProtocolError(Exception):
    """The client broke the protocol: it is told `code`, and the connection ends."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Decoder:
    """What a client sends, frame by frame."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._left = 0  # of the data frame that is arriving
        self._mask = b""
        self._final = True
        self._message = 0  # opcode of the message that is arriving, 0 between messages
        self._text = codecs.getincrementaldecoder("utf-8")()

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """(opcode, payload): _BINARY for a piece of the stream, or a whole control frame. Raises ProtocolError."""
        self._buffer += data
        while True:
            if self._left:
                if not self._buffer:
                    return
                yield _BINARY, self._payload()
                continue
            head = self._head()
            if head is None:
                return
            opcode, payload = head
            if opcode is not None:
                yield opcode, payload

    def _payload(self) -> bytes:
        masked = bytes(self._buffer[: self._left])
        del self._buffer[: len(masked)]
        self._left -= len(masked)
        data = _unmask(masked, self._mask)
        turn = len(masked) % 4
        self._mask = self._mask[turn:] + self._mask[:turn]
        self._data_came(data)
        return data

    def _data_came(self, data: bytes) -> None:
        ended = not self._left and self._final
        if self._message == _TEXT:
            try:
                self._text.decode(data, ended)
            except UnicodeDecodeError as error:
                raise ProtocolError(NOT_UTF8, "text is not UTF-8") from error
        if ended:
            self._message = 0

    def _head(self) -> tuple[int | None, bytes] | None:
        """Take the head of a frame, and all of a control frame; None until it is there. Opcode None: data follows."""
        buffer = self._buffer
        if len(buffer) < 2:
            return None
        opcode, final, length = buffer[0] & 0x0F, bool(buffer[0] & 0x80), buffer[1] & 0x7F
        if buffer[0] & 0x70:
            raise ProtocolError(PROTOCOL_ERROR, "reserved bits are set")
        if not buffer[1] & 0x80:
            raise ProtocolError(PROTOCOL_ERROR, "a frame of a client is not masked")
        if opcode >= _CLOSE and (not final or length > 125):
            raise ProtocolError(PROTOCOL_ERROR, "a control frame is fragmented or too long")
        self._check_opcode(opcode)
        extra = {126: 2, 127: 8}.get(length, 0)
        start = 2 + extra + 4
        if len(buffer) < start:
            return None
        if extra:
            length = int.from_bytes(buffer[2 : 2 + extra], "big")
            if length < (126 if extra == 2 else 1 << 16) or length >> 63:
                raise ProtocolError(PROTOCOL_ERROR, "a length is not in its shortest form")
        mask = bytes(buffer[start - 4 : start])
        if opcode >= _CLOSE:
            if len(buffer) < start + length:
                return None
            payload = _unmask(bytes(buffer[start : start + length]), mask)
            del buffer[: start + length]
            return opcode, payload
        del buffer[:start]
        self._left, self._mask, self._final = length, mask, final
        self._message = self._message or opcode
        if not length:
            self._data_came(b"")
        return None, b""

    def _check_opcode(self, opcode: int) -> None:
        if opcode not in (_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING, _PONG):
            raise ProtocolError(PROTOCOL_ERROR, f"opcode {opcode} is not defined")
        if opcode < _CLOSE and (opcode == _CONTINUATION) != bool(self._message):
            raise ProtocolError(PROTOCOL_ERROR, "a message begins or goes on in the wrong place")


def _unmask(data: bytes, mask: bytes) -> bytes:
    if not data:
        return b""
    key = (mask * (len(data) // 4 + 1))[: len(data)]
    return (int.from_bytes(data, "big") ^ int.from_bytes(key, "big")).to_bytes(len(data), "big")


def frame(opcode: int, payload: bytes) -> bytes:
    """A whole, unmasked frame."""
    size = len(payload)
    if size < 126:
        return bytes((0x80 | opcode, size)) + payload
    if size < 1 << 16:
        return bytes((0x80 | opcode, 126)) + size.to_bytes(2, "big") + payload
    return bytes((0x80 | opcode, 127)) + size.to_bytes(8, "big") + payload


def close_answer(payload: bytes) -> bytes:
    """The payload of our answer to a Close: its code when that is a code, else a protocol error (7.4)."""
    if not payload:
        return b""
    code = int.from_bytes(payload[:2], "big")
    if len(payload) == 1 or not (code in _CODES or 3000 <= code < 5000):
        return PROTOCOL_ERROR.to_bytes(2, "big")
    try:
        payload[2:].decode()
    except UnicodeDecodeError:
        return NOT_UTF8.to_bytes(2, "big")
    return payload[:2]


class Bridge:
    """Joins a client that has had its handshake to the stream socket `inner`, until either ends. Blocks; closes neither."""

    def __init__(self, client: socket.socket, inner: socket.socket, pending: bytes) -> None:
        """pending: what the client has sent after its handshake already."""
        self._client, self._inner = client, inner
        self._decoder = Decoder()
        self._to_client, self._to_inner = bytearray(), bytearray()
        self._closing_since = 0.0  # our Close is sent or in the buffer
        self._client_closed = False  # its Close has come, or its end
        self._inner_ended = False
        self._pending = pending

    def run(self) -> None:
        self._client.setblocking(False)
        self._inner.setblocking(False)
        try:
            self._came(self._pending)
            while not self._done():
                self._turn()
        except OSError:  # a side is gone
            pass
        finally:
            self._last_input()

    def _last_input(self) -> None:
        """What the client had sent before it ended still arrives."""
        self._inner.settimeout(_CLOSE_S)
        try:
            self._inner.sendall(self._to_inner)
        except OSError:  # the instance has ended, or does not read: nobody is left to be told
            pass

    def _done(self) -> bool:
        if not self._closing_since:
            return False
        late = time.monotonic() > self._closing_since + _CLOSE_S
        return late or (self._client_closed and not self._to_client)

    def _turn(self) -> None:
        poll = select.poll()
        wanted = select.POLLIN if not self._client_closed and len(self._to_inner) < _FULL else 0
        poll.register(self._client, wanted | (select.POLLOUT if self._to_client else 0))
        wanted = select.POLLIN if not self._closing_since and len(self._to_client) < _FULL else 0
        wanted |= select.POLLOUT if self._to_inner else 0
        if wanted:
            poll.register(self._inner, wanted)
        ready = dict(poll.poll(_CLOSE_S * 1000 if self._closing_since else None))
        events = ready.get(self._client.fileno(), 0)
        if events & (select.POLLERR | select.POLLNVAL):
            raise ConnectionResetError
        if events & select.POLLOUT:
            _send(self._client, self._to_client)
        if events & select.POLLIN:
            self._read_client()
        elif events & select.POLLHUP:
            raise ConnectionResetError
        self._serve_inner(ready.get(self._inner.fileno(), 0))

    def _read_client(self) -> None:
        data = self._client.recv(_CHUNK)
        if not data:
            raise ConnectionResetError
        self._came(data)

    def _serve_inner(self, events: int) -> None:
        if events & select.POLLOUT:
            try:
                _send(self._inner, self._to_inner)
            except OSError:  # it takes no more input, but may still say something
                self._to_inner.clear()
        if events & (select.POLLIN | select.POLLHUP | select.POLLERR) and not self._closing_since:
            data = self._inner.recv(_CHUNK)
            if data:
                self._to_client += frame(_BINARY, data)
            else:
                self._inner_ended = True
                self._close(NORMAL.to_bytes(2, "big"))

    def _came(self, data: bytes) -> None:
        try:
            for opcode, payload in self._decoder.feed(data):
                if opcode == _CLOSE:
                    self._client_closed = True
                    self._close(close_answer(payload))
                    return
                if opcode == _PING and len(self._to_client) < _FULL:
                    self._to_client += frame(_PONG, payload)
                elif opcode == _BINARY and not self._inner_ended:
                    self._to_inner += payload
        except ProtocolError as error:
            self._client_closed = True  # nothing that it says is understood any more
            self._close(error.code.to_bytes(2, "big") + str(error).encode())

    def _close(self, payload: bytes) -> None:
        if not self._closing_since:
            self._closing_since = time.monotonic()
            self._to_client += frame(_CLOSE, payload)


def _send(sock: socket.socket, data: bytearray) -> None:
    """Take off `data` what goes now."""
    try:
        del data[: sock.send(data)]
    except BlockingIOError:
        pass
