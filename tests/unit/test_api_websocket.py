"""Websockets from the server's side: handshake, frames in every cut, what breaks the protocol, and the bridge."""

from __future__ import annotations

import os
import random
import socket
import threading
from collections.abc import Iterator

import pytest

from ambi.api.websocket import Bridge, Decoder, ProtocolError, close_answer, frame, switch
from ambi.core.errors import InvalidRequest
from tests.fuzz.mutate import mutated

GOOD = {
    "connection": "keep-alive, Upgrade", "upgrade": "websocket", "sec-websocket-version": "13",
    "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
}  # fmt: skip
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


def sent(opcode: int, payload: bytes, *, final: bool = True, mask: bytes = b"\x37\xfa\x21\x3d") -> bytes:
    """A frame as a client sends it."""
    plain = bytearray(frame(opcode, b"x" * len(payload))[: -len(payload) or None])
    plain[0] = (0x80 if final else 0) | opcode
    plain[1] |= 0x80
    return bytes(plain) + mask + bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))


def decoded(data: bytes, *, step: int = 1 << 20) -> list[tuple[int, bytes]]:
    """Whole, with pieces of the stream joined that follow one another."""
    decoder, found = Decoder(), list[tuple[int, bytes]]()
    for start in range(0, len(data), step):
        for opcode, payload in decoder.feed(data[start : start + step]):
            if opcode == BINARY and found and found[-1][0] == BINARY:
                found[-1] = (BINARY, found[-1][1] + payload)
            else:
                found.append((opcode, payload))
    return found


def test_the_handshake_of_the_standard() -> None:
    assert b"\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n" in switch(GOOD)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("connection", "close"),
        ("upgrade", "tcp"),
        ("sec-websocket-version", "8"),
        ("sec-websocket-key", "short"),
        ("sec-websocket-key", "dGhlIHNhbXBsZQ=="),
    ],
)
def test_no_handshake(name: str, value: str) -> None:
    for headers in ({**GOOD, name: value}, {k: v for k, v in GOOD.items() if k != name}):
        with pytest.raises(InvalidRequest, match="websocket"):
            switch(headers)


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536, 200_000])
def test_frames_of_every_size(size: int) -> None:
    payload = random.Random(size).randbytes(size)
    expected = [(BINARY, payload)] if size else []
    for step in (1, 7, 4096, 1 << 20) if size < 1000 else (4093, 1 << 20):
        assert decoded(sent(BINARY, payload), step=step) == expected
    head = frame(BINARY, payload)
    assert head.endswith(payload) and len(head) - size == (2 if size < 126 else 4 if size < 65536 else 10)


def test_fragments_with_a_ping_between() -> None:
    text = "héllo".encode()
    data = sent(TEXT, text[:2], final=False) + sent(PING, b"?") + sent(0, text[2:], final=False) + sent(0, b"")
    for step in (1, 3, 100):
        assert decoded(data, step=step) == [(BINARY, text[:2]), (PING, b"?"), (BINARY, text[2:])]
    assert decoded(data + sent(CLOSE, b"\x03\xe8bye"))[-1] == (CLOSE, b"\x03\xe8bye")


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\x82\x01x", 1002),  # not masked
        (b"\xc2\x80" + bytes(4), 1002),  # a reserved bit
        (b"\x83\x80" + bytes(4), 1002),  # an opcode that is not defined
        (b"\x8b\x80" + bytes(4), 1002),
        (sent(0, b"x"), 1002),  # goes on where nothing began
        (sent(TEXT, b"x", final=False) + sent(TEXT, b"y"), 1002),
        (sent(PING, b"", final=False), 1002),
        (b"\x89\xfe\x00\x7e" + bytes(4 + 126), 1002),  # a long control frame
        (b"\x82\xfe\x00\x7d" + bytes(4), 1002),  # a length that is longer than it need be
        (b"\x82\xff" + (65535).to_bytes(8, "big") + bytes(4), 1002),
        (b"\x82\xff" + (1 << 63).to_bytes(8, "big") + bytes(4), 1002),
        (sent(TEXT, b"\xff"), 1007),
        (sent(TEXT, b"\xc3"), 1007),  # cut short
        (sent(TEXT, b"\xed\xa0\x80"), 1007),  # a surrogate
    ],
)
def test_what_breaks_the_protocol(data: bytes, code: int) -> None:
    with pytest.raises(ProtocolError) as caught:
        decoded(data)
    assert caught.value.code == code


def test_answers_to_close() -> None:
    for code in (1000, 1011, 3000, 4999):
        assert close_answer(code.to_bytes(2, "big") + b"why") == code.to_bytes(2, "big")
    for payload in (b"\x03", b"\0\0", b"\x03\xec", b"\x03\xed", b"\x13\x88", b"\xff\xff"):
        assert close_answer(payload) == b"\x03\xea"
    assert close_answer(b"\x03\xe8\xff") == b"\x03\xef"
    assert close_answer(b"") == b""


