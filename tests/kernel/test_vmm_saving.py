"""A machine of our monitor saved and restored: raw guests, so that any /dev/kvm will do."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ambi.core.errors import Corrupt, Unsupported
from ambi.core.loop import Loop
from hyper.vmm import layout, saving, snapshot
from hyper.vmm.config import Config
from hyper.vmm.machine import Ending, Machine
from tests.monitorkit import raw_kernel

pytestmark = pytest.mark.needs("kvm-device")

COUNTER = 0x10_0000
COUNT = b"\xff\x05\x00\x00\x10\x00\xeb\xf8"  # 1: inc dword [100000h]; jmp 1b
MEMORY = 64 * layout.MIB


class Rig:
    """Machines of one file of memory and one kernel."""

    def __init__(self, where: Path) -> None:
        kernel = where / "kernel"
        kernel.write_bytes(raw_kernel(COUNT))
        self.memory = os.memfd_create("memory")
        os.ftruncate(self.memory, MEMORY)
        self.state = os.memfd_create("state")
        console = os.memfd_create("console")
        self.fds = [os.open("/dev/kvm", os.O_RDWR), os.open(kernel, os.O_RDONLY), console, self.memory, self.state]
        self.config = Config(
            self.fds[0], self.fds[1], None, "", vcpus=2, memory_bytes=MEMORY, console=console, memory=self.memory, spares=1
        )
        self.machines: list[Machine] = []

    def machine(self, **changes: object) -> Machine:
        self.machines.append(Machine(self.config._replace(**changes), Loop()))  # type: ignore[arg-type]
        return self.machines[-1]

    def save(self, machine: Machine) -> int:
        """Boot it, save it once it counts, and end it: what the counter was."""
        machine.boot()
        run(machine, lambda: saving.save(machine, self.state))
        return machine.memory.u32(COUNTER)

    def copy(self, **changes: object) -> Machine:
        machine = self.machine(memory_shared=False, **changes)
        saving.restore(machine, snapshot.read_state(self.state))
        return machine

    def close(self) -> None:
        for machine in self.machines:
            machine.close()
        for fd in self.fds:
            os.close(fd)


def run(machine: Machine, then: Callable[[], object]) -> None:
    """Let it count for a while, call `then`, and end it."""
    before = machine.memory.u32(COUNTER)

    def drive() -> None:
        while machine.memory.u32(COUNTER) < before + 10:
            time.sleep(0.001)
        then()
        machine.end("internal", "enough")

    driver = threading.Thread(target=drive)
    driver.start()
    assert machine.run() == Ending("internal", "enough")
    driver.join()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    found = Rig(tmp_path)
    yield found
    found.close()


def test_copies_go_on_where_it_stood_and_change_nothing_of_it(rig: Rig) -> None:
    saved = rig.save(rig.machine())
    for _ in range(2):
        copy = rig.copy()
        assert copy.memory.u32(COUNTER) == saved > 0
        run(copy, lambda: None)
        assert copy.memory.u32(COUNTER) >= saved + 10
    assert int.from_bytes(os.pread(rig.memory, 4, COUNTER), "little") == saved


def test_what_was_saved_stands_still_until_it_is_resumed(rig: Rig) -> None:
    machine = rig.machine()
    machine.boot()
    seen = []

    def save_and_look() -> None:
        saving.save(machine, rig.state)
        for _ in range(2):
            seen.append(machine.memory.u32(COUNTER))
            time.sleep(0.01)
        machine.resume()
        while machine.memory.u32(COUNTER) == seen[0]:
            time.sleep(0.001)

    run(machine, save_and_look)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("change", [{"vcpus": 1}, {"memory_bytes": MEMORY // 2 + 32 * layout.MIB, "spares": 2}])
def test_a_machine_of_another_shape_is_refused(rig: Rig, change: dict[str, int]) -> None:
    rig.save(rig.machine())
    with pytest.raises(Unsupported, match="the saved machine has"):
        rig.copy(**change)


def test_a_state_that_makes_no_sense_is_corrupt(rig: Rig) -> None:
    rig.save(rig.machine())
    saved = snapshot.read_state(rig.state)
    for section in (b"", b"[]", b"{}", saved.sections["machine"].replace(b'"uart"', b'"uatr"')):
        machine = rig.machine(memory_shared=False)
        with pytest.raises(Corrupt, match="makes no sense"):
            saving.restore(machine, saved._replace(sections={"machine": section}))
