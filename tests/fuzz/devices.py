"""Drivers of virtio devices that are nearly right. An input is a program of a few steps on a device that was just set up:

    R offset:2 value:4          write a register          C offset:1 length:1 data     write the configuration
    M address:2 length:1 data   write memory              D queue:1 index:1 data:16    write a descriptor
    A queue:1 head:2            offer a chain             I queue:1 index:2            set the available index
    K queue:1                   notify                    H what:1                     the host's side does something

Other bytes do nothing. Whatever the program, the device must come to rest, stay inside of the guest's memory, raise nothing,
and work again after a reset.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Sequence

from ambi.core.loop import Loop
from hyper.vmm.memory import Buffer, GuestMemory
from hyper.vmm.virtio import mem
from hyper.vmm.virtio import registers as reg
from hyper.vmm.virtio.balloon import Balloon
from hyper.vmm.virtio.blk import Blk
from hyper.vmm.virtio.console import Console
from hyper.vmm.virtio.device import Device
from hyper.vmm.virtio.disk import Extents, File
from hyper.vmm.virtio.mmio import Transport
from hyper.vmm.virtio.net import Net
from hyper.vmm.virtio.pmem import Pmem
from hyper.vmm.virtio.queue import INDIRECT, NEXT, WRITE
from hyper.vmm.virtio.rng import Rng
from hyper.vmm.virtio.tap import Tap
from tests.fuzz.targets import Target

RAM, SIZE = 0x4000, 0x10000
RINGS, ENTRIES, RING_BYTES = RAM, 16, 0x200
DATA = RAM + 0x2000
CANARY = b"\xc5" * 512
MOST_STEPS = 64  # of the loop, until a device rests
DISK = 64 << 10
REGION = 1 << 30  # of the blocks that come and go


class Quiet:
    """Where KVM would be."""

    def irqfd(self, eventfd: int, gsi: int) -> None: ...

    def ioeventfd(self, eventfd: int, address: int, length: int, datamatch: int | None = None) -> None: ...


class Host:
    """The other side of a device."""

    def act(self, what: int) -> None:
        """Do something that a host does."""

    def settle(self) -> None:
        """Before each program."""


class Socket(Host):
    """The driver's end of the console."""

    def __init__(self) -> None:
        self.ours, theirs = socket.socketpair()
        self.ours.setblocking(False)
        self.console = Console(theirs.detach(), "ambi.agent")

    def act(self, what: int) -> None:
        if what % 4 == 0:
            self.ours.close()
        elif what % 4 == 1:
            self.read()
        else:
            try:
                self.ours.send(bytes(range(256)) * (what % 16))
            except OSError:  # full, or closed by an earlier step
                pass

    def read(self) -> None:
        try:
            while self.ours.recv(1 << 16):
                pass
        except OSError:
            pass

    def settle(self) -> None:
        self.read()
        if self.ours.fileno() < 0 or self.console._sock is None:
            self.ours.close()
            self.ours, theirs = socket.socketpair()
            self.ours.setblocking(False)
            theirs_fd = theirs.detach()
            self.console.port.run(lambda: self.console.connect(theirs_fd))  # type: ignore[attr-defined]


class Wire(Tap, Host):
    """A tap that is a pair of datagram sockets."""

    def __init__(self) -> None:
        self.far, near = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.far.setblocking(False)
        near.setblocking(False)
        self.fd = near.detach()

    def offload(self, **_: bool) -> None: ...

    def act(self, what: int) -> None:
        try:
            self.far.send(bytes(12 + what * 8))
        except BlockingIOError:
            pass

    def settle(self) -> None:
        try:
            while True:
                self.far.recv(1 << 17)
        except BlockingIOError:
            pass


class Sizes(Host):
    """What a person asks of a device of memory; its device's counters say what it did."""

    def __init__(self, device: Device, *actions: Callable[[int], None]) -> None:
        self.device, self.actions = device, actions

    def act(self, what: int) -> None:
        self.device.port.run(lambda: self.actions[what % len(self.actions)](what))  # type: ignore[attr-defined]


class Sparse(Buffer):
    """A region that nobody reads; giving it back costs nothing."""

    __slots__ = ()

    def __init__(self, size: int) -> None:
        super().__init__(bytearray(size))

    def discard(self, offset: int, length: int) -> None:
        assert offset >= 0 and length > 0 and offset + length <= self.size


