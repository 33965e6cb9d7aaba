"""NICs without vhost: frames between a driver and a wire, which is a pair of datagram sockets where a tap would be."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

import pytest

from hyper.vmm.virtio import registers as reg
from hyper.vmm.virtio.net import F_GUEST_CSUM, F_GUEST_TSO4, F_MAC, F_MRG_RXBUF, MAX_FRAME, RECEIVE, TRANSMIT, Net
from hyper.vmm.virtio.tap import Tap
from tests.virtiokit import F_VERSION_1, Driver

MAC = bytes.fromhex("02ab00000001")
HEADER = bytes(12)


class Wire(Tap):
    """What is written comes out at `far`, a frame a datagram."""

    def __init__(self) -> None:
        self.far, near = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.far.setblocking(False)
        near.setblocking(False)
        self.fd = near.detach()
        self.offloads: dict[str, bool] = {}

    def offload(self, **offloads: bool) -> None:
        self.offloads = offloads


class Guest(Driver):
    def __init__(self) -> None:
        self.wire = Wire()
        super().__init__(Net(self.wire, MAC))

    def offer(self, count: int, length: int) -> None:
        self.buffers = getattr(self, "buffers", {})
        for _ in range(count):
            piece = self.writable(length)
            self.buffers[self.rings[RECEIVE].add([piece])] = piece
        self.kick(RECEIVE)

    def frame(self, content: bytes) -> None:
        self.wire.far.send(HEADER + content)
        self.turn()

    def received(self) -> list[bytes]:
        """Frames as a driver puts them together: num_buffers says of how many buffers each is made."""
        used = self.rings[RECEIVE].got()
        frames = []
        while used:
            head, written = used.pop(0)
            raw = self.bytes(self.buffers[head], written)
            for _ in range(struct.unpack_from("<H", raw, 10)[0] - 1):
                head, written = used.pop(0)
                raw += self.bytes(self.buffers[head], written)
            frames.append(raw[12:])
        return frames

    def send(self, *pieces: bytes) -> None:
        self.rings[TRANSMIT].add([self.readable(piece) for piece in pieces])
        self.kick(TRANSMIT)

    def close(self) -> None:
        super().close()
        self.wire.far.close()


@pytest.fixture
def guest() -> Iterator[Guest]:
    made = Guest()
    yield made
    made.close()


def test_configuration(guest: Guest) -> None:
    assert guest.page[reg.CONFIG : reg.CONFIG + 6].tobytes() == MAC and guest.config(8, 2) == 1
    assert guest.offered() & F_MAC
    guest.start()
    assert guest.wire.offloads == {"checksum": True, "tso4": True, "tso6": True, "ecn": True}
    guest.reset()
    guest.start(F_VERSION_1 | F_GUEST_CSUM | F_GUEST_TSO4)
    assert guest.wire.offloads == {"checksum": True, "tso4": True, "tso6": False, "ecn": False}


def test_frames_from_the_guest(guest: Guest) -> None:
    guest.start()
    guest.send(HEADER, b"frame one")
    guest.send(HEADER[:5], HEADER[5:] + b"fra", b"me two")
    assert [guest.wire.far.recv(100)[12:] for _ in range(2)] == [b"frame one", b"frame two"]
    assert len(guest.rings[TRANSMIT].got()) == 2 and guest.interrupted()
    assert guest.device.counters() == {"requests": 2, "bytes": 18, "errors": 0}


def test_frames_to_the_guest(guest: Guest) -> None:
    guest.start()
    guest.frame(b"nobody offers room yet")
    assert guest.received() == []
    guest.offer(60, 1536)
    assert guest.received() == [b"nobody offers room yet"] and guest.interrupted()
    big = os.urandom(20000)
    guest.frame(b"small")
    guest.frame(big)
    guest.frame(b"after")
    assert guest.received() == [b"small", big, b"after"]


def test_frame_larger_than_the_buffers_waits_for_more(guest: Guest) -> None:
    guest.start()
    guest.offer(3, 1536)
    big = os.urandom(30000)
    guest.frame(big)
    guest.frame(b"next")
    assert guest.received() == []
    guest.offer(10, 1536)
    assert guest.received() == []
    guest.offer(10, 1536)
    assert guest.received() == [big, b"next"]


def test_frame_larger_than_the_ring_is_lost(guest: Guest) -> None:
    guest.start(size=4)
    guest.offer(4, 1536)
    guest.frame(os.urandom(30000))
    guest.frame(b"next")
    assert guest.received() == [b"next"]
    assert guest.device.counters()["errors"] == 1


def test_without_merging(guest: Guest) -> None:
    guest.start(guest.offered() & ~F_MRG_RXBUF)
    guest.offer(2, MAX_FRAME)
    guest.offer(2, 1536)
    big = os.urandom(40000)
    for content in (big, b"one", os.urandom(5000), b"two"):
        guest.frame(content)
    assert guest.received() == [big, b"one", b"two"], "what is larger than its buffer is lost"
    assert guest.device.counters()["errors"] == 1


def test_header_over_small_pieces(guest: Guest) -> None:
    guest.start()
    pieces = [guest.writable(size) for size in (3, 8, 1, 600)]
    guest.rings[RECEIVE].add(pieces)
    guest.kick(RECEIVE)
    guest.frame(b"spread")
    _, written = guest.rings[RECEIVE].got()[0]
    raw = b"".join(map(guest.bytes, pieces))[:written]
    assert raw[:10] == bytes(10) and raw[10:12] == b"\1\0" and raw[12:] == b"spread"


def test_wire_that_takes_nothing(guest: Guest) -> None:
    guest.start()
    guest.wire.far.close()
    guest.send(HEADER, b"lost")
    assert len(guest.rings[TRANSMIT].got()) == 1
    assert guest.device.counters()["errors"] == 1 and not guest.transport.failure


@pytest.mark.parametrize("content", [b"", b"x" * 11])
def test_frame_without_header(guest: Guest, content: bytes) -> None:
    guest.start()
    guest.send(content or b"y")
    assert "less than its header" in guest.transport.failure


def test_frame_of_a_megabyte_is_lost(guest: Guest) -> None:
    guest.start()
    piece = guest.readable(bytes(100000))
    guest.rings[TRANSMIT].add([piece])
    guest.kick(TRANSMIT)
    assert guest.device.counters()["errors"] == 1 and len(guest.rings[TRANSMIT].got()) == 1


def test_receive_buffer_too_small(guest: Guest) -> None:
    guest.start()
    guest.offer(1, 11)
    guest.frame(b"x")
    assert "too small" in guest.transport.failure


def test_reset_gives_buffers_back(guest: Guest) -> None:
    guest.start()
    guest.offer(60, 1536)
    guest.frame(b"before")
    assert guest.received() == [b"before"]
    memory = bytes(guest.backing)
    guest.write(reg.STATUS, 0)
    guest.frame(b"in between")
    assert bytes(guest.backing) == memory
    guest.rings = []
    guest.start()
    guest.offer(60, 1536)
    assert guest.received() == [b"in between"]


def test_save_and_restore(guest: Guest) -> None:
    guest.start()
    guest.offer(60, 1536)
    guest.frame(b"one")
    state = guest.transport.save()
    other = Guest.__new__(Guest)
    other.wire = Wire()
    Driver.__init__(other, Net(other.wire, MAC), ram=guest.backing)
    other.rings, other.features, other.buffers = guest.rings, guest.features, guest.buffers
    other.transport.restore(state)
    other.transport.resume()
    other.turn()
    other.frame(b"two")
    assert other.received() == [b"one", b"two"]
    other.send(HEADER, b"three")
    assert other.wire.far.recv(100)[12:] == b"three"
    other.close()


def test_a_tap_that_comes_later() -> None:
    """What a machine from a template does: its NIC is up before there is a wire."""
    guest = Guest.__new__(Guest)
    guest.wire = Wire()
    net = Net(None, MAC)
    Driver.__init__(guest, net)
    guest.start()
    guest.offer(60, 1536)
    guest.send(HEADER, b"to nowhere")
    assert len(guest.rings[TRANSMIT].got()) == 1
    guest.transport.run(lambda: net.attach(guest.wire))
    assert guest.wire.offloads["tso4"]
    guest.frame(b"hello")
    guest.send(HEADER, b"answer")
    assert guest.received() == [b"hello"] and guest.wire.far.recv(100)[12:] == b"answer"
    with pytest.raises(ValueError, match="has a tap"):
        net.attach(guest.wire)
    guest.close()
