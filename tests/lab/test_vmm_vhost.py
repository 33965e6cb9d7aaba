"""The kernel's back-ends without a guest: a driver of the test's in memory of ours, on /dev/vhost-vsock."""

from __future__ import annotations

import itertools
import os
import socket
import struct
import time
from collections.abc import Iterator

import pytest

from ambi.core.deadline import Deadline
from hyper.kvm.memory import Memory
from hyper.vmm.memory import GuestMemory
from hyper.vmm.virtio import registers as reg
from hyper.vmm.virtio.vhost import Vhost
from hyper.vmm.virtio.vsock import EVENTS, RECEIVE, TRANSMIT, Vsock
from tests.virtiokit import RAM, Buffers, Driver

CID, HOST_CID, PORT = 4242, 2, 9000
HEADER = struct.Struct("<QQIIIHHIII")  # struct virtio_vsock_hdr
REQUEST, RESPONSE, RST, DATA_OP = 1, 2, 3, 5
STREAM = 1
BUFFER = 4096


PORTS = itertools.count(7)  # of the guest's: the kernel remembers for some seconds a connection that it closed


class Guest(Driver):
    port = 0

    def __init__(self, memory: Memory) -> None:
        super().__init__(Vsock(Vhost(os.open("/dev/vhost-vsock", os.O_RDWR)), CID), memory=GuestMemory([(RAM, memory)]))
        self.begin()

    def begin(self) -> None:
        self.start()
        self.buffers: dict[int, Buffers] = {}
        for _ in range(8):
            piece = self.writable(BUFFER)
            self.buffers[self.rings[RECEIVE].add([piece])] = piece
        self.write(reg.QUEUE_NOTIFY, RECEIVE)

    def send(self, operation: int, payload: bytes = b"") -> None:
        header = HEADER.pack(CID, HOST_CID, self.port, PORT, len(payload), STREAM, operation, 0, 65536, 0)
        self.rings[TRANSMIT].add([self.readable(header + payload)])
        self.write(reg.QUEUE_NOTIFY, TRANSMIT)

    def received(self, operation: int) -> bytes:
        """The payload of the next packet of this kind; the kernel's thread brings it."""
        by = Deadline.after(30)
        while True:
            for head, written in self.rings[RECEIVE].got():
                raw = self.bytes(self.buffers[head], written)
                if HEADER.unpack_from(raw)[6] == operation:
                    return raw[HEADER.size :]
            by.check(f"a packet of kind {operation}")
            time.sleep(0.02)


@pytest.fixture
def guest() -> Iterator[Guest]:
    with Memory(1 << 20) as memory:
        made = Guest(memory)
        yield made
        made.close()
        del made


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as made:
        made.bind((socket.VMADDR_CID_ANY, PORT))
        made.listen(1)
        made.settimeout(30)
        yield made


def connected(guest: Guest, listener: socket.socket) -> socket.socket:
    guest.port = next(PORTS)
    guest.send(REQUEST)
    assert guest.received(RESPONSE) == b""
    connection, _ = listener.accept()
    connection.settimeout(30)
    return connection


def test_bytes_pass_by_the_kernel(guest: Guest, listener: socket.socket) -> None:
    assert guest.config(0, 8) == CID
    writes = guest.transport.writes
    with connected(guest, listener) as connection:
        guest.send(DATA_OP, b"from the guest")
        assert connection.recv(100) == b"from the guest"
        connection.send(b"to the guest")
        assert guest.received(DATA_OP) == b"to the guest"
    assert guest.interrupted() and guest.transport.writes == writes
    assert guest.device.counters()["requests"] == 0


def test_saved_and_resumed(guest: Guest, listener: socket.socket) -> None:
    """The indices come back from the kernel, and it goes on where it stopped."""
    with connected(guest, listener) as connection:
        guest.send(DATA_OP, b"one")
        assert connection.recv(100) == b"one"
        state = guest.transport.save()
        queues = state["queues"]
        assert isinstance(queues, list) and queues[TRANSMIT]["indices"] == {"next": 2, "used": 2}
        guest.send(DATA_OP, b"two")
        connection.settimeout(0.5)
        with pytest.raises(TimeoutError):
            connection.recv(100)
        connection.settimeout(30)
        guest.transport.resume()
        assert connection.recv(100) == b"two"


def test_restored_guest_learns_that_its_connections_are_gone(guest: Guest) -> None:
    event = guest.writable(4)
    guest.memory.write(event.address, b"\xff" * 4)
    guest.rings[EVENTS].add([event])
    state = guest.transport.save()
    guest.transport.restore(state)
    guest.transport.resume()
    guest.turn()
    assert guest.rings[EVENTS].got() == [(0, 4)] and guest.bytes(event) == bytes(4)


def test_reset_stops_the_kernel(guest: Guest, listener: socket.socket) -> None:
    with connected(guest, listener) as connection:
        guest.write(reg.STATUS, 0)
        memory = guest.memory.read(RAM, 1 << 20)
        try:
            connection.send(b"late")
        except OSError:  # the connection went with its guest
            pass
        time.sleep(0.2)
        assert guest.memory.read(RAM, 1 << 20) == memory
    guest.rings = []
    guest.begin()
    connected(guest, listener).close()


@pytest.mark.parametrize("index", [TRANSMIT])  # of the other one not every kernel complains
def test_damaged_ring(guest: Guest, listener: socket.socket, index: int) -> None:
    """What the kernel finds damaged stops the device, like what we find ourselves."""
    connection = connected(guest, listener) if index == RECEIVE else None
    ring = guest.rings[index]
    guest.memory.put_u16(ring.driver + 2, (ring.available + 1000) & 0xFFFF)
    guest.write(reg.QUEUE_NOTIFY, index)
    if connection is not None:
        connection.send(b"what has the kernel look at the ring")
    by = Deadline.after(30)
    while not guest.read(reg.STATUS) & reg.NEEDS_RESET:
        by.check("the kernel's complaint")
        guest.turn()
        time.sleep(0.02)
    assert "kernel's back-end" in guest.transport.failure
    if connection is not None:
        connection.close()
    guest.reset()
    guest.begin()
    connected(guest, listener).close()


def test_number_in_use(guest: Guest) -> None:
    vhost = Vhost(os.open("/dev/vhost-vsock", os.O_RDWR))
    with pytest.raises(OSError, match="in use"):
        Vsock(vhost, CID)
    vhost.close()


def test_no_back_end() -> None:
    with open("/dev/null", "rb") as file, pytest.raises(OSError):
        Vhost(file.fileno())
