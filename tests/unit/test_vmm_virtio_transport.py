"""The transport and its queues, by an echo device that a driver uses right and wrong."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator

import pytest

from hyper.vmm.virtio import registers as reg
from hyper.vmm.virtio.device import Device
from hyper.vmm.virtio.mmio import clear
from hyper.vmm.virtio.queue import INDIRECT, NEXT, WRITE, fill
from tests.virtiokit import DATA, F_EVENT_IDX, F_INDIRECT, F_VERSION_1, RAM, RAM_BYTES, Buffers, Driver

GIB = 1 << 30


class Echo(Device):
    """Writes what it reads to where it may write; its configuration is a counter that the driver may set."""

    device_id = 63
    name = "echo"
    queue_sizes = (8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.number = 7
        self.closed = 0

    def config(self) -> bytes:
        return struct.pack("<I", self.number)

    def write_config(self, offset: int, data: bytes) -> None:
        self.number = data[0]
        self.port.config_changed()

    def notified(self, index: int) -> None:
        queue = self.queues[index]
        assert queue is not None
        for chain in queue.chains():
            queue.push(chain, fill(chain.writable, b"".join(chain.readable)))
            self.counts["requests"] += 1
        queue.signal()

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def driver() -> Iterator[Driver]:
    made = Driver(Echo())
    yield made
    made.close()


def echo(driver: Driver, text: bytes, index: int = 0, *, indirect: bool = False) -> bytes:
    ring = driver.rings[index]
    target = driver.writable(len(text))
    half = len(text) // 2
    head = ring.add(
        [driver.readable(text[:half]), driver.readable(text[half:]), target], indirect=driver.data(48) if indirect else 0
    )
    driver.kick(index)
    assert ring.got() == [(head, len(text))]
    return driver.bytes(target)


def broken(driver: Driver, index: int = 0) -> str:
    """Kick, see that the device says it needs a reset, and that it works after one; what it says of why."""
    driver.transport.broken = pytest.fail  # that is for what the host did
    driver.kick(index)
    assert driver.read(reg.STATUS) & reg.NEEDS_RESET
    assert driver.interrupted() and driver.read(reg.INTERRUPT_STATUS) == 3
    why = driver.transport.failure
    driver.reset()
    driver.start()
    assert echo(driver, b"again") == b"again"
    return why


def test_page_of_a_device(driver: Driver) -> None:
    expect = {0: 0x74726976, 4: 2, 8: 63, 0x44: 0, 0x60: 1, 0x70: 0, 0xB0: 0xFFFFFFFF, 0xBC: 0xFFFFFFFF, 0x100: 7, 0x34: 8}
    assert {at: driver.read(at) for at in expect} == expect
    assert driver.transport.read(0x100, 4) == b"\7\0\0\0"
    driver.write(reg.QUEUE_SELECT, 2)
    assert driver.read(reg.QUEUE_SIZE_MAX) == 0
    assert driver.offered() == F_VERSION_1 | F_EVENT_IDX | F_INDIRECT
    driver.write(reg.DEVICE_FEATURES_SELECT, 2)
    assert driver.read(reg.DEVICE_FEATURES) == 0


def test_empty_slot() -> None:
    page = memoryview(bytearray(b"\xff" * 4096))
    clear(page)
    assert bytes(page[:12]) == b"virt\2\0\0\0\0\0\0\0" and not any(page[12:])


def test_requests_without_an_exit(driver: Driver) -> None:
    driver.start()
    driver.interrupted()
    writes = driver.transport.writes
    for number in range(14):
        assert echo(driver, b"number %d" % number, number % 2, indirect=bool(number % 3)) == b"number %d" % number
        assert driver.interrupted()
        driver.write(reg.INTERRUPT_ACK, driver.read(reg.INTERRUPT_STATUS))
    assert driver.transport.writes == writes
    assert driver.transport.counters()["requests"] == 14


def test_indices_wrap(driver: Driver) -> None:
    driver.start()
    ring, queue = driver.rings[0], driver.device.queues[0]
    assert queue is not None
    queue.restore({"next": 0xFFFE, "used": 0xFFFE})
    ring.available = ring.used = 0xFFFE
    driver.memory.put_u16(ring.device + 2, 0xFFFE)
    ring.got()
    for number in range(5):
        assert echo(driver, b"wrap%d" % number) == b"wrap%d" % number
        assert driver.interrupted()


def test_event_index_suppresses(driver: Driver) -> None:
    driver.start()
    driver.interrupted()
    ring = driver.rings[0]
    driver.memory.put_u16(ring.driver + 4 + 2 * ring.size, 2)  # tell us when the third is used
    for number in range(3):
        ring.add([driver.readable(b"x")])
        driver.kick(0)
        assert driver.interrupted() == (number == 2)
    assert driver.memory.u16(ring.device + 4 + 8 * ring.size) == 3, "the device did not say which it wants to hear of"


def test_flag_suppresses_without_event_index(driver: Driver) -> None:
    driver.start(F_VERSION_1)
    driver.interrupted()
    ring = driver.rings[0]
    for flag in (1, 0):
        driver.memory.put_u16(ring.driver, flag)
        ring.add([driver.readable(b"x")])
        driver.kick(0)
        assert driver.interrupted() == (not flag)


def test_more_than_a_turn(driver: Driver) -> None:
    """What was added while the device worked is not forgotten, and other devices come between."""
    driver.start()
    ring = driver.rings[0]
    for _ in range(8):
        ring.add([driver.readable(b"ab")])
    driver.write(reg.QUEUE_NOTIFY, 0)
    driver.turn()
    assert len(ring.got()) == 8


def test_features_are_checked(driver: Driver) -> None:
    for features in (0, F_VERSION_1 | 1 << 40, F_EVENT_IDX, F_VERSION_1 | 1):
        driver.negotiate(features)
        assert not driver.read(reg.STATUS) & reg.FEATURES_OK
        driver.write(reg.STATUS, 15)
        assert not driver.read(reg.STATUS) & reg.DRIVER_OK
        driver.reset()
    driver.start(F_VERSION_1)
    driver.write(reg.DRIVER_FEATURES_SELECT, 0)
    driver.write(reg.DRIVER_FEATURES, 0xFFFFFFFF)
    assert driver.transport._features == F_VERSION_1, "features change no more once they were agreed on"
    driver.write(reg.STATUS, reg.ACKNOWLEDGE)
    assert driver.read(reg.STATUS) == 15, "only a reset takes a status bit away"


def test_configuration(driver: Driver) -> None:
    driver.transport.write(reg.CONFIG, b"\5")
    assert driver.config(0, 4) == 7, "a device that is not started has its configuration written"
    driver.start()
    driver.interrupted()
    generation = driver.read(reg.CONFIG_GENERATION)
    driver.transport.write(reg.CONFIG, b"\x2a")
    assert driver.config(0, 4) == 42 and driver.read(reg.CONFIG_GENERATION) != generation
    assert driver.interrupted() and driver.read(reg.INTERRUPT_STATUS) == 3
    driver.write(reg.INTERRUPT_ACK, 1)
    assert driver.read(reg.INTERRUPT_STATUS) == 3, "the driver has not seen the change yet"
    driver.write(reg.INTERRUPT_ACK, 3)
    assert driver.read(reg.INTERRUPT_STATUS) == 1
    assert echo(driver, b"ok") == b"ok"


@pytest.mark.parametrize(
    ("offset", "data"),
    [
        (0x50, b"\7\0\0\0"),
        (0x50, b"\0"),
        (0x70, b"\0\0"),
        (0x33, b"\1\2\3\4"),
        (0, b"\1\2\3\4"),
        (0x54, b"\0" * 8),
    ],
)
def test_nonsense_in_registers_is_ignored(driver: Driver, offset: int, data: bytes) -> None:
    driver.start()
    driver.transport.write(offset, data)
    assert echo(driver, b"still") == b"still"


def test_queue_registers_hold_while_it_is_ready(driver: Driver) -> None:
    driver.start()
    driver.write(reg.QUEUE_SELECT, 0)
    driver.write(reg.QUEUE_SIZE, 4)
    driver.write(reg.QUEUE_DESCRIPTORS, 0)
    assert echo(driver, b"held") == b"held"
    driver.write(reg.QUEUE_READY, 0)
    assert driver.read(reg.STATUS) & reg.NEEDS_RESET and driver.read(reg.QUEUE_READY) == 0


@pytest.mark.parametrize(
    ("size", "addresses", "why"),
    [
        (16, (RAM, RAM + 0x1000, RAM + 0x2000), "16 entries where 8 are most"),
        (6, (RAM, RAM + 0x1000, RAM + 0x2000), "6 entries"),
        (0, (RAM, RAM + 0x1000, RAM + 0x2000), "0 entries"),
        (8, (RAM + 8, RAM + 0x1000, RAM + 0x2000), "not aligned"),
        (8, (RAM, RAM + 0x1001, RAM + 0x2000), "not aligned"),
        (8, (RAM, RAM + 0x1000, RAM + 0x2002), "not aligned"),
        (8, (0, RAM + 0x1000, RAM + 0x2000), "at 0x0 are not"),
        (8, (RAM, RAM + RAM_BYTES - 16, RAM + 0x2000), "22 bytes"),
        (8, (RAM, RAM + 0x1000, (1 << 64) - 4), "are not in"),
    ],
)
def test_bad_queues(driver: Driver, size: int, addresses: tuple[int, int, int], why: str) -> None:
    driver.negotiate()
    driver.set_queue(0, size, addresses)
    driver.write(reg.STATUS, 15)
    assert why in broken(driver)


def test_descriptor_loop(driver: Driver) -> None:
    ring = driver.start().rings[0]
    ring.describe(0, DATA, 16, NEXT, 1)
    ring.describe(1, DATA, 16, NEXT, 0)
    ring.offer(0)
    assert "more than 8" in broken(driver)


@pytest.mark.parametrize(
    ("address", "length", "flags", "following", "why"),
    [
        (0, 16, 0, 0, "are not in"),
        (RAM + RAM_BYTES - 8, 16, 0, 0, "are not in"),
        ((1 << 64) - 8, 16, 0, 0, "are not in"),
        (DATA, 0xFFFFFFFF, 0, 0, "are not in"),
        (DATA, 0, 0, 0, "no bytes"),
        (DATA, 16, NEXT, 8, "descriptor 8 of 8"),
        (DATA, 16, NEXT, 0xFFFF, "descriptor 65535"),
        (DATA, 15, INDIRECT, 0, "indirect"),
        (DATA, 0, INDIRECT, 0, "indirect"),
        (DATA, 16, INDIRECT | NEXT, 0, "indirect"),
        (0, 16, INDIRECT, 0, "are not in"),
    ],
)
def test_bad_descriptors(driver: Driver, address: int, length: int, flags: int, following: int, why: str) -> None:
    ring = driver.start().rings[0]
    ring.describe(0, address, length, flags, following)
    ring.offer(0)
    assert why in broken(driver)


def test_bad_chains(driver: Driver) -> None:
    ring = driver.start().rings[0]
    ring.add([Buffers(DATA, 8, True), Buffers(DATA, 8, False)])
    assert "after a writable" in broken(driver)
    ring = driver.rings[0]
    driver.memory.write(DATA, struct.pack("<QIHH", DATA, 16, INDIRECT, 0))
    ring.describe(0, DATA, 16, INDIRECT)
    ring.offer(0)
    assert "nested" in broken(driver)
    ring = driver.rings[0]
    driver.memory.write(DATA, b"".join(struct.pack("<QIHH", DATA, 1, NEXT, n + 1) for n in range(64)))
    ring.describe(0, DATA, 16 * 64, INDIRECT)
    ring.offer(0)
    assert "more than 8" in broken(driver)
    ring = driver.rings[0]
    ring.offer(9)
    assert "descriptor 9 of 8" in broken(driver)
    ring = driver.rings[0]
    driver.memory.put_u16(ring.driver + 2, 1000)
    assert "available index" in broken(driver)


def test_direct_descriptors_before_an_indirect_table(driver: Driver) -> None:
    """Section 2.7.5.3.2: zero or more of them, then one table."""
    ring = driver.start().rings[0]
    target = driver.writable(4)
    table = driver.data(16, struct.pack("<QIHH", target.address, 4, WRITE, 0))
    first = driver.readable(b"abcd")
    ring.describe(0, first.address, 4, NEXT, 1)
    ring.describe(1, table, 16, INDIRECT)
    ring.offer(0)
    driver.kick(0)
    assert ring.got() == [(0, 4)] and driver.bytes(target) == b"abcd"


def test_reset_forgets(driver: Driver) -> None:
    driver.start()
    ring = driver.rings[0]
    target = driver.writable(4)
    ring.add([driver.readable(b"late"), target])
    driver.write(reg.QUEUE_NOTIFY, 0)
    driver.write(reg.STATUS, 0)  # before the loop has seen the kick
    driver.turn()
    assert driver.bytes(target) == bytes(4) and ring.got() == []
    assert driver.read(reg.STATUS) == 0 and driver.read(reg.QUEUE_READY) == 0
    driver.rings = []
    driver.start()
    assert echo(driver, b"back") == b"back"


def test_a_vcpu_wakes_the_loop() -> None:
    """A device that is started by another thread has its descriptors watched by a loop that waits already."""

    class Listener(Echo):
        def __init__(self, fd: int) -> None:
            super().__init__()
            self.fd = fd
            self.heard = b""

        def activate(self, queues, features) -> None:  # type: ignore[no-untyped-def]
            super().activate(queues, features)
            self.port.watch(self.fd, 1, self._ready)

        def _ready(self, _: int) -> None:
            self.heard += os.read(self.fd, 10)

    reader, writer = os.pipe()
    device = Listener(reader)
    driver = Driver(device)
    loop = threading.Thread(target=lambda: driver.transport._loop.run(lambda: bool(device.heard)))
    driver.transport._thread = -1  # no thread of ours is the loop's
    loop.start()
    driver.start()
    os.write(writer, b"hello")
    loop.join(20)
    assert device.heard == b"hello"
    driver.close()
    os.close(reader)
    os.close(writer)


def test_save_and_restore(driver: Driver) -> None:
    driver.start()
    for number in range(3):
        echo(driver, b"before %d" % number, number % 2)
    driver.transport.write(reg.CONFIG, b"\x09")
    ring = driver.rings[0]
    target = driver.writable(4)
    ring.add([driver.readable(b"owed"), target])
    driver.write(reg.QUEUE_NOTIFY, 0)  # nobody has looked when the machine is saved
    state = driver.transport.save()

    other = Driver(Echo(), ram=driver.backing)
    other.transport.restore(state)
    other.rings, other.features = driver.rings, driver.features
    other.transport.resume()
    assert other.interrupted(), "an interrupt that was owed is not raised"
    other.turn()
    assert other.rings[0].got() == [(ring._free - 2, 4)] and other.bytes(target) == b"owed"
    assert echo(other, b"goes on", 1) == b"goes on"
    assert other.transport.save()["status"] == 15
    other.close()


@pytest.mark.parametrize(
    ("key", "value"),
    [("device", 1), ("features", 1 << 33 | F_VERSION_1), ("features", "x"), ("status", -1), ("queues", []), ("queues", None),
     ("queues", [{"size": 8, "ready": 1, "words": [0] * 5, "indices": None}] * 2),
     ("queues", [{"size": "8", "ready": 1, "words": [0] * 6, "indices": None}] * 2),
     ("queues", [3, 4]), ("state", 5)],
)  # fmt: skip
def test_restore_refuses(driver: Driver, key: str, value: object) -> None:
    driver.start()
    state = driver.transport.save() | {key: value}
    with pytest.raises((ValueError, KeyError, TypeError)):
        driver.transport.restore(state)


def test_restore_of_a_bad_queue_needs_a_reset(driver: Driver) -> None:
    driver.start()
    state = driver.transport.save()
    queues = state["queues"]
    assert isinstance(queues, list)
    queues[0]["words"][0] = 4
    driver.transport.restore(state)
    assert driver.read(reg.STATUS) & reg.NEEDS_RESET and "aligned" in driver.transport.failure


def test_close_twice() -> None:
    before = set(os.listdir("/proc/self/fd"))
    driver = Driver(Echo())
    driver.start()
    driver.close()
    driver.close()
    assert isinstance(driver.device, Echo) and driver.device.closed == 1
    del driver
    assert len(os.listdir("/proc/self/fd")) <= len(before) + 1  # the loop has none of its own; the listing does
