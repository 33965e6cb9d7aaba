"""The devices that give memory: balloon, blocks that come and go, files as memory."""

from __future__ import annotations

import os
import struct

import pytest

from hyper.vmm.memory import Buffer, GuestMemory
from hyper.vmm.virtio import registers as reg
from hyper.vmm.virtio.balloon import DEFLATE, F_REPORTING, INFLATE, REPORTS, Balloon
from hyper.vmm.virtio.mem import ACK, BLOCK, ERROR, MIXED, NACK, PLUG, PLUGGED, STATE, UNPLUG, UNPLUG_ALL, UNPLUGGED, Mem
from hyper.vmm.virtio.pmem import Pmem
from tests.virtiokit import DATA, RAM, RAM_BYTES, Buffers, Driver

PAGE = 4096


class Counting(Buffer):
    """RAM that keeps what was given back."""

    def __init__(self, data: bytearray) -> None:
        super().__init__(data)
        self.discarded: list[tuple[int, int]] = []

    def discard(self, offset: int, length: int) -> None:
        self.discarded.append((offset, length))
        super().discard(offset, length)

    __slots__ = ("discarded",)


def with_balloon(features: int | None = None) -> tuple[Driver, Balloon, Counting]:
    ram = Counting(bytearray(b"\x11" * RAM_BYTES))
    balloon = Balloon()
    driver = Driver(balloon, memory=GuestMemory([(RAM, ram)]))
    driver.negotiate(features)
    for index in range(2 + bool(driver.features & F_REPORTING)):
        driver.enable(index)
    driver.write(reg.STATUS, 15)
    return driver, balloon, ram


def frames(*addresses: int) -> bytes:
    return b"".join(struct.pack("<I", address // PAGE) for address in addresses)


def test_balloon_grows_and_shrinks() -> None:
    driver, balloon, ram = with_balloon()
    driver.transport.run(lambda: balloon.resize(3 * PAGE))
    assert driver.config(0, 4) == 3 and driver.read(reg.INTERRUPT_STATUS) == 3
    head = driver.rings[INFLATE].add(
        [driver.readable(frames(DATA + 5 * PAGE, DATA + 3 * PAGE, DATA + 4 * PAGE, DATA + 9 * PAGE))]
    )
    driver.kick(INFLATE)
    assert driver.rings[INFLATE].got() == [(head, 0)] and driver.interrupted()
    inside = DATA - RAM
    assert ram.discarded == [(inside + 3 * PAGE, 3 * PAGE), (inside + 9 * PAGE, PAGE)], "pages in a row go at once"
    assert driver.memory.read(DATA + 3 * PAGE, PAGE) == bytes(PAGE) and driver.memory.read(DATA + 6 * PAGE, 1) == b"\x11"
    driver.transport.write(reg.CONFIG + 4, (4).to_bytes(4, "little"))
    assert balloon.actual == 4 * PAGE and driver.config(4, 4) == 4
    driver.rings[DEFLATE].add([driver.readable(frames(DATA + 3 * PAGE))])
    driver.kick(DEFLATE)
    assert len(driver.rings[DEFLATE].got()) == 1 and len(ram.discarded) == 2
    driver.close()


def test_free_pages_are_reported() -> None:
    driver, balloon, ram = with_balloon()
    driver.rings[REPORTS].add([Buffers(DATA + 0x10000, 2 * PAGE, True), Buffers(DATA + 0x20000, PAGE, True)])
    driver.kick(REPORTS)
    assert driver.rings[REPORTS].got() == [(0, 0)]
    assert ram.discarded == [(DATA + 0x10000 - RAM, 2 * PAGE), (DATA + 0x20000 - RAM, PAGE)]
    assert balloon.counters()["reported"] == 3 * PAGE
    driver.close()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (frames(0), "not in"),
        (frames(RAM + RAM_BYTES), "not in"),
        (b"\xff" * 8, "not in"),
        (b"x" * 6, "page numbers"),
        (bytes(4 * 16385), "page numbers"),
    ],
)
def test_bad_page_numbers(content: bytes, why: str) -> None:
    driver, _, ram = with_balloon()
    driver.rings[INFLATE].add([driver.readable(content)])
    driver.kick(INFLATE)
    assert why in driver.transport.failure and not ram.discarded
    driver.close()


@pytest.mark.parametrize(("address", "length"), [(DATA + 1, PAGE), (DATA, 100)])
def test_bad_free_ranges(address: int, length: int) -> None:
    driver, _, ram = with_balloon()
    driver.rings[REPORTS].add([Buffers(address, length, True)])
    driver.kick(REPORTS)
    assert "no pages" in driver.transport.failure and not ram.discarded
    driver.close()