class Bench:
    """A device that is set up anew for each program."""

    def __init__(self, device: Device, host: Host, *more: tuple[int, Buffer]) -> None:
        """more: regions of memory beside the 64 KiB."""
        self.backing = bytearray(CANARY + bytes(SIZE) + CANARY)
        self.ram = memoryview(self.backing)[len(CANARY) : -len(CANARY)]
        self.loop = Loop()
        page = memoryview(bytearray(reg.PAGE))
        memory = GuestMemory([(RAM, Buffer(self.ram)), *more])
        self.device, self.host = device, host
        self.transport = Transport(Quiet(), memory, page, 0, 0, device, self.loop)
        self.transport.broken = self._broken
        self.available = [0] * len(device.queue_sizes)
        self._setup = [
            (offset, value.to_bytes(4, "little"))
            for features in (reg.F_VERSION_1 | device.features, reg.F_VERSION_1 | device.features & ~reg.F_EVENT_IDX)
            for offset, value in _beginning(features, len(device.queue_sizes))
        ]
        self._half = len(self._setup) // 2

    def _broken(self, why: str) -> None:
        raise AssertionError(f"a driver makes the host fail: {why}")

    def begin(self, kind: int) -> None:
        """kind: an even number for event indices, an odd one for the flags of old."""
        transport = self.transport
        transport.write(reg.STATUS, bytes(4))
        self.ram[: len(self.available) * RING_BYTES] = bytes(len(self.available) * RING_BYTES)
        self.available = [0] * len(self.available)
        self.host.settle()
        self.turn()
        for offset, value in self._setup[self._half :] if kind & 1 else self._setup[: self._half]:
            transport.write(offset, value)
        assert transport._status == 15 and not transport.failure, transport.failure

    def turn(self) -> None:
        poll = self.loop._poll.poll
        for _ in range(MOST_STEPS):
            if not poll(0):
                return
            self.loop.step()
        raise AssertionError("the device does not come to rest")

    def run(self, program: bytes) -> None:
        self.begin(program[0] if program else 0)
        at = 1
        while at < len(program):
            step = _STEPS.get(program[at])
            at = at + 1 if step is None else step(self, program, at + 1)
        self.turn()
        size = len(CANARY)
        assert self.backing[:size] == CANARY and self.backing[-size:] == CANARY, "outside of the guest's memory"

    # The steps: each takes the program and where its operands begin, and returns where the next step does.

    def _register(self, program: bytes, at: int) -> int:
        offset = int.from_bytes(program[at : at + 2], "little") & 0xFFF
        self.transport.write(offset, program[at + 2 : at + 6])
        return at + 6

    def _config(self, program: bytes, at: int) -> int:
        offset, length = program[at : at + 1] or b"\0", program[at + 1 : at + 2] or b"\1"
        self.transport.write(reg.CONFIG + offset[0], program[at + 2 : at + 2 + min(length[0], 8)])
        return at + 2 + length[0]

    def _memory(self, program: bytes, at: int) -> int:
        address, length = int.from_bytes(program[at : at + 2], "little"), (program[at + 2 : at + 3] or b"\0")[0]
        data = program[at + 3 : at + 3 + length][: SIZE - address]
        self.ram[address : address + len(data)] = data
        return at + 3 + length

    def _descriptor(self, program: bytes, at: int) -> int:
        data = program[at + 2 : at + 18].ljust(16, b"\0")
        queue, index = (program[at : at + 2] + b"\0\0")[:2]
        start = RING_BYTES * (queue % len(self.available)) + 16 * (index % ENTRIES)
        self.ram[start : start + 16] = data
        return at + 18

    def _offer(self, program: bytes, at: int) -> int:
        queue = (program[at : at + 1] or b"\0")[0] % len(self.available)
        ring = RING_BYTES * queue + 16 * ENTRIES
        where = ring + 4 + 2 * (self.available[queue] % ENTRIES)
        self.ram[where : where + 2] = program[at + 1 : at + 3].ljust(2, b"\0")
        self.available[queue] = (self.available[queue] + 1) & 0xFFFF
        self.ram[ring + 2 : ring + 4] = self.available[queue].to_bytes(2, "little")
        return at + 3

    def _index(self, program: bytes, at: int) -> int:
        queue = (program[at : at + 1] or b"\0")[0] % len(self.available)
        ring = RING_BYTES * queue + 16 * ENTRIES
        self.ram[ring + 2 : ring + 4] = program[at + 1 : at + 3].ljust(2, b"\0")
        return at + 3

    def _kick(self, program: bytes, at: int) -> int:
        self.transport.kick((program[at : at + 1] or b"\0")[0] % len(self.available))
        self.turn()
        return at + 1

    def _host(self, program: bytes, at: int) -> int:
        self.host.act((program[at : at + 1] or b"\0")[0])
        return at + 1


