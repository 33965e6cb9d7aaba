"""Clients: detach keys, what ATTACH may say, the backlog, and framing over real sockets."""

import os
import random
import socket
from pathlib import Path

import pytest

from ambi.core.deadline import Deadline
from ambi.core.errors import InvalidRequest, StorageFull
from ambi.core.loop import Loop
from ambi.shim import backlog
from ambi.shim.attach import Attach, DetachKeys, Hub
from ambi.shim.backlog import MEMORY_BYTES, Backlog
from ambi.shim.stdio import Input, Output
from tests.shimkit import unframe

CTRL_P_Q = b"\x10\x11"


@pytest.mark.parametrize(
    "keys,typed,passed,detached",
    [
        (CTRL_P_Q, [b"abc"], b"abc", False),
        (CTRL_P_Q, [b"abc\x10\x11def"], b"abc", True),
        (CTRL_P_Q, [b"a\x10", b"\x11b"], b"a", True),
        (CTRL_P_Q, [b"\x10"], b"", False),
        (CTRL_P_Q, [b"\x10", b"x"], b"\x10x", False),
        (CTRL_P_Q, [b"\x10\x10\x11"], b"\x10", True),
        (CTRL_P_Q, [b"\x11\x10"], b"\x11", False),
        (b"aab", [b"aaab"], b"a", True),
        (b"", [b"\x10\x11"], b"\x10\x11", False),
        (b"x", [b"abcx"], b"abc", True),
    ],
)
def test_detach_keys(keys: bytes, typed: list[bytes], passed: bytes, detached: bool) -> None:
    finder, out, found = DetachKeys(keys), b"", False
    for data in typed:
        more, found = finder.feed(data)
        out += more
        if found:
            break
    assert (out, found) == (passed, detached)


def test_attach_from_wire() -> None:
    options = Attach.from_wire({"stdout": True, "detach_keys": [16, 17], "pending": "aGk="})
    assert options == Attach(False, True, False, False, True, False, CTRL_P_Q, b"hi")


@pytest.mark.parametrize(
    "body",
    [
        {"stdin": 1},
        {"detach_keys": [300]},
        {"detach_keys": "ab"},
        {"pending": "!"},
        {"pending": 5},
        {"framed": "yes"},
        {"stream": None},
    ],
)
def test_attach_from_wire_refuses(body: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        Attach.from_wire(body)


def drain(queue: Backlog, generator: random.Random) -> bytes:
    data = bytearray()
    while queue:
        block = queue.peek()
        count = generator.randint(1, len(block))
        data += block[:count]
        queue.consume(count)
    assert queue.peek() == b""
    return bytes(data)


@pytest.mark.parametrize("total", [10, MEMORY_BYTES, MEMORY_BYTES + 1, 3_000_000])
def test_backlog_keeps_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, total: int) -> None:
    monkeypatch.setattr(backlog, "SEGMENT_BYTES", 400_000)
    generator = random.Random(total)
    data = generator.randbytes(total)
    queue, at = Backlog(str(tmp_path)), 0
    while at < total:
        count = generator.randint(1, 100_000)
        queue.push(data[at : at + count])
        at += count
    assert len(queue) == total
    assert bool(queue.descriptors()) == (total > MEMORY_BYTES)
    assert list(tmp_path.iterdir()) == []
    assert drain(queue, generator) == data
    assert queue.descriptors() == [], "what has been sent takes no more disk"


def test_backlog_goes_back_to_memory(tmp_path: Path) -> None:
    queue, generator = Backlog(str(tmp_path)), random.Random(3)
    for _ in range(3):
        queue.push(b"x" * (MEMORY_BYTES + 1))
        queue.push(b"y")
        assert queue.descriptors()
        assert drain(queue, generator) == b"x" * (MEMORY_BYTES + 1) + b"y"
        queue.push(b"z")
        assert not queue.descriptors() and drain(queue, generator) == b"z"


def test_backlog_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backlog, "SPOOL_BYTES", 1_000_000)
    queue = Backlog(str(tmp_path))
    with pytest.raises(StorageFull, match="behind"):
        for _ in range(100):
            queue.push(b"x" * 100_000)
    assert MEMORY_BYTES < len(queue) <= 1_000_000 + MEMORY_BYTES
    queue.close()


def test_backlog_without_a_place(tmp_path: Path) -> None:
    queue = Backlog(str(tmp_path / "gone"))
    queue.push(b"fits")
    with pytest.raises(StorageFull, match="slow client"):
        queue.push(b"x" * MEMORY_BYTES)


