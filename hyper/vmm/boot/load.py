"""A kernel and its initramfs into the guest's memory, with all that they are told there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ambi.core.errors import InvalidRequest
from hyper.vmm.boot import acpi, bzimage, e820, elf, initramfs, params, registers
from hyper.vmm.boot.file import BootFile
from hyper.vmm.layout import BOOT_PARAMS, COMMAND_LINE, PAGE, START_INFO, Piece
from hyper.vmm.memory import GuestMemory

HEAD_BYTES = 0x206  # enough to recognise any kernel by
CMDLINE_BYTES = 2047  # of Linux on x86-64, which vmlinux does not say


class Sources(NamedTuple):
    """What is booted. kernel and initramfs: descriptors of regular files, which stay the caller's."""

    kernel: int
    initramfs: int | None
    cmdline: str


class _Kernel(NamedTuple):
    entry: registers.Entry
    end: int
    header: bytes
    initramfs_limit: int
    cmdline_bytes: int


def load(memory: GuestMemory, pieces: Sequence[Piece], sources: Sources, *, vcpus: int, slots: int) -> registers.Entry:
    """Where the first vCPU begins. `memory` is RAM at `pieces`, all zeros.

    Raises InvalidRequest (not a kernel, too little memory, a command line that is too long), Unsupported (another machine or
    a boot protocol that is too old), Corrupt (a kernel or an initramfs that is truncated or damaged).
    """
    low_ram = pieces[0].size
    kernel = _load_kernel(BootFile(sources.kernel, "kernel"), memory, low_ram)
    _write_cmdline(memory, sources.cmdline, kernel.cmdline_bytes)
    placed = None
    if sources.initramfs is not None:
        file = BootFile(sources.initramfs, "initramfs")
        placed = initramfs.load(file, memory, kernel.end, min(low_ram, kernel.initramfs_limit))
    tables = acpi.build(vcpus, slots)
    memory.write(tables.rsdp, tables.data)
    ranges = e820.ranges(pieces)
    if kernel.entry.pvh:
        memory.write(START_INFO, params.start_info(ranges, placed, tables.rsdp))
    else:
        memory.write(BOOT_PARAMS, params.zero_page(kernel.header, ranges, placed, tables.rsdp))
    registers.write_tables(memory)
    return kernel.entry


def _load_kernel(file: BootFile, memory: GuestMemory, low_ram: int) -> _Kernel:
    head = file.read(0, min(file.size, HEAD_BYTES))
    if elf.recognise(head):
        return _load_elf(file, memory, low_ram)
    if len(head) < HEAD_BYTES or not bzimage.recognise(head):
        raise InvalidRequest(
            f"the kernel is not one: its {file.size} bytes are neither a bzImage nor an ELF file",
            hint="build the guest's kernel: python -m hyper.guest",
        )
    header = bzimage.parse(file)
    start = bzimage.place(header, low_ram)
    bzimage.load(file, header, memory, start)
    end = start + max(header.init_bytes, header.image_bytes)
    entry = registers.Entry(start + bzimage.ENTRY_64, pvh=False)
    return _Kernel(entry, _aligned(end), header.raw, header.initramfs_max + 1, header.cmdline_bytes)


def _load_elf(file: BootFile, memory: GuestMemory, low_ram: int) -> _Kernel:
    if file.size < elf.HEADER_BYTES:
        raise file.truncated(elf.HEADER_BYTES)
    found = elf.parse(file)
    elf.check_room(found, low_ram)
    elf.load(file, found, memory)
    pvh = found.pvh_entry is not None
    entry = registers.Entry(found.pvh_entry if found.pvh_entry is not None else found.entry, pvh)
    return _Kernel(entry, _aligned(found.end), b"", low_ram, CMDLINE_BYTES)


def _aligned(address: int) -> int:
    return address + PAGE - 1 & -PAGE


def _write_cmdline(memory: GuestMemory, cmdline: str, limit: int) -> None:
    try:
        data = cmdline.encode("ascii")
    except UnicodeEncodeError:
        raise InvalidRequest("the kernel's command line has other characters than those of ASCII") from None
    if b"\0" in data:
        raise InvalidRequest("the kernel's command line has a zero byte in it")
    if len(data) > min(limit, CMDLINE_BYTES):
        raise InvalidRequest(f"the kernel's command line has {len(data)} bytes, and the kernel takes {limit}")
    memory.write(COMMAND_LINE, data + b"\0")
