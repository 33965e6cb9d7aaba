"""A driver of virtio devices over memory-mapped registers: writes real rings into memory, as a guest does.

`Events` stands for KVM: a write that an ioeventfd matches goes there, and any other "exits" to the transport.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from typing import NamedTuple

from ambi.core.loop import Loop
from hyper.vmm.memory import Buffer, GuestMemory
from hyper.vmm.virtio import registers as reg
from hyper.vmm.virtio.device import Device
from hyper.vmm.virtio.mmio import Transport
from hyper.vmm.virtio.queue import INDIRECT, NEXT, WRITE

BASE = 0xD0000000
RAM = 0x10000  # where the guest's memory begins
RAM_BYTES = 1 << 20
DATA = RAM + 0x80000  # free for a test's buffers
F_INDIRECT, F_EVENT_IDX, F_VERSION_1 = reg.F_INDIRECT, reg.F_EVENT_IDX, reg.F_VERSION_1


class Events:
    """What KVM does with eventfds."""

    def __init__(self) -> None:
        self.calls: dict[int, int] = {}
        self.notifications: list[tuple[int, int, int, int | None]] = []

    def irqfd(self, eventfd: int, gsi: int) -> None:
        self.calls[gsi] = eventfd

    def ioeventfd(self, eventfd: int, address: int, length: int, datamatch: int | None = None) -> None:
        self.notifications.append((eventfd, address, length, datamatch))

    def caught(self, address: int, value: int) -> bool:
        for eventfd, at, length, datamatch in self.notifications:
            if at == address and length == 4 and datamatch in (None, value):
                os.eventfd_write(eventfd, 1)
                return True
        return False


class Buffers(NamedTuple):
    """A piece of a request: its address, its bytes, whether the device writes it."""

    address: int
    length: int
    write: bool


class Ring:
    """A queue as its driver has it: the three parts at `at`."""

    def __init__(self, memory: GuestMemory, at: int, size: int, *, event_idx: bool = True) -> None:
        self.memory, self.size, self.event_idx = memory, size, event_idx
        self.descriptors = at
        self.driver = at + 16 * size
        self.device = (self.driver + 6 + 2 * size + 3) & ~3
        self.end = (self.device + 6 + 8 * size + 15) & ~15
        self.available = 0
        self.used = 0
        self._free = 0

    def describe(self, index: int, address: int, length: int, flags: int, following: int = 0) -> None:
        self.memory.write(self.descriptors + 16 * index, struct.pack("<QIHH", address, length, flags, following))

    def offer(self, head: int) -> None:
        self.memory.put_u16(self.driver + 4 + 2 * (self.available % self.size), head)
        self.available = (self.available + 1) & 0xFFFF
        self.memory.put_u16(self.driver + 2, self.available)

    def add(self, pieces: Sequence[Buffers], *, indirect: int = 0) -> int:
        """Offer a request; its head. indirect: an address to put its table at."""
        if indirect:
            for number, piece in enumerate(pieces):
                flags = (WRITE if piece.write else 0) | (NEXT if number + 1 < len(pieces) else 0)
                self.memory.write(
                    indirect + 16 * number, struct.pack("<QIHH", piece.address, piece.length, flags, number + 1)
                )
            head = self._take()
            self.describe(head, indirect, 16 * len(pieces), INDIRECT)
        else:
            heads = [self._take() for _ in pieces]
            for number, piece in enumerate(pieces):
                last = number + 1 == len(pieces)
                flags = (WRITE if piece.write else 0) | (0 if last else NEXT)
                self.describe(heads[number], piece.address, piece.length, flags, 0 if last else heads[number + 1])
            head = heads[0]
        self.offer(head)
        return head

    def _take(self) -> int:
        self._free += 1
        return (self._free - 1) % self.size

    def got(self) -> list[tuple[int, int]]:
        """What the device has used since the last call: heads, and bytes written."""
        found = []
        while self.used != self.memory.u16(self.device + 2):
            at = self.device + 4 + 8 * (self.used % self.size)
            found.append((self.memory.u32(at), self.memory.u32(at + 4)))
            self.used = (self.used + 1) & 0xFFFF
        if self.event_idx:
            self.memory.put_u16(self.driver + 4 + 2 * self.size, self.used)  # tell us of the next
        return found


class Driver:
    """A guest with one device. `ram` is its memory, with a canary on either side that `check` looks at."""

    CANARY = b"\xc5" * 4096

    def __init__(
        self, device: Device, *, gsi: int = 5, ram: bytearray | None = None, memory: GuestMemory | None = None
    ) -> None:
        """ram: another driver's `backing`, to go on in its memory. memory: some other one, without canaries."""
        self.backing = ram if ram is not None else bytearray(self.CANARY + bytes(RAM_BYTES) + self.CANARY)
        inside = memoryview(self.backing)[len(self.CANARY) : -len(self.CANARY)]
        self.memory = memory or GuestMemory([(RAM, Buffer(inside))])
        self.loop = Loop()
        self.events = Events()
        self.page = memoryview(bytearray(reg.PAGE))
        self.device = device
        self.transport = Transport(self.events, self.memory, self.page, BASE, gsi, device, self.loop)
        self.gsi = gsi
        self.rings: list[Ring] = []
        self.features = 0
        self._data = DATA

    def check(self) -> None:
        size = len(self.CANARY)
        assert self.backing[:size] == self.CANARY and self.backing[-size:] == self.CANARY, (
            "the device wrote outside of memory"
        )

    def read(self, offset: int) -> int:
        return int.from_bytes(self.page[offset : offset + 4], "little")

    def write(self, offset: int, value: int) -> None:
        if not self.events.caught(BASE + offset, value):
            self.transport.write(offset, value.to_bytes(4, "little"))

    def config(self, offset: int, length: int) -> int:
        return int.from_bytes(self.page[reg.CONFIG + offset : reg.CONFIG + offset + length], "little")

    def offered(self) -> int:
        found = 0
        for word in (0, 1):
            self.write(reg.DEVICE_FEATURES_SELECT, word)
            found |= self.read(reg.DEVICE_FEATURES) << 32 * word
        return found

    def negotiate(self, features: int | None = None) -> None:
        """Up to FEATURES_OK; by default all that is offered."""
        self.write(reg.STATUS, reg.ACKNOWLEDGE)
        self.write(reg.STATUS, reg.ACKNOWLEDGE | reg.DRIVER)
        self.features = self.offered() if features is None else features
        for word in (0, 1):
            self.write(reg.DRIVER_FEATURES_SELECT, word)
            self.write(reg.DRIVER_FEATURES, self.features >> 32 * word & 0xFFFFFFFF)
        self.write(reg.STATUS, reg.ACKNOWLEDGE | reg.DRIVER | reg.FEATURES_OK)

    def enable(self, index: int, size: int | None = None) -> Ring:
        """A ring for queue `index`, behind those that are there."""
        self.write(reg.QUEUE_SELECT, index)
        size = size or min(self.read(reg.QUEUE_SIZE_MAX), 128)
        at = self.rings[-1].end if self.rings else RAM
        ring = Ring(self.memory, at, size, event_idx=bool(self.features & F_EVENT_IDX))
        self.memory.write(at, bytes(ring.end - at))
        self.set_queue(index, size, (ring.descriptors, ring.driver, ring.device))
        self.rings.append(ring)
        return ring

    def set_queue(self, index: int, size: int, addresses: tuple[int, int, int]) -> None:
        self.write(reg.QUEUE_SELECT, index)
        self.write(reg.QUEUE_SIZE, size)
        for at, address in zip((reg.QUEUE_DESCRIPTORS, reg.QUEUE_DRIVER, reg.QUEUE_DEVICE), addresses, strict=True):
            self.write(at, address & 0xFFFFFFFF)
            self.write(at + 4, address >> 32)
        self.write(reg.QUEUE_READY, 1)

    def start(self, features: int | None = None, size: int | None = None) -> Driver:
        """All of a driver's beginning, with all queues."""
        self.negotiate(features)
        assert self.read(reg.STATUS) & reg.FEATURES_OK
        for index in range(len(self.device.queue_sizes)):
            self.enable(index, size)
        self.write(reg.STATUS, self.read(reg.STATUS) | reg.DRIVER_OK)
        return self

    def reset(self) -> None:
        self.write(reg.STATUS, 0)
        self.rings = []

    def kick(self, index: int) -> None:
        self.write(reg.QUEUE_NOTIFY, index)
        self.turn()

    def turn(self, most: int = 100) -> None:
        """Let the devices work until nothing is ready."""
        for _ in range(most):
            if not self.loop._poll.poll(0):
                return
            self.loop.step()
        raise AssertionError("the device never comes to rest")

    def interrupted(self) -> bool:
        """Whether the interrupt was raised since the last call."""
        try:
            return os.eventfd_read(self.events.calls[self.gsi]) > 0
        except BlockingIOError:
            return False

    def data(self, length: int, content: bytes = b"") -> int:
        """Room for `length` bytes that begin with `content`; its address."""
        at = self._data
        self._data += (length + 15) & ~15
        if self._data > RAM + RAM_BYTES:
            at, self._data = DATA, DATA + ((length + 15) & ~15)
        self.memory.write(at, content.ljust(length, b"\0")[:length])
        return at

    def readable(self, content: bytes) -> Buffers:
        return Buffers(self.data(len(content), content), len(content), False)

    def writable(self, length: int) -> Buffers:
        return Buffers(self.data(length), length, True)

    def bytes(self, piece: Buffers, length: int | None = None) -> bytes:
        return self.memory.read(piece.address, piece.length if length is None else length)

    def close(self) -> None:
        self.transport.close()
        self.check()
