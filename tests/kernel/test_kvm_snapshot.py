"""A machine with a raw guest is saved to files, twice, the second time by its dirty log, and goes on from them elsewhere."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack

import pytest

from hyper.kvm import api, state
from hyper.kvm.memory import Memory
from hyper.kvm.vcpu import Vcpu
from hyper.vmm.memory import GuestMemory
from hyper.vmm.snapshot import Saved, read_state, refuse_other_host, this_host, write_state
from hyper.vmm.snapshot_memory import Chain, unpack_runs, write_memory
from tests.kvmkit import SIZE, Guest

pytestmark = pytest.mark.needs("kvm-device")

COUNTING = """
    bf 00 00 10 00          ; mov edi, 0x100000
    31 db                   ; xor ebx, ebx
    43                      ; 1: inc ebx
    89 1f                   ; mov [edi], ebx
    81 c7 00 10 00 00       ; add edi, 0x1000: a page each
    88 d8                   ; mov al, bl
    e6 80                   ; out 0x80, al
    83 fb 08                ; cmp ebx, 8
    75 ee                   ; jne 1b
    f4                      ; hlt
"""


def count_to(vcpu: Vcpu, number: int) -> None:
    """Run until the guest said `number`, and that instruction is finished."""
    said = 0
    while said < number:
        assert vcpu.run() == api.KVM_EXIT_IO, vcpu.describe_exit()
        said = vcpu.io_data()[0]
    vcpu.kick()
    assert vcpu.run() == api.KVM_EXIT_INTR


def save(files: ExitStack, guest: Guest, parent: Chain | None) -> tuple[Saved, int]:
    state_fd, memory_fd = (os.memfd_create(name, os.MFD_CLOEXEC) for name in ("state", "memory"))
    files.callback(os.close, state_fd)
    files.callback(os.close, memory_fd)
    ram = GuestMemory([(0, guest.memory)])
    log = guest.vm.dirty_log(0)
    sections = write_memory(memory_fd, ram, parent, [log] if parent else None)
    sections["machine"] = json.dumps(state.save_machine(guest.vm, guest.vcpus, guest.kvm.msr_indices())).encode()
    host = this_host(guest.kvm.supported_cpuid())
    write_state(state_fd, host, [(0, SIZE)], sections, parent=parent.top.id if parent else None)
    return read_state(state_fd), memory_fd


def go_on(guest: Guest, saved: Saved) -> list[int]:
    """What the guest says from there to its end."""
    refuse_other_host(saved.host, this_host(guest.kvm.supported_cpuid()))
    guest.vcpus.append(guest.vm.create_vcpu(0))
    state.restore_machine(guest.vm, guest.vcpus, json.loads(saved.sections["machine"]))
    said = []
    while guest.vcpus[0].run() == api.KVM_EXIT_IO:
        said.append(guest.vcpus[0].io_data()[0])
    assert guest.vcpus[0].exit.exit_reason == api.KVM_EXIT_HLT
    counters = [int.from_bytes(guest.memory.view[at : at + 4], "little") for at in range(0x100000, 0x108000, 0x1000)]
    assert counters == list(range(1, 9)), "memory from before the snapshot, and from after it"
    return said


def test_a_machine_goes_on_from_its_files() -> None:
    with ExitStack() as files:
        with Guest() as guest:
            guest.vm.log_dirty(0, True)
            vcpu = guest.protected(COUNTING)
            count_to(vcpu, 2)
            first = save(files, guest, None)
            count_to(vcpu, 5)
            second = save(files, guest, Chain([first]))
        pages = {page for start, end in unpack_runs(second[0]) for page in range(start, end)}
        assert pages == {0x102, 0x103, 0x104}, "only what was written since"

        with Guest() as loaded:
            Chain([first, second]).load(GuestMemory([(0, loaded.memory)]))
            assert go_on(loaded, second[0]) == [6, 7, 8]
        for _ in range(2):  # twice from one file: what a guest writes stays its own
            with Guest(memory=Memory.of_file(first[1], SIZE, shared=False)) as mapped:
                assert go_on(mapped, first[0]) == [3, 4, 5, 6, 7, 8]
        Chain([first, second]).check()
