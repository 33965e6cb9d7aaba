"""Does /dev/kvm run guest code, or does it emulate it, instruction by instruction?

A guest of 200,000 instructions of flat 32-bit code is timed against the same instructions run natively. On hardware, and in
a nested hypervisor, the two differ by a small factor; where KVM can only emulate (a host that is itself a guest without
nested virtualization, some paravirtual KVMs) they differ by three orders of magnitude, and Linux would need minutes to boot.

Structs and numbers: linux/kvm.h, asm/kvm.h (x86-64).
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
import time

from hyper.kvm.code import LOOP, native_loop_seconds

KVM_GET_API_VERSION = 0xAE00
KVM_CREATE_VM = 0xAE01
KVM_GET_VCPU_MMAP_SIZE = 0xAE04
KVM_CREATE_VCPU = 0xAE41
KVM_SET_USER_MEMORY_REGION = 0x4020AE46
KVM_SET_TSS_ADDR = 0xAE47
KVM_RUN = 0xAE80
KVM_SET_REGS = 0x4090AE82
KVM_GET_SREGS = 0x8138AE83
KVM_SET_SREGS = 0x4138AE84
KVM_EXIT_HLT = 5
SREGS_SIZE = 312
SEGMENT = struct.Struct("<QIHBBBBBBBBBB")  # kvm_segment: base, limit, selector, type, present, dpl, db, s, l, g, avl, ...
CR0_AT = 8 * SEGMENT.size + 2 * 16  # behind cs ds es fs gs ss tr ldt and the two descriptor tables
EXIT_REASON_AT = 8  # in kvm_run
ENTRY = 0x1000
HLT = b"\xf4"

FACTOR = 50  # a guest that is slower than this, against native code, is emulated
GRACE_S = 0.01  # what one entry and one exit may cost anywhere


def problem(device: str = "/dev/kvm") -> str | None:
    """Why KVM is of no use here, as half a sentence; None when it runs guest code at speed. Takes up to 0.2 s."""
    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return f"there is no {device}"
    except OSError as error:
        return f"{device} cannot be opened: {error.strerror}"
    try:
        if fcntl.ioctl(fd, KVM_GET_API_VERSION) != 12:
            return f"{device} has another API version than 12"
        took = _guest_loop_seconds(fd)
    except OSError as error:
        return f"{device} cannot run a guest: {error.strerror or error}"
    finally:
        os.close(fd)
    limit = FACTOR * native_loop_seconds() + GRACE_S
    if took > limit:
        return (
            f"{device} only emulates: {took * 1000:.0f} ms for code that takes {limit * 1000:.0f} ms at most on a true one"
        )
    return None


def _guest_loop_seconds(kvm: int) -> float:
    """Run LOOP in a new guest; the better of two runs. Raises OSError, also for a guest that does not reach its end."""
    vm = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
    vcpu = -1
    memory = mmap.mmap(-1, 4 * mmap.PAGESIZE)
    try:
        memory[ENTRY : ENTRY + len(LOOP) + 1] = LOOP + HLT
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        fcntl.ioctl(vm, KVM_SET_TSS_ADDR, 0x10000000)  # any page that is free; older Intel wants one
        fcntl.ioctl(vm, KVM_SET_USER_MEMORY_REGION, struct.pack("<IIQQQ", 0, 0, 0, len(memory), address))
        vcpu = fcntl.ioctl(vm, KVM_CREATE_VCPU, 0)
        with mmap.mmap(vcpu, fcntl.ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE)) as run:
            return min(_run(vcpu, run), _run(vcpu, run))
    finally:
        if vcpu >= 0:
            os.close(vcpu)
        os.close(vm)


def _run(vcpu: int, run: mmap.mmap) -> float:
    sregs = bytearray(fcntl.ioctl(vcpu, KVM_GET_SREGS, bytes(SREGS_SIZE)))
    code = SEGMENT.pack(0, 0xFFFFFFFF, 8, 11, 1, 0, 1, 1, 0, 1, 0, 0, 0)
    data = SEGMENT.pack(0, 0xFFFFFFFF, 16, 3, 1, 0, 1, 1, 0, 1, 0, 0, 0)
    sregs[: 6 * SEGMENT.size] = code + 5 * data
    cr0 = int.from_bytes(sregs[CR0_AT : CR0_AT + 8], "little") | 1  # protected mode
    sregs[CR0_AT : CR0_AT + 8] = cr0.to_bytes(8, "little")
    fcntl.ioctl(vcpu, KVM_SET_SREGS, bytes(sregs))
    fcntl.ioctl(vcpu, KVM_SET_REGS, struct.pack("<18Q", *([0] * 16), ENTRY, 2))  # rip, rflags
    before = time.perf_counter()
    fcntl.ioctl(vcpu, KVM_RUN, 0)
    took = time.perf_counter() - before
    reason = int.from_bytes(run[EXIT_REASON_AT : EXIT_REASON_AT + 4], "little")
    if reason != KVM_EXIT_HLT:
        raise OSError(0, f"the guest stopped with exit reason {reason}")
    return took
