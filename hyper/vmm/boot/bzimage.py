"""bzImage, as distributions ship Linux: the 64-bit boot protocol (Documentation/arch/x86/boot.rst).

The file begins with a real-mode part, which we skip, and its header, which says how to load the rest. The kernel is entered
in long mode 0x200 behind its start, with RSI at the zero page; it decompresses itself.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from ambi.core.errors import Corrupt, InvalidRequest, Unsupported
from hyper.vmm.boot.file import BootFile
from hyper.vmm.layout import HIGH_MEMORY
from hyper.vmm.memory import GuestMemory

HEADER_AT = 0x1F1
BOOT_FLAG = 0xAA55
MAGIC = b"HdrS"
OLDEST = 0x020C  # has xloadflags, Linux 3.8
LOADED_HIGH = 1  # loadflags
XLF_KERNEL_64 = 1
ENTRY_64 = 0x200
SECTOR = 512


class Header(NamedTuple):
    """What the setup header says; `raw` is all of it, from HEADER_AT."""

    version: int
    setup_bytes: int  # of the real-mode part
    image_bytes: int  # of the rest
    preferred: int
    init_bytes: int  # what the kernel needs from its start on until it reads its memory map
    cmdline_bytes: int  # without the zero at its end
    initramfs_max: int  # the highest address of a byte of the initramfs
    raw: bytes


def recognise(head: bytes) -> bool:
    """Whether a file that begins with `head` (0x206 bytes or more) means to be one."""
    return head[0x202:0x206] == MAGIC and head[0x1FE:0x200] == b"\x55\xaa"


def parse(file: BootFile) -> Header:
    """The header of a file that `recognise` took. Raises Corrupt (truncated), Unsupported (a kernel that is too old, or of
    32 bits)."""
    head = file.read(0, 0x264 + 4)
    (version,) = struct.unpack_from("<H", head, 0x206)
    if version < OLDEST:
        raise Unsupported(
            f"the kernel speaks boot protocol {version >> 8}.{version & 0xFF}, and the oldest that we boot is 2.12",
            hint="use Linux 3.8 or newer",
        )
    if not head[0x211] & LOADED_HIGH or not struct.unpack_from("<H", head, 0x236)[0] & XLF_KERNEL_64:
        raise Unsupported("the kernel has no 64-bit entry point", hint="use a kernel for x86-64")
    sectors = head[HEADER_AT] or 4
    raw_end = 0x202 + head[0x201]
    if raw_end < 0x264 or raw_end > 0x280:  # of Linux 3.8 to today
        raise file.truncated(raw_end)
    header = Header(
        version=version,
        setup_bytes=(sectors + 1) * SECTOR,
        image_bytes=struct.unpack_from("<I", head, 0x1F4)[0] * 16,
        preferred=struct.unpack_from("<Q", head, 0x258)[0],
        init_bytes=struct.unpack_from("<I", head, 0x260)[0],
        cmdline_bytes=struct.unpack_from("<I", head, 0x238)[0],
        initramfs_max=struct.unpack_from("<I", head, 0x22C)[0],
        raw=file.read(HEADER_AT, raw_end - HEADER_AT),
    )
    if header.setup_bytes + header.image_bytes > file.size or header.image_bytes <= ENTRY_64:
        raise file.truncated(header.setup_bytes + max(header.image_bytes, ENTRY_64 + 1))
    return header


def place(header: Header, low_ram: int) -> int:
    """Where the kernel goes: its preferred address. A relocatable one may be loaded above it, but moves there from below.

    Raises InvalidRequest when the machine has too little memory, Corrupt for an address where our own tables are.
    """
    start, needed = header.preferred, max(header.init_bytes, header.image_bytes)
    if start < HIGH_MEMORY:
        raise Corrupt(f"the kernel wants to be at {start:#x}, where our own tables are")
    if start + needed > low_ram:
        raise InvalidRequest(
            f"the kernel needs {needed >> 20} MiB from {start:#x} on, and the VM has {low_ram >> 20} MiB of memory",
            hint="give the VM more memory, for example --memory 256m",
        )
    return start


def load(file: BootFile, header: Header, memory: GuestMemory, start: int) -> None:
    """Read the kernel to `start`, which `place` gave."""
    file.into(memory.view(start, header.image_bytes), header.setup_bytes)
