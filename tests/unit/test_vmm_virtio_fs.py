"""File trees, with a vhost-user server of the test's in a thread: it maps the memory that it is given and serves a queue."""

from __future__ import annotations

import mmap
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from hyper.vmm.memory import Buffer, GuestMemory
from hyper.vmm.virtio import registers as reg
from hyper.vmm.virtio.fs import Fs
from hyper.vmm.virtio.queue import Queue, fill
from hyper.vmm.virtio.vhost_user import F_PROTOCOL_FEATURES, VhostUser
from tests.virtiokit import F_VERSION_1, RAM, RAM_BYTES, Driver

FEATURES = F_VERSION_1 | reg.RING_FEATURES | F_PROTOCOL_FEATURES


class Server(threading.Thread):
    """Echoes what queue 1 is given. `asked`: the requests in order; refuses: one whose acknowledgement says no."""

    def __init__(self, sock: socket.socket, features: int = FEATURES, refuses: int = 0) -> None:
        super().__init__(daemon=True)
        self.sock, self.features, self.refuses = sock, features, refuses
        self.asked: list[int] = []
        self.rings: dict[int, dict[int, bytes]] = {0: {}, 1: {}}
        self.kick = self.call = -1
        self.queue: Queue | None = None
        self.worker: threading.Thread | None = None
        self.start()

    def run(self) -> None:
        while True:
            header, fds, _, _ = socket.recv_fds(self.sock, 12, 8)
            if len(header) < 12:
                break
            request, flags, size = struct.unpack("=III", header)
            payload = self.sock.recv(size, socket.MSG_WAITALL) if size else b""
            self.asked.append(request)
            reply = self.handle(request, payload, fds)
            if reply is None and flags & 8:
                reply = struct.pack("=Q", int(request == self.refuses))
            if reply is not None:
                self.sock.sendall(struct.pack("=III", request, 5, len(reply)) + reply)
        self.stop()
        self.sock.close()

    def handle(self, request: int, payload: bytes, fds: list[int]) -> bytes | None:
        if request == 1:
            return struct.pack("=Q", self.features)
        if request == 15:
            return struct.pack("=Q", 1 << 3 | 1 << 5)
        if request == 5:
            self.address = struct.unpack_from("=QQQQ", payload, 8)
            self.map = mmap.mmap(fds[0], self.address[1], offset=self.address[3])
            os.close(fds[0])
        elif request in (8, 9, 10):
            self.rings[payload[0]][request] = payload
        elif request == 11:
            index = payload[0]
            base = struct.unpack_from("=II", self.rings[index][10])[1]
            if index == 1:
                self.stop()
                assert self.queue is not None
                base = self.queue.save()["next"]
            return struct.pack("=II", index, base)
        elif request == 12 and payload[0] == 1:
            self.kick = fds[0]
            self.serve()
        elif request == 13 and payload[0] == 1:
            self.call = fds[0]
        elif fds:
            os.close(fds[0])
        return None

    def serve(self) -> None:
        gpa, size, user, _ = self.address
        memory = GuestMemory([(gpa, Buffer(memoryview(self.map)[:size]))])
        _, _, descriptors, used, available, _ = struct.unpack("=IIQQQQ", self.rings[1][9])
        places = tuple(address - user + gpa for address in (descriptors, available, used))
        entries = struct.unpack("=II", self.rings[1][8])[1]
        self.queue = Queue(
            memory, entries, (places[0], places[1], places[2]), event_idx=True,
            interrupt=lambda: os.eventfd_write(self.call, 1), again=lambda: None,
        )  # fmt: skip
        self.queue.continue_at(struct.unpack("=II", self.rings[1][10])[1])
        self.stopping = False
        self.worker = threading.Thread(target=self.work, daemon=True)
        self.worker.start()

    def work(self) -> None:
        os.set_blocking(self.kick, True)
        while True:
            os.eventfd_read(self.kick)
            if self.stopping:
                return
            assert self.queue is not None
            for chain in self.queue.chains():
                self.queue.push(chain, fill(chain.writable, b"".join(chain.readable)[::-1]))
            self.queue.signal()

    def stop(self) -> None:
        if self.worker is not None:
            self.stopping = True
            os.eventfd_write(self.kick, 1)
            self.worker.join()
            os.set_blocking(self.kick, False)
            os.close(self.kick)
            os.close(self.call)
            self.worker = None


