"""The monitor's memory and buses: what a guest may name, and what it gets when it names something else."""

from __future__ import annotations

import random

import pytest

from hyper.vmm.bus import MAX_UNOWNED, Bus
from hyper.vmm.memory import BadAddress, Buffer, GuestMemory

LOW, HIGH = 0x0, 0x1_0000_0000


class Recorder:
    def __init__(self) -> None:
        self.seen: list[tuple[object, ...]] = []

    def read(self, offset: int, length: int) -> bytes:
        self.seen.append(("read", offset, length))
        return bytes(range(offset, offset + length))

    def write(self, offset: int, data: bytes) -> None:
        self.seen.append(("write", offset, data))


@pytest.fixture
def memory() -> GuestMemory:
    return GuestMemory([(HIGH, Buffer(bytearray(0x1000))), (LOW, Buffer(bytearray(0x2000)))])


def test_memory_is_read_and_written_in_place(memory: GuestMemory) -> None:
    memory.write(0x10, b"hello")
    assert memory.read(0x10, 5) == b"hello"
    view = memory.view(0x10, 5)
    view[0] = ord("j")
    assert memory.read(0x10, 5) == b"jello"
    memory.put_u16(HIGH, 0x1234)
    memory.put_u32(HIGH + 2, 0xDEADBEEF)
    memory.put_u64(HIGH + 6, 1 << 63)
    assert (memory.u16(HIGH), memory.u32(HIGH + 2), memory.u64(HIGH + 6)) == (0x1234, 0xDEADBEEF, 1 << 63)
    assert memory.size == 0x3000
    assert [region.gpa for region in memory.regions] == [LOW, HIGH]


@pytest.mark.parametrize(
    "gpa,length",
    [(0x1FFF, 2), (0x2000, 1), (0x2000, 0), (HIGH - 1, 1), (HIGH + 0xFFF, 2), (HIGH + 0x1000, 1), (1 << 64, 1),
     (0x10, -1), (-1, 1), (-4, 8), (0, 0x2001), (0, 1 << 64)],
)  # fmt: skip
def test_what_is_not_ram_is_refused(memory: GuestMemory, gpa: int, length: int) -> None:
    with pytest.raises(BadAddress) as error:
        memory.view(gpa, length)
    assert (error.value.gpa, error.value.length) == (gpa, length)
    with pytest.raises(BadAddress):
        memory.address(gpa, length)


def test_the_last_byte_is_ram(memory: GuestMemory) -> None:
    assert len(memory.view(0x1FFF, 1)) == 1
    assert len(memory.view(0x1FFF, 0)) == 0
    assert memory.address(0x1FFF, 1) == 0x1FFF  # a Buffer begins at 0


def test_memory_that_overlaps_is_refused(memory: GuestMemory) -> None:
    for gpa in (0x1FFF, HIGH - 0x1000 + 1, HIGH):
        with pytest.raises(ValueError, match="overlaps"):
            memory.add(gpa, Buffer(bytearray(0x1000)))
    memory.add(0x2000, Buffer(bytearray(0x1000)))
    with pytest.raises(BadAddress):
        memory.view(0x1FFF, 2)  # two regions lie side by side here, but not in our process


def test_a_device_sees_offsets() -> None:
    bus, device = Bus(), Recorder()
    bus.add(0x3F8, 8, device)
    assert bus.read(0x3FD, 1) == b"\x05"
    bus.write(0x3F8, b"x")
    assert device.seen == [("read", 5, 1), ("write", 0, b"x")]
    assert not bus.unowned


def test_what_nobody_owns_reads_all_ones_and_is_counted() -> None:
    bus, device = Bus(), Recorder()
    bus.add(0x3F8, 8, device)
    assert bus.read(0xCFC, 4) == b"\xff" * 4
    assert bus.read(0x3FF, 2) == b"\xff" * 2  # crosses the end
    bus.write(0x80, b"\0")
    bus.write(0x80, b"\0")
    assert bus.unowned == {0xCFC: 1, 0x3FF: 1, 0x80: 2}
    assert device.seen == []


def test_counting_is_bounded() -> None:
    bus = Bus()
    for address in range(MAX_UNOWNED + 1000):
        bus.read(address, 1)
    assert len(bus.unowned) == MAX_UNOWNED + 1
    assert bus.unowned[-1] == 1000


def test_what_is_taken_is_not_given_twice() -> None:
    bus = Bus()
    bus.add(0x100, 0x10, Recorder())
    bus.add(0x110, 0x10, Recorder())
    for base, size in ((0x100, 1), (0xF8, 9), (0x11F, 4), (0x90, 0x200), (0x200, 0)):
        with pytest.raises(ValueError, match="taken"):
            bus.add(base, size, Recorder())


def test_what_was_taken_away_is_nobodys() -> None:
    bus, devices = Bus(), [Recorder(), Recorder(), Recorder()]
    for number, device in enumerate(devices):
        bus.add(0x100 + 0x10 * number, 0x10, device)
    bus.remove(0x110)
    bus.write(0x110, b"x")
    assert bus.read(0x11F, 1) == b"\xff" and devices[1].seen == [] and bus.unowned == {0x110: 1, 0x11F: 1}
    bus.write(0x120, b"y")
    assert devices[2].seen == [("write", 0, b"y")]
    with pytest.raises(KeyError):
        bus.remove(0x110)
    bus.add(0x110, 0x10, devices[1])


def test_many_devices_each_get_their_own() -> None:
    bus, devices = Bus(), {}
    bases = [0xD000_0000 + 0x1000 * n for n in range(32)]
    random.Random(1).shuffle(bases)
    for base in bases:
        devices[base] = Recorder()
        bus.add(base, 0x1000, devices[base])
    for base, device in devices.items():
        bus.write(base + 0x50, b"\1\0\0\0")
        assert device.seen == [("write", 0x50, b"\1\0\0\0")]