def test_damaged_frames_raise_only_what_they_should() -> None:
    good = [
        sent(TEXT, b"hello"),
        sent(BINARY, bytes(300)),
        sent(PING, b"x") + sent(CLOSE, b"\x03\xe8"),
        sent(TEXT, b"a", final=False),
    ]
    broken = 0
    for seed in range(10_000):
        try:
            decoded(mutated(good, seed), step=50)
        except ProtocolError:
            broken += 1
    assert 1_000 < broken < 10_000


class Ends:
    """A bridge in a thread, with the far ends of its two sockets."""

    def __init__(self, pending: bytes = b"") -> None:
        self.client, near = socket.socketpair()
        self.inner, inner = socket.socketpair()
        self._near = (near, inner)
        for sock in (self.client, self.inner):
            sock.settimeout(10)
        self._thread = threading.Thread(target=self._run, args=(Bridge(near, inner, pending),))
        self._thread.start()

    def _run(self, bridge: Bridge) -> None:
        bridge.run()
        for sock in self._near:
            sock.close()

    def rest(self, sock: socket.socket) -> bytes:
        return b"".join(iter(lambda: sock.recv(1 << 16), b""))

    def close(self) -> None:
        self.client.close()
        self.inner.close()
        self._thread.join(10)
        assert not self._thread.is_alive()


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.close()


def test_bytes_both_ways_and_a_close_by_the_client(ends: Ends) -> None:
    ends.client.sendall(sent(TEXT, b"in") + sent(PING, b"p"))
    assert ends.inner.recv(10) == b"in"
    assert ends.client.recv(100) == frame(PONG, b"p")
    ends.inner.sendall(b"out")
    assert ends.client.recv(100) == frame(BINARY, b"out")
    ends.client.sendall(sent(BINARY, b"last") + sent(CLOSE, b"\x03\xe9gone"))
    assert ends.rest(ends.inner) == b"last"
    assert ends.rest(ends.client) == frame(CLOSE, b"\x03\xe9")


def test_the_end_of_the_stream_is_a_close(ends: Ends) -> None:
    ends.inner.sendall(b"bye")
    ends.inner.shutdown(socket.SHUT_WR)
    assert ends.client.recv(5) == frame(BINARY, b"bye")
    assert ends.client.recv(100) == frame(CLOSE, b"\x03\xe8")
    ends.client.sendall(sent(CLOSE, b"\x03\xe8"))
    assert ends.rest(ends.client) == b""


def test_a_broken_frame_is_told(ends: Ends) -> None:
    ends.client.sendall(b"\x82\x01x")
    assert ends.rest(ends.client)[:4] in (b"\x88" + bytes((n,)) + b"\x03\xea" for n in range(126))
    assert ends.rest(ends.inner) == b""


def test_a_client_that_vanishes_has_its_input_delivered(ends: Ends) -> None:
    ends.client.sendall(sent(BINARY, b"x" * 1000))
    ends.client.close()
    assert ends.rest(ends.inner) == b"x" * 1000


def test_what_came_with_the_handshake_is_not_lost() -> None:
    ends = Ends(sent(BINARY, b"early"))
    assert ends.inner.recv(10) == b"early"
    ends.close()


def test_much_in_both_directions(ends: Ends) -> None:
    """Neither side reads before it has sent more than fits in between."""
    data = os.urandom(3 << 20)

    def write_client() -> None:
        for start in range(0, len(data), 60_000):
            ends.client.sendall(sent(BINARY, data[start : start + 60_000]))

    threads = [threading.Thread(target=write_client), threading.Thread(target=ends.inner.sendall, args=(data,))]
    got = bytearray()
    for thread in threads:
        thread.start()

    def read_client() -> None:
        whole = bytearray()
        while len(got) < len(data):
            whole += ends.client.recv(1 << 16)
            while (taken := _whole_frame(whole)) is not None:
                got.extend(taken)

    reader = threading.Thread(target=read_client)
    reader.start()
    there = bytearray()
    while len(there) < len(data):
        there += ends.inner.recv(1 << 16)
    for thread in (*threads, reader):
        thread.join()
    assert there == data and got == data


def _whole_frame(buffer: bytearray) -> bytes | None:
    """Take a server's frame off `buffer`."""
    if len(buffer) < 2:
        return None
    extra = {126: 2, 127: 8}.get(buffer[1], 0)
    start = 2 + extra
    size = int.from_bytes(buffer[2:start], "big") if extra else buffer[1]
    if len(buffer) < start or len(buffer) < start + size:
        return None
    payload = bytes(buffer[start : start + size])
    del buffer[: start + size]
    return payload