class Guest(Driver):
    def __init__(self, tag: str = "binds", features: int = FEATURES, refuses: int = 0) -> None:
        self.memfd = os.memfd_create("ram")
        os.truncate(self.memfd, RAM_BYTES)
        self.mapping = mmap.mmap(self.memfd, RAM_BYTES)
        self.serve(features, refuses)
        super().__init__(
            Fs(tag, VhostUser(self.theirs, self.memfd)), memory=GuestMemory([(RAM, Buffer(memoryview(self.mapping)))])
        )

    def serve(self, features: int = FEATURES, refuses: int = 0) -> None:
        ours, theirs = socket.socketpair()
        self.server = Server(ours, features, refuses)
        self.theirs = theirs.detach()

    def echo(self, text: bytes) -> bytes:
        """The interrupt is what is waited for: it is the other process that works."""
        target = self.writable(len(text))
        head = self.rings[1].add([self.readable(text), target])
        self.write(reg.QUEUE_NOTIFY, 1)
        used: list[tuple[int, int]] = []
        while not used:
            call = self.events.calls[self.gsi]
            os.set_blocking(call, True)
            os.eventfd_read(call)
            os.set_blocking(call, False)
            used = self.rings[1].got()
        assert used == [(head, len(text))]
        return self.bytes(target)

    def close(self) -> None:
        super().close()
        self.server.join(10)
        os.close(self.memfd)


@pytest.fixture
def guest() -> Iterator[Guest]:
    made = Guest()
    yield made
    made.close()


def test_served_by_the_other_process(guest: Guest) -> None:
    assert guest.page[reg.CONFIG : reg.CONFIG + 6].tobytes() == b"binds\0" and guest.config(36, 4) == 1
    guest.start()
    writes = guest.transport.writes
    assert [guest.echo(b"abc"), guest.echo(b"defg")] == [b"cba", b"gfed"]
    assert guest.transport.writes == writes
    asked = [1, 15, 16, 3, 2, 5, 8, 10, 9, 13, 12, 8, 10, 9, 13, 12, 18, 18]
    patience = time.monotonic() + 10
    while len(guest.server.asked) < len(asked) and time.monotonic() < patience:  # the last have no answer
        time.sleep(0.001)
    assert guest.server.asked == asked


def test_reset_and_again(guest: Guest) -> None:
    guest.start()
    assert guest.echo(b"one") == b"eno"
    guest.reset()
    assert guest.server.asked[-2:] == [11, 11] and guest.server.worker is None
    guest.start()
    assert guest.echo(b"two") == b"owt"
    assert guest.server.asked.count(3) == 1, "the server has one owner"


def test_save_and_go_on(guest: Guest) -> None:
    guest.start()
    assert guest.echo(b"one") == b"eno"
    state = guest.transport.save()
    queues = state["queues"]
    assert isinstance(queues, list) and queues[1]["indices"] == {"next": 1, "used": 1}
    guest.transport.resume()
    assert guest.echo(b"two") == b"owt"


def test_server_that_ends(guest: Guest) -> None:
    guest.start()
    told: list[str] = []
    guest.transport.broken = told.append
    guest.server.sock.shutdown(socket.SHUT_RDWR)
    guest.server.join(10)
    guest.turn()
    assert told == [guest.transport.failure] and "has ended" in told[0]
    assert guest.read(reg.STATUS) & reg.NEEDS_RESET
    guest.reset()
    guest.start()
    assert guest.read(reg.STATUS) & reg.NEEDS_RESET, "there is nobody to serve it"
    fs = guest.device
    assert isinstance(fs, Fs)
    guest.reset()
    guest.serve()
    guest.transport.run(lambda: fs.attach(VhostUser(guest.theirs, guest.memfd)))
    guest.start()
    assert guest.echo(b"back") == b"kcab"


@pytest.mark.parametrize(("features", "refuses", "why"), [(F_VERSION_1, 0, "features"), (FEATURES, 5, "refuses request 5")])
def test_server_that_is_not_fit(features: int, refuses: int, why: str) -> None:
    guest = Guest(features=features, refuses=refuses)
    guest.start()
    assert why in guest.transport.failure
    guest.close()


def test_driver_before_the_server() -> None:
    guest = Driver(Fs("x"))
    guest.start()
    assert "no server yet" in guest.transport.failure
    guest.close()


@pytest.mark.parametrize("tag", ["", "x" * 37])
def test_tag(tag: str) -> None:
    with pytest.raises(ValueError, match="36 are most"):
        Fs(tag)