class Plugs(Driver):
    """A guest with a region of 4 blocks above its RAM."""

    START = 64 << 20

    def __init__(self) -> None:
        self.region = Counting(bytearray(4 * BLOCK))
        self.mem = Mem(self.START, 4 * BLOCK)
        ram = Buffer(bytearray(RAM_BYTES))
        super().__init__(self.mem, memory=GuestMemory([(RAM, ram), (self.START, self.region)]))
        self.start()

    def ask(self, kind: int, block: int = 0, count: int = 1, offset: int = 0) -> tuple[int, int]:
        answer = self.writable(10)
        self.rings[0].add([self.readable(struct.pack("<H6xQH6x", kind, self.START + block * BLOCK + offset, count)), answer])
        self.kick(0)
        assert [written for _, written in self.rings[0].got()] == [10]
        result, state = struct.unpack("<H6xH", self.bytes(answer))
        return result, state


def test_blocks_come_and_go() -> None:
    guest = Plugs()
    assert struct.unpack("<QH6xQQQQQ", guest.page[reg.CONFIG : reg.CONFIG + 56]) == (
        BLOCK, 0, guest.START, 4 * BLOCK, 4 * BLOCK, 0, 0,
    )  # fmt: skip
    assert guest.ask(PLUG)[0] == NACK, "nothing was requested"
    guest.transport.run(lambda: guest.mem.resize(3 * BLOCK + 5))
    assert guest.config(48, 8) == 3 * BLOCK and guest.read(reg.INTERRUPT_STATUS) == 3
    assert guest.ask(PLUG, 1, 2) == (ACK, 0) and guest.config(40, 8) == 2 * BLOCK == guest.mem.plugged
    assert guest.ask(PLUG, 2)[0] == ERROR and guest.ask(PLUG, 3)[0] == ACK and guest.ask(PLUG, 0)[0] == NACK
    assert [guest.ask(STATE, *where)[1] for where in ((1, 3), (0, 1), (0, 4))] == [PLUGGED, UNPLUGGED, MIXED]
    assert guest.ask(UNPLUG, 0, 2)[0] == ERROR and guest.ask(UNPLUG, 2)[0] == ACK
    assert guest.region.discarded == [(2 * BLOCK, BLOCK)]
    assert guest.ask(UNPLUG_ALL)[0] == ACK and guest.mem.plugged == 0 and guest.config(40, 8) == 0
    assert sorted(guest.region.discarded) == [(BLOCK, BLOCK), (2 * BLOCK, BLOCK), (3 * BLOCK, BLOCK)]
    guest.close()


@pytest.mark.parametrize(
    ("kind", "block", "count", "offset"),
    [
        (PLUG, 4, 1, 0),
        (PLUG, 3, 2, 0),
        (PLUG, 0, 0, 0),
        (PLUG, 0, 1, 4096),
        (PLUG, -1, 1, 0),
        (7, 0, 1, 0),
        (STATE, 0, 65535, 0),
    ],
)
def test_bad_requests_for_memory(kind: int, block: int, count: int, offset: int) -> None:
    guest = Plugs()
    guest.transport.run(lambda: guest.mem.resize(4 * BLOCK))
    assert guest.ask(kind, block, count, offset)[0] == ERROR and guest.mem.plugged == 0
    guest.close()


def test_memory_after_a_restore() -> None:
    guest = Plugs()
    guest.transport.run(lambda: guest.mem.resize(2 * BLOCK))
    assert guest.ask(PLUG, 1)[0] == ACK
    state = guest.transport.save()
    guest.mem._plugged.clear()
    guest.transport.restore(state)
    assert guest.mem.plugged == BLOCK and guest.config(48, 8) == 2 * BLOCK
    for own in ({"requested": 0, "plugged": [9]}, {"requested": "1", "plugged": []}):
        with pytest.raises((ValueError, TypeError)):
            guest.transport.restore(state | {"state": own})
    guest.close()


def test_file_as_memory() -> None:
    fd = os.memfd_create("layer")
    guest = Driver(Pmem(0x1_4000_0000, 4 << 20, fd))
    guest.start()
    assert guest.config(0, 8) == 0x1_4000_0000 and guest.config(8, 8) == 4 << 20
    for kind, result in ((0, 0), (1, 1)):
        answer = guest.writable(4)
        guest.rings[0].add([guest.readable(kind.to_bytes(4, "little")), answer])
        guest.kick(0)
        assert guest.rings[0].got()[0][1] == 4 and int.from_bytes(guest.bytes(answer), "little") == result
    guest.rings[0].add([guest.readable(bytes(4))])
    guest.kick(0)
    assert "without room" in guest.transport.failure
    guest.close()
    with pytest.raises(OSError):
        os.fstat(fd)
    with pytest.raises(ValueError, match="no multiples"):
        Pmem(0x1000, 4 << 20)
