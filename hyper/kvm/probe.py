"""Does /dev/kvm run guest code, or does it emulate it, instruction by instruction?

A guest of 10,000 instructions of flat 32-bit code is timed against the same instructions run natively. On hardware, and in
a nested hypervisor, the two differ by a small factor and the cost of an entry; where KVM can only emulate (a host that is
itself a guest without nested virtualization, some paravirtual KVMs) they differ by three orders of magnitude, and Linux
would need minutes to boot. An entry may cost from 1 to 300 us, so it is measured too, with a loop of one round.
"""

from __future__ import annotations

import errno
import time

from hyper.kvm import api
from hyper.kvm.code import loop, native_loop_seconds
from hyper.kvm.memory import PAGE, Memory
from hyper.kvm.structs import kvm_regs, kvm_segment
from hyper.kvm.system import Kvm
from hyper.kvm.vcpu import Vcpu

ROUNDS = 5000
ENTRY = PAGE
HLT = b"\xf4"

FACTOR = 50  # a guest that is slower than this, against native code, is emulated
ENTRIES = 3  # so many times what an entry and an exit cost, on top
GRACE_S = 0.0005  # and this, for a host that does other things as well


def problem(device: str = "/dev/kvm") -> str | None:
    """Why KVM is of no use here, as half a sentence; None when it runs guest code at speed. Takes 20 to 80 ms."""
    try:
        took, entry = _guest_seconds(device)
    except FileNotFoundError:
        return f"there is no {device}"
    except PermissionError as error:
        return f"{device} cannot be opened: {error.strerror}"
    except OSError as error:
        return f"{device} cannot run a guest: {error.strerror or error}"
    limit = FACTOR * native_loop_seconds(ROUNDS) + ENTRIES * entry + GRACE_S
    if took > limit:
        ms = f"{took * 1000:.1f} ms for code that takes {limit * 1000:.1f} ms at most on a true one"
        return f"{device} only emulates: {ms}"
    return None


def _guest_seconds(device: str) -> tuple[float, float]:
    """What ROUNDS of the loop take in a new guest, the best of three, and what one round takes. Raises OSError."""
    with Kvm(device) as kvm, kvm.create_vm() as vm, Memory(2 * PAGE) as memory:
        vm.add_memory(0, 0, memory)
        with vm.create_vcpu(0) as vcpu:
            _set_flat(vcpu)
            _run(vcpu, memory, 1)  # what is made at the first entry is not counted
            entry = min(_run(vcpu, memory, 1) for _ in range(3))
            return min(_run(vcpu, memory, ROUNDS) for _ in range(3)), entry


def _set_flat(vcpu: Vcpu) -> None:
    """Protected mode, every segment from 0 to 4 GiB."""
    sregs = vcpu.sregs
    sregs.cs = kvm_segment(0, 0xFFFFFFFF, 8, 11, 1, 0, 1, 1, 0, 1)
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(sregs, name, kvm_segment(0, 0xFFFFFFFF, 16, 3, 1, 0, 1, 1, 0, 1))
    sregs.cr0 |= 1
    vcpu.set_sregs(sregs)


def _run(vcpu: Vcpu, memory: Memory, rounds: int) -> float:
    code = loop(rounds) + HLT
    memory.view[ENTRY : ENTRY + len(code)] = code
    vcpu.set_regs(kvm_regs(rip=ENTRY, rflags=2))
    before = time.perf_counter()
    reason = vcpu.run()
    took = time.perf_counter() - before
    if reason != api.KVM_EXIT_HLT:
        raise OSError(errno.EPROTO, f"the guest stopped with {vcpu.describe_exit()}")
    return took
