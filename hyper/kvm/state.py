"""The state of a vCPU and of what the kernel holds of a VM, as what JSON can hold: numbers, lists, bytes as hex.

The order of restoring matters (Documentation/virt/kvm/api.rst, and what the calls do to each other): CPUID says which
registers there are; XCR0 says how XSAVE is laid out; setting registers drops pending exceptions, so events come after; the
TSC deadline counts only when the LAPIC is in that mode and from the TSC as it is then, so it follows both.

The TSC goes on where it was, for all vCPUs: the difference of each to the host's is kept, and all are shifted alike.
Writing the MSR alone does not do it: KVM may take it for an attempt to synchronize, and ignore it.
"""

from __future__ import annotations

import ctypes
from errno import EINVAL
from typing import Any

from hyper.kvm import api
from hyper.kvm import structs as s
from hyper.kvm.api import call
from hyper.kvm.cpuid import CpuidEntry
from hyper.kvm.errors import KvmError
from hyper.kvm.vcpu import Vcpu
from hyper.kvm.vm import Vm

State = dict[str, Any]
# asm/msr-index.h: fixed and variable MTRRs and their default; part of a processor, but not in KVM's list before Linux 6.6
MTRRS = (*range(0x200, 0x210), 0x250, 0x258, 0x259, *range(0x268, 0x270), 0x2FF)
EFER_SVME, CR4_VMXE = 1 << 12, 1 << 13
CHIPS = (api.KVM_IRQCHIP_PIC_MASTER, api.KVM_IRQCHIP_PIC_SLAVE, api.KVM_IRQCHIP_IOAPIC)
_UNFINISHED = (api.KVM_EXIT_IO, api.KVM_EXIT_MMIO, api.KVM_EXIT_X86_RDMSR, api.KVM_EXIT_X86_WRMSR, api.KVM_EXIT_HYPERCALL)


def save_machine(vm: Vm, vcpus: list[Vcpu], msr_indices: list[int]) -> State:
    """`{"vcpus": [...], "vm": ...}` of a VM none of whose vCPUs runs. `msr_indices`: of Kvm.msr_indices().

    Raises as save_vcpu.
    """
    return {"vcpus": [save_vcpu(vcpu, msr_indices) for vcpu in vcpus], "vm": save_vm(vm)}


def restore_machine(vm: Vm, vcpus: list[Vcpu], state: State) -> None:
    """Into a VM and vCPUs that never ran. Raises as restore_vcpu and restore_vm; ValueError when there are other vCPUs."""
    if len(vcpus) != len(state["vcpus"]):
        raise ValueError(f"the state is of {len(state['vcpus'])} vCPUs, not of {len(vcpus)}")
    shift = None
    for vcpu, saved in zip(vcpus, state["vcpus"], strict=True):
        shift = restore_vcpu(vcpu, saved, shift)
    restore_vm(vm, state["vm"], vcpus)


def save_vcpu(vcpu: Vcpu, msr_indices: list[int]) -> State:
    """All of it; it must not run, and no other vCPU of its VM either.

    Raises:
        ValueError: its last exit is not finished (see Vcpu.run), or it is a hypervisor itself, whose guests are not saved.
    """
    if vcpu.exit.exit_reason in _UNFINISHED:
        raise ValueError(f"vCPU {vcpu.index} is in the middle of an instruction: kick it, and run it until KVM_EXIT_INTR")
    if is_hypervisor(vcpu.sregs):
        raise ValueError(f"vCPU {vcpu.index} has virtualization switched on, and guests of a guest cannot be saved")
    state: State = {"mp_state": vcpu.mp_state}  # first: asking for it may still change the others
    state["regs"] = _hex(vcpu.regs)
    state["sregs"] = _hex(vcpu.sregs)
    state["xcrs"] = _hex(vcpu.xcrs)
    state["xsave"] = vcpu.xsave.hex()
    state["debugregs"] = _hex(vcpu.debugregs)
    state["lapic"] = _hex(vcpu.lapic) if vcpu.has_lapic else None
    state["tsc_khz"] = vcpu.tsc_khz
    state["tsc_offset"] = vcpu.tsc_offset
    state["cpuid"] = [list(entry) for entry in vcpu.cpuid]
    state["msrs"] = {f"{index:#x}": value for index, value in vcpu.get_msrs(dict.fromkeys((*msr_indices, *MTRRS))).items()}
    state["events"] = _hex(vcpu.events)
    return state