_STEPS: dict[int, Callable[[Bench, bytes, int], int]] = {
    ord("R"): Bench._register, ord("C"): Bench._config, ord("M"): Bench._memory, ord("D"): Bench._descriptor,
    ord("A"): Bench._offer, ord("I"): Bench._index, ord("K"): Bench._kick, ord("H"): Bench._host,
}  # fmt: skip


def _beginning(features: int, queues: int) -> Sequence[tuple[int, int]]:
    """The register writes of a driver that sets everything up."""
    steps = [(reg.STATUS, 3)]
    for word in (0, 1):
        steps += [(reg.DRIVER_FEATURES_SELECT, word), (reg.DRIVER_FEATURES, features >> 32 * word & 0xFFFFFFFF)]
    steps.append((reg.STATUS, 11))
    for queue in range(queues):
        at = RINGS + RING_BYTES * queue
        places = (at, at + 16 * ENTRIES, (at + 18 * ENTRIES + 6 + 3) & ~3)
        steps += [(reg.QUEUE_SELECT, queue), (reg.QUEUE_SIZE, ENTRIES)]
        for offset, place in zip((reg.QUEUE_DESCRIPTORS, reg.QUEUE_DRIVER, reg.QUEUE_DEVICE), places, strict=True):
            steps += [(offset, place), (offset + 4, 0)]
        steps.append((reg.QUEUE_READY, 1))
    return [*steps, (reg.STATUS, 15)]


# Programs that are right


def _request(queue: int, *pieces: tuple[int, int, int], first: int = 0) -> bytes:
    """A chain of (address, bytes, flags) in descriptors from `first` on, offered and notified."""
    program = b""
    for number, (address, length, flags) in enumerate(pieces):
        more = NEXT if number + 1 < len(pieces) else 0
        data = struct.pack("<QIHH", address, length, flags | more, first + number + 1)
        program += b"D" + bytes((queue, first + number)) + data
    return program + b"A" + bytes((queue, first, 0)) + b"K" + bytes((queue,))


def _memory(address: int, data: bytes) -> bytes:
    return b"M" + struct.pack("<HB", address - RAM, len(data)) + data


def _blk(kind: int, sector: int, *data: tuple[int, int, int], payload: bytes = b"") -> bytes:
    header = _memory(DATA, struct.pack("<IIQ", kind, 0, sector) + payload)
    return b"\0" + header + _request(0, (DATA, 16, 0), *data, (DATA + 0x3000, 1, WRITE))


def _blk_programs() -> list[bytes]:
    table = struct.pack("<QIHH", DATA, 16, NEXT, 1) + struct.pack("<QIHH", DATA + 0x1000, 1024, NEXT | WRITE, 2)
    table += struct.pack("<QIHH", DATA + 0x3000, 1, WRITE, 0)
    indirect = _memory(DATA, struct.pack("<IIQ", 0, 0, 3)) + _memory(DATA + 0x800, table)
    return [
        _blk(0, 2, (DATA + 0x1000, 512, WRITE), (DATA + 0x1200, 1536, WRITE)),
        _blk(1, 5, (DATA + 0x1000, 1024, 0)),
        _blk(4, 0),
        _blk(8, 0, (DATA + 0x1000, 20, WRITE)),
        _blk(11, 0, (DATA + 16, 16, 0), payload=struct.pack("<QII", 8, 8, 0)),
        _blk(13, 0, (DATA + 16, 32, 0), payload=struct.pack("<QIIQII", 1, 2, 0, 9, 3, 1)),
        b"\1" + indirect + _request(0, (DATA + 0x800, 48, INDIRECT)),
    ]


def _console_programs() -> list[bytes]:
    say = [_memory(DATA + 16 * n, struct.pack("<IHH", 1, *word)) for n, word in enumerate(((0, 1), (3, 1), (6, 1)))]
    begin = b"\0" + _request(2, (DATA + 0x100, 64, WRITE)) + _request(2, (DATA + 0x140, 64, WRITE), first=1)
    begin += b"".join(say) + b"".join(_request(3, (DATA + 16 * n, 8, 0), first=n) for n in range(3))
    return [
        begin
        + b"H\2"
        + _request(4, (DATA + 0x1000, 100, WRITE))
        + _request(4, (DATA + 0x1100, 300, WRITE), first=1)
        + b"H\7",
        begin + _request(5, (DATA + 0x2000, 10, 0), (DATA + 0x2100, 4000, 0)) + b"H\1" + b"H\0",
        b"\1" + begin[1:] + b"H\6" + _request(4, (DATA, 4096, WRITE), (DATA + 0x1000, 4096, WRITE)),
    ]


