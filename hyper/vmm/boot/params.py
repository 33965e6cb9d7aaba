"""What the kernel is told at its start: Linux' zero page (struct boot_params, asm/bootparam.h), and PVH's start info."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from hyper.vmm.boot.e820 import ENTRY, Range
from hyper.vmm.boot.initramfs import Placed
from hyper.vmm.layout import COMMAND_LINE, PAGE, START_INFO

# Offsets in the zero page.
ACPI_RSDP = 0x070
E820_ENTRIES = 0x1E8
SETUP_HEADER = 0x1F1
BOOT_FLAG = 0x1FE
HEADER_MAGIC = 0x202
HEADER_VERSION = 0x206
TYPE_OF_LOADER = 0x210
RAMDISK_IMAGE = 0x218
RAMDISK_SIZE = 0x21C
CMD_LINE_PTR = 0x228
KERNEL_ALIGNMENT = 0x230
E820_TABLE = 0x2D0
LOADER_UNKNOWN = 0xFF

HVM_START_MAGIC = 0x336EC578
HVM_MEMMAP_VERSION = 1  # of a start info with a memory map
_START_INFO = struct.Struct("<IIIIQQQQII")
_MODULE = struct.Struct("<QQQQ")
_MEMORY_MAP = struct.Struct("<QQII")


def zero_page(header: bytes, ranges: Sequence[Range], initramfs: Placed | None, rsdp: int) -> bytes:
    """boot_params. header: the setup header of a bzImage, or b"" for a kernel that has none."""
    page = bytearray(PAGE)
    if header:
        page[SETUP_HEADER : SETUP_HEADER + len(header)] = header
    else:
        struct.pack_into("<H", page, BOOT_FLAG, 0xAA55)
        page[HEADER_MAGIC : HEADER_MAGIC + 4] = b"HdrS"
        struct.pack_into("<H", page, HEADER_VERSION, 0x020F)
        struct.pack_into("<I", page, KERNEL_ALIGNMENT, 1 << 24)
    struct.pack_into("<Q", page, ACPI_RSDP, rsdp)
    page[TYPE_OF_LOADER] = LOADER_UNKNOWN
    struct.pack_into("<I", page, CMD_LINE_PTR, COMMAND_LINE)
    if initramfs is not None:
        struct.pack_into("<II", page, RAMDISK_IMAGE, initramfs.gpa, initramfs.size)
    page[E820_ENTRIES] = len(ranges)
    for number, entry in enumerate(ranges):
        ENTRY.pack_into(page, E820_TABLE + number * ENTRY.size, *entry)
    return bytes(page)


def start_info(ranges: Sequence[Range], initramfs: Placed | None, rsdp: int) -> bytes:
    """hvm_start_info for START_INFO, with what it points to behind it."""
    modules_at = START_INFO + _START_INFO.size
    modules = b"" if initramfs is None else _MODULE.pack(initramfs.gpa, initramfs.size, 0, 0)
    map_at = modules_at + len(modules)
    memory_map = b"".join(_MEMORY_MAP.pack(*entry, 0) for entry in ranges)
    head = _START_INFO.pack(
        HVM_START_MAGIC, HVM_MEMMAP_VERSION, 0, len(modules) // _MODULE.size, modules_at if modules else 0,
        COMMAND_LINE, rsdp, map_at, len(ranges), 0,
    )  # fmt: skip
    return head + modules + memory_map
