"""Where things are in the guest's physical address space and among its ports. docs/vmm.md draws it.

Everything below 1 MiB is written before the first instruction and not needed any more once Linux has read it, but for ACPI.
"""

from __future__ import annotations

from typing import NamedTuple

from ambi.core.errors import InvalidRequest

MIB = 1 << 20
GIB = 1 << 30
PAGE = 4096
HUGE_PAGE = 2 * MIB

GDT = 0x500
START_INFO = 0x6000  # PVH: hvm_start_info, its list of modules, its memory map
BOOT_PARAMS = 0x7000  # Linux: the zero page
BOOT_STACK = 0x8FF0
PAGE_TABLES = 0x9000  # a page each: PML4, PDPT, four page directories
COMMAND_LINE = 0x20000
LOW_RAM_END = 0x9FC00  # where a PC's extended BIOS data area begins
ACPI = 0xE0000  # where a kernel that is not told looks for the RSDP
ACPI_END = 0x100000
HIGH_MEMORY = 0x100000  # a kernel is at 1 MiB or above

RAM_HOLE = 3 * GIB  # RAM that does not fit below goes on at 4 GiB
RAM_ABOVE = 4 * GIB
VIRTIO = 0xD000_0000  # register pages of virtio-mmio, a page each
IOAPIC = 0xFEC0_0000
LAPIC = 0xFEE0_0000
IDENTITY_MAP = 0xFFFB_C000  # a page for KVM on older Intel, and three for its TSS behind it
TSS = 0xFFFB_D000

COM1 = 0x3F8
COM1_IRQ = 4
PORT_I8042 = 0x60
PORT_CMOS = 0x70
PORT_PCI = 0xCF8
PORT_SLEEP = 0x600  # the sleep control register of hardware-reduced ACPI, its status register behind it

FIRST_SLOT_GSI = 5
SLOTS = 19  # the I/O APIC has 24 pins; GSI 0 to 4 are not for devices that are found through ACPI

MIN_MEMORY = 64 * MIB
HOTPLUG_BLOCK = 128 * MIB  # what Linux adds memory by
MAX_MEMORY = 1 << 40
MAX_VCPUS = 16


class Piece(NamedTuple):
    """A stretch of RAM: where it is, how long, and where in the memory of the machine it begins."""

    gpa: int
    size: int
    offset: int


def ram(memory_bytes: int) -> tuple[Piece, ...]:
    """Where the whole MiB of `memory_bytes` go. InvalidRequest for a size that no machine of ours has."""
    if not MIN_MEMORY <= memory_bytes <= MAX_MEMORY:
        raise InvalidRequest(
            f"a VM cannot have {memory_bytes / MIB:g} MiB of memory, but {MIN_MEMORY // MIB} MiB to {MAX_MEMORY // GIB} GiB",
            hint="give it another size, for example --memory 256m",
        )
    size = memory_bytes & -MIB
    low = Piece(0, min(size, RAM_HOLE), 0)
    if size <= RAM_HOLE:
        return (low,)
    return low, Piece(RAM_ABOVE, size - RAM_HOLE, RAM_HOLE)


def hotplug(memory_bytes: int, hotplug_bytes: int) -> Piece | None:
    """The region above RAM for memory that comes while the guest runs: whole blocks of it, or None for less than one.

    RAM does not touch it: no buffer of a driver is in both.
    """
    size = min(hotplug_bytes, MAX_MEMORY - memory_bytes) // HOTPLUG_BLOCK * HOTPLUG_BLOCK
    if size <= 0:
        return None
    last = ram(memory_bytes)[-1]
    return Piece(max(RAM_ABOVE, (last.gpa + last.size) // GIB * GIB + GIB), size, 0)


def slot_address(slot: int) -> int:
    """The register page of virtio-mmio slot `slot`."""
    return VIRTIO + slot * PAGE


def slot_gsi(slot: int) -> int:
    """The pin of the I/O APIC that a slot's interrupt is wired to: each has its own."""
    return FIRST_SLOT_GSI + slot
