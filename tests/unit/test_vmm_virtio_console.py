"""The agent's channel: what a driver and the other end of the socket see of each other."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import pytest

from hyper.vmm.virtio import registers as reg
from hyper.vmm.virtio.console import FROM_DRIVER, FROM_GUEST, TO_DRIVER, TO_GUEST, Console
from tests.virtiokit import Buffers, Driver

READY, ADD, PORT_READY, OPEN, NAME = 0, 1, 3, 6, 7


class Guest(Driver):
    """With the control messages of a driver."""

    def __init__(self) -> None:
        self.ours, theirs = socket.socketpair()
        self.ours.setblocking(False)
        super().__init__(Console(theirs.detach(), "ambi.agent"))
        self.control: list[Buffers] = []
        self.buffers: list[Buffers] = []

    def begin(self) -> Guest:
        self.start()
        for _ in range(8):
            self.control.append(self.writable(64))
            self.rings[TO_DRIVER].add([self.control[-1]])
        self.kick(TO_DRIVER)
        return self

    def say(self, event: int, value: int, port: int = 1) -> None:
        self.rings[FROM_DRIVER].add([self.readable(struct.pack("<IHH", port, event, value))])
        self.kick(FROM_DRIVER)

    def told(self) -> list[tuple[int, int, int, bytes]]:
        """The control messages that came, whose buffers are offered again."""
        found = []
        for _, written in self.rings[TO_DRIVER].got():
            piece = self.control.pop(0)
            raw = self.bytes(piece, written)
            found.append((*struct.unpack_from("<IHH", raw), raw[8:]))
            self.control.append(piece)
            self.rings[TO_DRIVER].add([piece])
        self.kick(TO_DRIVER)
        return found

    def opened(self) -> Guest:
        self.begin().say(READY, 1, 0xFFFFFFFF)
        self.say(PORT_READY, 1)
        self.say(OPEN, 1)
        self.told()
        return self

    def offer(self, count: int, length: int = 16) -> None:
        for _ in range(count):
            self.buffers.append(self.writable(length))
            self.rings[TO_GUEST].add([self.buffers[-1]])
        self.kick(TO_GUEST)

    def received(self) -> bytes:
        return b"".join(self.bytes(self.buffers.pop(0), written) for _, written in self.rings[TO_GUEST].got())

    def send(self, data: bytes) -> None:
        self.rings[FROM_GUEST].add([self.readable(data)])
        self.kick(FROM_GUEST)

    def heard(self) -> bytes:
        data = b""
        try:
            while piece := self.ours.recv(65536):
                data += piece
                self.turn()
        except BlockingIOError:
            pass
        return data

    def close(self) -> None:
        super().close()
        self.ours.close()


@pytest.fixture
def guest() -> Iterator[Guest]:
    made = Guest()
    yield made
    made.close()


def test_port_is_announced(guest: Guest) -> None:
    guest.begin()
    assert guest.config(4, 4) == 2
    assert guest.told() == []
    guest.say(READY, 1, 0xFFFFFFFF)
    assert guest.told() == [(1, ADD, 1, b"")]
    guest.say(PORT_READY, 1)
    assert guest.told() == [(1, NAME, 1, b"ambi.agent"), (1, OPEN, 1, b"")]


def test_bytes_both_ways(guest: Guest) -> None:
    guest.opened().offer(4)
    guest.ours.send(b"a message that fills more than one buffer")
    guest.turn()
    assert guest.received() == b"a message that fills more than one buffer"
    assert guest.interrupted()
    guest.offer(1)
    guest.ours.send(b"more")
    guest.turn()
    assert guest.received() == b"more"
    guest.rings[FROM_GUEST].add([guest.readable(b"an "), guest.readable(b"answer")])
    guest.kick(FROM_GUEST)
    assert guest.heard() == b"an answer"
    assert guest.device.counters() == {"requests": 5, "bytes": 54, "errors": 0}


def test_nothing_is_read_before_the_port_is_open(guest: Guest) -> None:
    guest.begin().offer(2)
    guest.ours.send(b"early")
    guest.turn()
    assert guest.received() == b""
    guest.say(OPEN, 1)
    assert guest.received() == b"early"
    guest.say(OPEN, 0)
    guest.ours.send(b"closed")
    guest.turn()
    assert guest.received() == b""
    guest.say(OPEN, 1)
    assert guest.received() == b"closed"


def test_a_guest_that_does_not_read_stops_the_host(guest: Guest) -> None:
    guest.opened().offer(1)
    sent = b""
    try:
        while True:
            piece = bytes([len(sent) // 4096 % 256]) * 4096
            sent += piece[: guest.ours.send(piece)]
            guest.turn()
    except BlockingIOError:
        pass
    assert len(sent) < 1 << 22, "the device reads more than it has buffers for"
    got = guest.received()
    assert len(got) == 16
    while len(got) < len(sent):
        guest.offer(16, 4096)
        got += guest.received()
    assert got == sent


def test_a_host_that_does_not_read_stops_the_guest(guest: Guest) -> None:
    guest.opened()
    sent = bytearray()
    used = 0
    for number in range(64):  # as many as the ring has
        piece = bytes([number]) * 8000
        guest.send(piece)
        sent += piece
        used += len(guest.rings[FROM_GUEST].got())
    assert 0 < used < 64, "the device takes what it cannot send"
    assert guest.heard() == bytes(sent)
    used += len(guest.rings[FROM_GUEST].got())
    assert used == 64


def test_host_goes_and_another_comes(guest: Guest) -> None:
    guest.opened().offer(2)
    guest.ours.close()
    guest.turn()
    assert guest.told() == [(1, OPEN, 0, b"")]
    guest.send(b"to nobody")
    assert len(guest.rings[FROM_GUEST].got()) == 1, "its writer hangs"
    guest.ours, theirs = socket.socketpair()
    guest.ours.setblocking(False)
    console = guest.device
    assert isinstance(console, Console)
    guest.transport.run(lambda: console.connect(theirs.detach()))
    assert guest.told() == [(1, OPEN, 1, b"")]
    guest.ours.send(b"new")
    guest.turn()
    assert guest.received() == b"new"
    guest.send(b"to somebody")
    assert guest.heard() == b"to somebody"


def test_host_goes_while_the_guest_writes(guest: Guest) -> None:
    guest.opened()
    for _ in range(64):
        guest.send(b"x" * 8000)
    guest.ours.close()
    guest.turn()
    assert len(guest.rings[FROM_GUEST].got()) == 64


def test_reset_in_mid_flight(guest: Guest) -> None:
    guest.opened().offer(2)
    for _ in range(64):
        guest.send(b"x" * 8000)
    guest.reset()
    heard = guest.heard()
    assert set(heard) == {ord("x")}
    guest.ours.send(b"kept")
    guest.turn()
    guest.control, guest.buffers = [], []
    guest.opened().offer(2)
    guest.turn()
    assert guest.received() == b"kept"
    guest.send(b"fresh")
    assert guest.heard() == b"fresh"


@pytest.mark.parametrize("length", [1, 7])
def test_short_control_message(guest: Guest, length: int) -> None:
    guest.begin()
    guest.rings[FROM_DRIVER].add([guest.readable(bytes(length))])
    guest.kick(FROM_DRIVER)
    assert "8 are needed" in guest.transport.failure


def test_flood_of_control_messages(guest: Guest) -> None:
    """A driver that asks and does not take the answers is stopped; unknown events and ports are counted alone."""
    guest.start()
    guest.say(77, 1)
    guest.say(PORT_READY, 1, port=9)
    assert guest.device.counters()["errors"] == 1
    for _ in range(65):
        guest.say(READY, 1)
    assert "64 control messages" in guest.transport.failure
    assert guest.read(reg.STATUS) & reg.NEEDS_RESET


def test_receive_buffer_that_cannot_be_written(guest: Guest) -> None:
    guest.opened()
    guest.rings[TO_GUEST].add([guest.readable(b"x")])
    guest.kick(TO_GUEST)
    guest.ours.send(b"y")
    guest.turn()
    assert "cannot be written" in guest.transport.failure


def test_saved_with_bytes_on_the_way(guest: Guest) -> None:
    guest.opened().offer(1)
    sent = b""
    for number in range(64):
        sent += bytes([number]) * 8000
        guest.send(bytes([number]) * 8000)
    state = guest.transport.save()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    other = Guest.__new__(Guest)
    Driver.__init__(other, Console(theirs.detach(), "ambi.agent"), ram=guest.backing)
    other.rings, other.ours, other.buffers, other.features = guest.rings, ours, guest.buffers, guest.features
    first = b""
    try:
        while True:
            first += guest.ours.recv(65536)
    except BlockingIOError:
        pass
    other.transport.restore(state)
    other.transport.resume()
    other.turn()
    assert first + other.heard() == sent
    ours.send(b"back")
    other.turn()
    assert other.received() == b"back"
    other.close()
