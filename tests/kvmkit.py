"""Raw guests for the tests of hyper/kvm: machine code with its mnemonics, and a VM that runs it in a given mode."""

from __future__ import annotations

import struct
from collections.abc import Callable

from hyper.kvm import api
from hyper.kvm.memory import Memory
from hyper.kvm.structs import kvm_segment
from hyper.kvm.system import Kvm
from hyper.kvm.vcpu import Vcpu
from hyper.kvm.vm import Vm

ENTRY = 0x1000
STACK = 0x8000
GDT = 0x9000
IDT = 0xA000
TABLES = 0xB000  # of pages: three levels, a page each
SIZE = 2 << 20
CODE_SELECTOR, DATA_SELECTOR = 8, 16


def assembled(text: str) -> bytes:
    """The bytes of lines like `b0 0a  ; mov al, 10`; what is behind the semicolon is for people."""
    return bytes.fromhex("".join(line.split(";")[0] for line in text.splitlines()))


class Guest:
    """A VM with SIZE bytes at 0, and vCPUs in real, protected (flat, 32 bits) or long mode (identity mapped)."""

    def __init__(self, *, irqchip: bool = False, memory: Memory | None = None) -> None:
        self.kvm = Kvm()
        self.vm: Vm = self.kvm.create_vm()
        self.memory = memory or Memory(SIZE)
        self.vm.add_memory(0, 0, self.memory)
        if irqchip:
            self.vm.create_irqchip()
        self.vcpus: list[Vcpu] = []

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *exc: object) -> None:
        for vcpu in self.vcpus:
            vcpu.close()
        self.vm.close()
        self.kvm.close()
        self.memory.close()

    def put(self, address: int, data: bytes) -> None:
        self.memory.view[address : address + len(data)] = data

    def vcpu(self) -> Vcpu:
        """The next one, as reset left it; with the host's CPUID."""
        vcpu = self.vm.create_vcpu(len(self.vcpus))
        self.vcpus.append(vcpu)
        vcpu.set_cpuid(self.kvm.supported_cpuid())
        return vcpu

    def real(self, code: str, at: int = ENTRY) -> Vcpu:
        self.put(at, assembled(code))
        vcpu = self.vcpu()
        sregs = vcpu.sregs
        for name in ("cs", "ds", "es", "ss"):
            segment = getattr(sregs, name)
            segment.base = segment.selector = 0
        vcpu.set_sregs(sregs)
        return self._start(vcpu, at)

    def protected(self, code: str, at: int = ENTRY) -> Vcpu:
        self.put(at, assembled(code))
        vcpu = self.vcpu()
        self._flat(vcpu, long=False)
        return self._start(vcpu, at)

    def long(self, code: str, at: int = ENTRY) -> Vcpu:
        self.put(at, assembled(code))
        vcpu = self.vcpu()
        self._flat(vcpu, long=True)
        return self._start(vcpu, at)

    def on_vector(self, vector: int, code: str, at: int) -> None:
        """In protected mode: an interrupt gate to `code`."""
        self.put(at, assembled(code))
        self.put(IDT + 8 * vector, struct.pack("<HHHH", at & 0xFFFF, CODE_SELECTOR, 0x8E00, at >> 16))

    def _start(self, vcpu: Vcpu, at: int) -> Vcpu:
        regs = vcpu.regs
        regs.rip, regs.rflags, regs.rsp = at, 2, STACK - 0x400 * vcpu.index
        vcpu.set_regs(regs)
        return vcpu

    def _flat(self, vcpu: Vcpu, *, long: bool) -> None:
        self.put(GDT, struct.pack("<QQQ", 0, 0x00AF9B000000FFFF if long else 0x00CF9B000000FFFF, 0x00CF93000000FFFF))
        sregs = vcpu.sregs
        sregs.cs = kvm_segment(0, 0xFFFFFFFF, CODE_SELECTOR, 11, 1, 0, 0 if long else 1, 1, 1 if long else 0, 1)
        for name in ("ds", "es", "fs", "gs", "ss"):
            setattr(sregs, name, kvm_segment(0, 0xFFFFFFFF, DATA_SELECTOR, 3, 1, 0, 1, 1, 0, 1))
        sregs.gdt.base, sregs.gdt.limit = GDT, 23
        sregs.idt.base, sregs.idt.limit = IDT, 256 * 8 - 1
        sregs.cr0 |= 1  # PE
        if long:
            self.put(TABLES, struct.pack("<Q", TABLES + 0x1000 | 3))  # PML4: present, writable
            self.put(TABLES + 0x1000, struct.pack("<Q", TABLES + 0x2000 | 3))
            self.put(TABLES + 0x2000, b"".join(struct.pack("<Q", n << 21 | 0x83) for n in range(512)))  # 2 MiB pages
            sregs.cr3, sregs.cr4, sregs.efer = TABLES, sregs.cr4 | 0x20, 0x500  # PAE; LME and LMA
            sregs.cr0 |= 1 << 31  # PG
        vcpu.set_sregs(sregs)


def outputs(
    vcpu: Vcpu, port: int = 0x3F8, *, until: int = api.KVM_EXIT_HLT, inputs: Callable[[int], bytes] | None = None
) -> list[bytes]:
    """Run to the exit `until`; what the guest wrote to `port`, a write each. `inputs(length)` answers what it reads."""
    written = []
    while (reason := vcpu.run()) != until:
        assert reason == api.KVM_EXIT_IO, vcpu.describe_exit()
        io = vcpu.exit.io
        assert io.port == port
        if io.direction == api.KVM_EXIT_IO_OUT:
            data = bytes(vcpu.io_data())
            written += [data[at : at + io.size] for at in range(0, len(data), io.size)]
        else:
            assert inputs is not None
            vcpu.io_data()[:] = inputs(io.size * io.count)
    return written