def attached(hub: Hub, **flags: object) -> socket.socket:
    ours, theirs = socket.socketpair()
    ours.settimeout(10)
    hub.attach(theirs, Attach.from_wire({"stdout": True, "stderr": True, **flags}))
    return ours


def turn(loop: Loop) -> None:
    loop.step(Deadline.after(0))


def test_each_client_gets_what_it_asked_for(tmp_path: Path) -> None:
    loop = Loop()
    hub = Hub(loop, str(tmp_path), terminal=False, stdin_once=True)
    framed, raw, errors = attached(hub, framed=True), attached(hub), attached(hub, stdout=False, framed=True)
    with framed, raw, errors:
        hub.output(1, b"out")
        hub.output(2, b"err")
        hub.end()
        assert unframe(framed.recv(100)) == {1: b"out", 2: b"err"}
        assert raw.recv(100) == b"outerr"
        assert unframe(errors.recv(100)) == {2: b"err"}
        assert framed.recv(1) == raw.recv(1) == errors.recv(1) == b""
        assert hub.clients == []


def test_a_client_too_far_behind_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backlog, "SPOOL_BYTES", 1_000_000)
    hub = Hub(Loop(), str(tmp_path), terminal=False, stdin_once=True)
    with attached(hub) as sock:
        for _ in range(100):
            hub.output(1, b"x" * 100_000)
        assert hub.clients == []
        got = 0
        while data := sock.recv(1 << 20):
            got += len(data)
        assert 0 < got < 3_000_000


def test_unread_input_does_not_spoil_the_end(tmp_path: Path) -> None:
    """A unix socket closed with unread bytes in it resets its peer."""
    hub = Hub(Loop(), str(tmp_path), terminal=False, stdin_once=True)
    with attached(hub) as sock:
        sock.sendall(b"never read")
        hub.output(1, b"last")
        hub.end()
        assert sock.recv(10) == b"last"
        assert sock.recv(10) == b""


def test_clients_that_come_after_the_end_are_let_go(tmp_path: Path) -> None:
    hub = Hub(Loop(), str(tmp_path), terminal=False, stdin_once=True)
    hub.end()
    with attached(hub) as sock:
        assert sock.recv(1) == b""


def test_a_gone_client_does_not_keep_the_loop_busy(tmp_path: Path) -> None:
    """POLLHUP cannot be masked: a socket that is not to be read now must not be watched at all."""
    loop = Loop()
    hub = Hub(loop, str(tmp_path), terminal=False, stdin_once=True)
    sock = attached(hub, stdin=True)
    sock.sendall(b"typed")
    sock.close()
    for _ in range(3):
        turn(loop)
    assert len(hub.clients) == 1 and not loop._watched
    read, write = os.pipe2(os.O_NONBLOCK)
    hub.open(Input(loop, write))
    while hub.clients:
        turn(loop)
    assert os.read(read, 10) == b"typed"
    assert os.read(read, 10) == b""
    os.close(read)


def test_input_whose_reader_is_gone_is_dropped() -> None:
    loop = Loop()
    read, write = os.pipe2(os.O_NONBLOCK)
    stdin = Input(loop, write)
    os.close(read)
    stdin.write(b"x" * 100_000)
    stdin.write(b"y")
    stdin.end()
    assert not stdin.full and not loop._watched


def test_input_is_fed_as_it_is_taken() -> None:
    loop = Loop()
    read, write = os.pipe2(os.O_NONBLOCK)
    stdin, rooms = Input(loop, write), []
    stdin.on_room = lambda: rooms.append(stdin.full)
    stdin.write(b"x" * 400_000)
    stdin.end()
    assert stdin.full
    got = 0
    while True:
        try:
            data = os.read(read, 1 << 20)
        except BlockingIOError:
            turn(loop)
            continue
        if not data:
            break
        got += len(data)
    assert got == 400_000 and rooms and not any(rooms)
    os.close(read)


def test_output_that_somebody_else_holds_open() -> None:
    loop = Loop()
    read, write = os.pipe2(os.O_NONBLOCK)
    got, ended = bytearray(), []
    output = Output(loop, read, got.extend, lambda: ended.append(True))
    os.write(write, b"x" * 65536)
    output.finish()
    assert len(got) == 65536 and ended == [True] and not output.open
    os.close(write)