def restore_vcpu(vcpu: Vcpu, state: State, shift: int | None = None) -> int | None:
    """Into a vCPU that never ran. The result is how far the host's TSC has moved, for the next vCPU's `shift`.

    Raises KvmError or ValueError when this host cannot hold it, KeyError when it is none.
    """
    vcpu.set_cpuid([CpuidEntry(*entry) for entry in state["cpuid"]])
    if vcpu.tsc_khz != state["tsc_khz"]:
        vcpu.set_tsc_khz(state["tsc_khz"])
    vcpu.set_sregs(_struct(s.kvm_sregs, state["sregs"]))
    vcpu.set_xcrs(_struct(s.kvm_xcrs, state["xcrs"]))
    vcpu.set_xsave(bytes.fromhex(state["xsave"]))
    msrs = {int(index, 16): value for index, value in state["msrs"].items()}
    deadline = msrs.pop(api.MSR_IA32_TSC_DEADLINE, 0)
    vcpu.set_msrs(msrs)
    shift = _restore_tsc(vcpu, state["tsc_offset"], msrs.get(api.MSR_IA32_TSC, 0), shift)
    vcpu.set_regs(_struct(s.kvm_regs, state["regs"]))
    if state["lapic"] is not None:
        vcpu.set_lapic(_struct(s.kvm_lapic_state, state["lapic"]))
    if deadline:
        vcpu.set_msrs({api.MSR_IA32_TSC_DEADLINE: deadline})
    vcpu.set_events(_struct(s.kvm_vcpu_events, state["events"]))
    vcpu.set_debugregs(_struct(s.kvm_debugregs, state["debugregs"]))
    vcpu.set_mp_state(state["mp_state"])
    return shift


def _restore_tsc(vcpu: Vcpu, saved_offset: int | None, saved_tsc: int, shift: int | None) -> int | None:
    offset = vcpu.tsc_offset
    if offset is None or saved_offset is None:
        return None
    if shift is None:
        now = vcpu.get_msrs([api.MSR_IA32_TSC])[api.MSR_IA32_TSC]
        shift = (saved_tsc - saved_offset) - (now - offset)
    vcpu.set_tsc_offset(saved_offset + shift & (1 << 64) - 1)
    return shift


def save_vm(vm: Vm) -> State:
    """The interrupt controllers, the timer and the clock, after the vCPUs. Memory is not in it."""
    state: State = {"clock": vm.get_clock(), "irqchips": None, "pit": None}
    if vm.has_irqchip:
        state["irqchips"] = [_get_chip(vm, chip) for chip in CHIPS]
    if vm.has_pit:
        pit = s.kvm_pit_state2()
        call(vm.fd, api.KVM_GET_PIT2, ctypes.byref(pit))
        state["pit"] = _hex(pit)
    return state


def restore_vm(vm: Vm, state: State, vcpus: list[Vcpu]) -> None:
    """After the vCPUs: controllers that exist, timer, clock; then the guest's watchdogs are told that it was stopped.

    Raises as restore_vcpu; ValueError when the VM has been made with other controllers.
    """
    if (state["irqchips"] is not None) != vm.has_irqchip or (state["pit"] is not None) != vm.has_pit:
        raise ValueError("the state is of a VM with other interrupt controllers or timers")
    for chip in state["irqchips"] or ():
        call(vm.fd, api.KVM_SET_IRQCHIP, ctypes.byref(_struct(s.kvm_irqchip, chip)))
    if state["pit"] is not None:
        call(vm.fd, api.KVM_SET_PIT2, ctypes.byref(_struct(s.kvm_pit_state2, state["pit"])))
    vm.set_clock(state["clock"])
    for vcpu in vcpus:
        try:
            vcpu.kvmclock_ctrl()
        except KvmError as error:
            if error.errno != EINVAL:  # a guest that does not use kvmclock has nothing to be told
                raise


def is_hypervisor(sregs: s.kvm_sregs) -> bool:
    """Has it switched AMD's SVM or Intel's VMX on?"""
    return bool(sregs.efer & EFER_SVME or sregs.cr4 & CR4_VMXE)


def _get_chip(vm: Vm, chip: int) -> str:
    request = s.kvm_irqchip(chip_id=chip)
    call(vm.fd, api.KVM_GET_IRQCHIP, ctypes.byref(request), f"chip {chip}")
    return _hex(request)


def _hex(struct: ctypes.Structure) -> str:
    return bytes(struct).hex()


def _struct(kind: type[ctypes.Structure], text: str) -> Any:
    data = bytes.fromhex(text)
    if len(data) != ctypes.sizeof(kind):
        raise ValueError(f"{kind.__name__} of {len(data)} bytes, not {ctypes.sizeof(kind)}")
    return kind.from_buffer_copy(data)
