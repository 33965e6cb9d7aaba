"""The first vCPU at the kernel's first instruction: descriptor table, page tables, registers.

The others wait for INIT and SIPI, which KVM's local APIC does for them.
"""

from __future__ import annotations

import struct
from typing import NamedTuple, Protocol

from hyper.vmm.layout import BOOT_PARAMS, BOOT_STACK, GDT, GIB, HUGE_PAGE, PAGE, PAGE_TABLES, START_INFO
from hyper.vmm.memory import GuestMemory

CODE = 0x10  # selectors that Linux' boot protocol names: __BOOT_CS, __BOOT_DS
DATA = 0x18
TASK = 0x20
TYPE_CODE = 11  # execute, read, accessed
TYPE_DATA = 3  # read, write, accessed
TYPE_TASK = 11  # a busy one of 32 or 64 bits

CR0_PE, CR0_ET, CR0_NE, CR0_PG = 1, 1 << 4, 1 << 5, 1 << 31
CR4_PAE = 1 << 5
EFER_LME, EFER_LMA = 1 << 8, 1 << 10
PRESENT_WRITABLE = 3
PAGE_IS_HUGE = 1 << 7
RFLAGS_FIXED = 2

MSR_MISC_ENABLE = 0x1A0
MISC_FAST_STRING = 1
MSR_MTRR_DEFAULT = 0x2FF
MTRR_ON_WRITE_BACK = 1 << 11 | 6


class Entry(NamedTuple):
    """Where the kernel begins, and by which protocol: in long mode with RSI at the zero page, or PVH."""

    address: int
    pvh: bool


class Segment(Protocol):
    """kvm_segment."""

    base: int
    limit: int
    selector: int
    type: int
    present: int
    dpl: int
    db: int
    s: int
    l: int  # noqa: E741  # the kernel's name
    g: int
    avl: int
    unusable: int


def write_tables(memory: GuestMemory) -> None:
    """The descriptor table, and page tables that map the first 4 GiB to themselves in pages of 2 MiB."""
    flat = 0xF << 48 | 0xFFFF  # a limit of 4 GiB
    code = flat | 1 << 55 | 1 << 53 | 0x9B << 40  # granular, long
    data = flat | 1 << 55 | 1 << 54 | 0x93 << 40
    task = 0x8B << 40 | 0x67
    memory.write(GDT, struct.pack("<6Q", 0, 0, code, data, task, 0))
    directories = PAGE_TABLES + 2 * PAGE
    memory.put_u64(PAGE_TABLES, PAGE_TABLES + PAGE | PRESENT_WRITABLE)
    for number in range(4):
        memory.put_u64(PAGE_TABLES + PAGE + 8 * number, directories + number * PAGE | PRESENT_WRITABLE)
    entries = range(0, 4 * GIB, HUGE_PAGE)
    memory.write(directories, struct.pack(f"<{len(entries)}Q", *(at | PAGE_IS_HUGE | PRESENT_WRITABLE for at in entries)))


def set_segments(sregs: object, entry: Entry) -> None:
    """Fill in kvm_sregs: segments, the descriptor table, control registers."""
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        segment: Segment = getattr(sregs, name)
        code = name == "cs"
        _flat(segment, CODE if code else DATA, TYPE_CODE if code else TYPE_DATA)
        segment.l = int(code and not entry.pvh)
        segment.db = 1 - segment.l
    task: Segment = sregs.tr  # type: ignore[attr-defined]
    _flat(task, TASK, TYPE_TASK)
    task.s, task.g, task.limit = 0, 0, 0x67
    sregs.gdt.base, sregs.gdt.limit = GDT, 6 * 8 - 1  # type: ignore[attr-defined]
    sregs.idt.base, sregs.idt.limit = 0, 0  # type: ignore[attr-defined]


def _flat(segment: Segment, selector: int, kind: int) -> None:
    segment.base, segment.limit, segment.selector, segment.type = 0, 0xFFFF_FFFF, selector, kind
    segment.present, segment.dpl, segment.db, segment.s, segment.l, segment.g = 1, 0, 0, 1, 0, 1
    segment.avl, segment.unusable = 0, 0


class ControlRegisters(NamedTuple):
    cr0: int
    cr3: int
    cr4: int
    efer: int


def control_registers(entry: Entry) -> ControlRegisters:
    if entry.pvh:
        return ControlRegisters(CR0_PE | CR0_ET, 0, 0, 0)
    return ControlRegisters(CR0_PG | CR0_NE | CR0_ET | CR0_PE, PAGE_TABLES, CR4_PAE, EFER_LME | EFER_LMA)


def general_registers(entry: Entry) -> dict[str, int]:
    """kvm_regs by name; the others are 0."""
    found = {"rip": entry.address, "rflags": RFLAGS_FIXED, "rsp": BOOT_STACK, "rbp": BOOT_STACK}
    if entry.pvh:
        return {**found, "rbx": START_INFO}
    return {**found, "rsi": BOOT_PARAMS}


def msrs() -> dict[int, int]:
    """What firmware would have set: memory is write-back but where a page table says otherwise; fast string operations."""
    return {MSR_MISC_ENABLE: MISC_FAST_STRING, MSR_MTRR_DEFAULT: MTRR_ON_WRITE_BACK}
