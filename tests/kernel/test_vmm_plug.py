"""Devices that come and go, and memory that becomes a file, in a machine of our monitor: on any /dev/kvm."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ambi.core.errors import Conflict, InvalidRequest, NotFound
from ambi.core.loop import Loop
from hyper.kvm.memory import HUGE, Memory
from hyper.vmm import layout, plugging
from hyper.vmm.config import Config
from hyper.vmm.fill import fill
from hyper.vmm.machine import Machine
from hyper.vmm.virtio import registers as reg
from tests.monitorkit import SPIN, raw_kernel

pytestmark = pytest.mark.needs("kvm-device")
SPARES = 3


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    before = len(os.listdir("/proc/self/fd"))
    (tmp_path / "kernel").write_bytes(raw_kernel(SPIN))
    fds = [os.open("/dev/kvm", os.O_RDWR), os.open(tmp_path / "kernel", os.O_RDONLY), os.memfd_create("console")]
    made = Machine(
        Config(fds[0], fds[1], None, "", vcpus=1, memory_bytes=64 * layout.MIB, console=fds[2], spares=SPARES), Loop()
    )
    made.start()
    yield made
    made.end("internal", "the test is over")
    made.vcpus.join()
    made.close()
    for fd in fds:
        os.close(fd)
    assert len(os.listdir("/proc/self/fd")) == before, "a machine leaves no descriptor behind"


def plug(machine: Machine, serial: str) -> int:
    fd = os.memfd_create(serial)
    os.ftruncate(fd, 1 << 20)
    try:
        return int(plugging.plug(machine, {"kind": "disk", "serial": serial}, [fd])["slot"])
    finally:
        os.close(fd)


def device_id(machine: Machine, slot: int) -> int:
    page = machine._page(slot).cast("I")
    return page[reg.DEVICE_ID // 4]


def test_slots_are_used_again(machine: Machine) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    first = len(machine.transports)
    slots = [plug(machine, f"disk{number}") for number in range(SPARES)]
    assert slots == list(range(first, first + SPARES))
    assert [device_id(machine, slot) for slot in slots] == [2] * SPARES
    with pytest.raises(Conflict, match="no empty slot"):
        plug(machine, "one too many")
    for _ in range(3):
        plugging.unplug(machine, {"slot": slots[1]})
        assert [device_id(machine, slot) for slot in slots] == [2, 0, 2]
        with pytest.raises(NotFound, match=f"no device in slot {slots[1]}"):
            plugging.unplug(machine, {"slot": slots[1]})
        assert f"blk{slots[1]}" not in machine.counters()
        assert plug(machine, "again") == slots[1]
    for slot in slots:
        plugging.unplug(machine, {"slot": slot})
    assert len(machine.transports) == first and len(os.listdir("/proc/self/fd")) == descriptors


def test_what_is_no_device_is_refused(machine: Machine) -> None:
    first = len(machine.transports)
    with pytest.raises(InvalidRequest, match="kind 'printer'"):
        plugging.plug(machine, {"kind": "printer"}, [0])
    with pytest.raises(InvalidRequest, match="one descriptor"):
        plugging.plug(machine, {"kind": "disk", "serial": "x"}, [])
    with pytest.raises(InvalidRequest, match="a slot"):
        plugging.unplug(machine, {"slot": "2"})
    assert len(machine.transports) == first and machine.has_room


def test_memory_becomes_a_file_in_its_place(machine: Machine) -> None:
    view = machine.memory.view(0x20_0000, 4096)
    view[:5] = b"guest"
    machine.memory.write(0x3FF_F000, b"the end")
    addresses = [memory.address for memory in machine.ram]
    assert machine.config.memory < 0
    fd = machine.share_memory()
    assert machine.share_memory() == fd == machine.config.memory
    assert os.pread(fd, 5, 0x20_0000) == b"guest" and os.pread(fd, 7, 0x3FF_F000) == b"the end"
    view[:5] = b"later"
    assert os.pread(fd, 5, 0x20_0000) == b"later" and [memory.address for memory in machine.ram] == addresses
    assert os.fstat(fd).st_blocks * 512 < 4 * HUGE, "what was never touched takes no room"


def test_what_is_not_there_is_not_touched(tmp_path: Path) -> None:
    """Of a private copy of a file, the holes of which a fault would fill."""
    template, pagemap = os.memfd_create("template"), os.open("/proc/self/pagemap", os.O_RDONLY)
    size = 64 * layout.MIB
    os.ftruncate(template, size)
    for at in (0, 3 * HUGE, size - 4096):
        os.pwrite(template, b"template", at)
    blocks = os.fstat(template).st_blocks
    (tmp_path / "kernel").write_bytes(raw_kernel(SPIN))
    fds = [os.open("/dev/kvm", os.O_RDWR), os.open(tmp_path / "kernel", os.O_RDONLY), os.memfd_create("console")]
    config = Config(
        fds[0], fds[1], None, "", vcpus=1, memory_bytes=size, console=fds[2], memory=template, memory_shared=False
    )
    made = Machine(config._replace(pagemap=pagemap), Loop())
    made.memory.write(3 * HUGE + 4096, b"guest")
    made.memory.write(HUGE, b"guest")
    fd = made.share_memory()
    found = [os.pread(fd, 8, at).rstrip(b"\0") for at in (0, HUGE, 3 * HUGE, 3 * HUGE + 4096, size - 4096)]
    assert found == [b"template", b"guest", b"template", b"guest", b"template"]
    assert made.memory.read(3 * HUGE, 8) == b"template" and made.memory.read(HUGE, 5) == b"guest"
    assert os.fstat(template).st_blocks <= blocks + 16, "the file has got what the guest wrote to, and no more"
    made.close()
    for opened in (*fds, template, pagemap):
        os.close(opened)


def test_filled_from_what_a_file_has() -> None:
    source = os.memfd_create("template")
    os.ftruncate(source, 3 * HUGE)
    for at in (0, HUGE - 4096, 2 * HUGE, 3 * HUGE - 4096):
        os.pwrite(source, at.to_bytes(8, "little") + b"x", at)
    with Memory.memfd(2 * HUGE) as memory:
        fill(memory.view, source, HUGE)  # the second and the third part of it
        assert os.fstat(memory.fd).st_blocks * 512 == 2 * 4096
        assert bytes(memory.view) == os.pread(source, 2 * HUGE, HUGE)
    os.ftruncate(source, HUGE)
    with Memory.memfd(2 * HUGE) as memory:
        fill(memory.view, source, HUGE)
        assert not any(bytes(memory.view[:4096]))
    os.close(source)


def test_memory_for_which_there_is_no_room_stays(tmp_path: Path) -> None:
    """Of a file that cannot be written there is none; the memory is what it was."""
    fd = os.memfd_create("small")
    os.ftruncate(fd, 2 * HUGE)
    readonly = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    with Memory(2 * HUGE) as memory:
        memory.view[:5] = memory.view[HUGE : HUGE + 5] = b"guest"
        with pytest.raises(OSError) as error:
            memory.share(readonly, 0)
        assert error.value.errno in (errno.EBADF, errno.EACCES)
        assert bytes(memory.view[:5]) == bytes(memory.view[HUGE : HUGE + 5]) == b"guest" and not memory.shared
    os.close(readonly)
    os.close(fd)