def _net_programs() -> list[bytes]:
    room = b"".join(_request(0, (DATA + 0x400 * n, 1024, WRITE), first=n) for n in range(8))
    return [
        b"\0" + room + b"H\x05" + b"K\0" + b"H\xff" + b"H\x50" + b"K\0",
        b"\1" + _request(1, (DATA, 12, 0), (DATA + 0x100, 1500, 0)) + room + b"H\x10",
        b"\0" + _request(1, (DATA, 100, 0)) + b"H\x80" + room,
    ]


def _balloon_programs() -> list[bytes]:
    pages = _memory(DATA, struct.pack("<4I", *((RAM >> 12) + 9 + n for n in (3, 1, 2, 5))))
    return [
        b"\0" + pages + _request(0, (DATA, 16, 0)) + _request(1, (DATA, 8, 0)),
        b"\0" + _request(2, (RAM + 0x8000, 0x2000, WRITE), (RAM + 0xC000, 0x1000, WRITE)) + b"C\4\4\1\0\0\0",
    ]  # fmt: skip


def _mem_programs() -> list[bytes]:
    asks = ((0, 1, 2), (3, 0, 4), (1, 1, 1), (2, 0, 0), (0, 0, 3))
    programs = []
    for first in range(3):
        program = b"\0"
        for number, (kind, block, count) in enumerate(asks[first:] + asks[:first]):
            at = DATA + 64 * number
            program += _memory(at, struct.pack("<H6xQH6x", kind, REGION + block * mem.BLOCK, count))
            program += _request(0, (at, 24, 0), (at + 32, 10, WRITE), first=2 * number)
        programs.append(program + b"H\3")
    return programs


def _disk(*, layers: bool) -> Blk:
    fd = os.memfd_create("disk")
    os.ftruncate(fd, DISK)
    if layers:
        return Blk(Extents([(fd, 3, 0), (fd, 50, 10), (fd, 11, 1)]), "layers")
    return Blk(File(fd), "disk")


def _console() -> Bench:
    host = Socket()
    return Bench(host.console, host)


def _net() -> Bench:
    wire = Wire()
    return Bench(Net(wire, b"\2ambi\0"), wire)


def _balloon() -> Bench:
    balloon = Balloon()
    return Bench(balloon, Sizes(balloon, lambda what: balloon.resize(what << 12)))


def _mem() -> Bench:
    device = mem.Mem(REGION, 4 * mem.BLOCK)
    region = Sparse(4 * mem.BLOCK)
    return Bench(device, Sizes(device, lambda what: device.resize(what * mem.BLOCK >> 2)), (REGION, region))


_MAKERS: dict[str, tuple[Callable[[], Bench], Callable[[], list[bytes]]]] = {
    "console": (_console, _console_programs),
    "blk": (lambda: Bench(_disk(layers=False), Host()), _blk_programs),
    "layers": (lambda: Bench(_disk(layers=True), Host()), _blk_programs),
    "rng": (
        lambda: Bench(Rng(), Host()),
        lambda: [b"\0" + _request(0, (DATA, 64, WRITE)) + _request(0, (DATA, 8, WRITE), (DATA, 99, WRITE), first=3)],
    ),
    "net": (_net, _net_programs),
    "balloon": (_balloon, _balloon_programs),
    "mem": (_mem, _mem_programs),
    "pmem": (
        lambda: Bench(Pmem(0x1_4000_0000, 2 << 20), Host()),
        lambda: [b"\0" + _request(0, (DATA, 4, 0), (DATA + 8, 4, WRITE)) * 3],
    ),
}
_benches: dict[str, Bench] = {}
AGAIN_EVERY = 16


def _feed(name: str, program: bytes) -> None:
    bench = _benches.get(name)
    if bench is None:
        bench = _benches[name] = _MAKERS[name][0]()
    try:
        bench.run(program)
        if sum(program) % AGAIN_EVERY == 0:
            good = DEVICES[f"virtio {name}"].good
            before = bench.device.counters().get("requests", 0)
            bench.run(good[len(program) % len(good)])
            assert not bench.transport.failure, f"after a reset: {bench.transport.failure}"
            assert bench.device.counters().get("requests", 0) > before, "nothing done after a reset"
    except BaseException:
        del _benches[name]  # what it is in is not where the next input should begin
        raise


def _target(name: str) -> Target:
    return Target(_MAKERS[name][1](), lambda program: _feed(name, program))


DEVICES = {f"virtio {name}": _target(name) for name in _MAKERS}
