"""vmlinux: an ELF file whose segments go to their physical addresses. Nothing has to be decompressed.

It is entered by PVH (a note of type XEN_ELFNOTE_PHYS32_ENTRY: 32-bit protected mode, EBX at the start info) where the kernel
has that, else at e_entry in long mode with RSI at the zero page, as Linux' own `startup_64` wants it.
Sources: the ELF-64 object file format; Xen's public/arch-x86/hvm/start_info.h and elfnote.h.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from ambi.core.errors import Corrupt, InvalidRequest, Unsupported
from hyper.vmm.boot.file import BootFile
from hyper.vmm.layout import HIGH_MEMORY
from hyper.vmm.memory import GuestMemory

MAGIC = b"\x7fELF"
ELFCLASS64 = 2
ELFDATA2LSB = 1
EM_X86_64 = 62
PT_LOAD = 1
PT_NOTE = 4
XEN_ELFNOTE_PHYS32_ENTRY = 18
MAX_SEGMENTS = 64
MAX_NOTES_BYTES = 64 << 10

_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
HEADER_BYTES = _EHDR.size
_PHDR = struct.Struct("<IIQQQQQQ")
_NHDR = struct.Struct("<III")


class Segment(NamedTuple):
    """PT_LOAD: `file_bytes` at `offset` of the file go to `gpa`; as far as `memory_bytes` there are zeros behind them."""

    gpa: int
    offset: int
    file_bytes: int
    memory_bytes: int


class Elf(NamedTuple):
    segments: tuple[Segment, ...]
    entry: int  # of 64 bits
    pvh_entry: int | None

    @property
    def end(self) -> int:
        """Behind the last byte that the kernel occupies."""
        return max(segment.gpa + segment.memory_bytes for segment in self.segments)


def recognise(head: bytes) -> bool:
    return head[:4] == MAGIC


def parse(file: BootFile) -> Elf:
    """Raises Corrupt for a file that is damaged, Unsupported for one of another machine."""
    ident, _, machine, _, entry, phoff, _, _, _, phentsize, phnum, *_ = _EHDR.unpack(file.read(0, _EHDR.size))
    if ident[4] != ELFCLASS64 or ident[5] != ELFDATA2LSB or machine != EM_X86_64:
        raise Unsupported("the kernel is an ELF file, but not one for x86-64", hint="use a kernel for x86-64")
    if phentsize != _PHDR.size or not 0 < phnum <= MAX_SEGMENTS:
        raise Corrupt(f"the kernel is an ELF file with {phnum} program headers of {phentsize} bytes, which cannot be")
    segments: list[Segment] = []
    pvh_entry = None
    for kind, _, offset, _, paddr, filesz, memsz, _ in _PHDR.iter_unpack(file.read(phoff, phnum * _PHDR.size)):
        if kind == PT_LOAD and memsz:
            if filesz > memsz or offset + filesz > file.size:
                raise file.truncated(offset + filesz)
            segments.append(Segment(paddr, offset, filesz, memsz))
        elif kind == PT_NOTE and pvh_entry is None:
            pvh_entry = _pvh_entry(file.read(offset, min(filesz, MAX_NOTES_BYTES)))
    elf = Elf(tuple(segments), entry, pvh_entry)
    start = entry if pvh_entry is None else pvh_entry
    if not any(segment.gpa <= start < segment.gpa + segment.file_bytes for segment in segments):
        raise Corrupt(f"the kernel is to be entered at {start:#x}, where it has nothing")
    return elf


def _pvh_entry(notes: bytes) -> int | None:
    at = 0
    while at + _NHDR.size <= len(notes):
        name_bytes, desc_bytes, kind = _NHDR.unpack_from(notes, at)
        name_at = at + _NHDR.size
        desc_at = name_at + (name_bytes + 3 & ~3)
        if kind == XEN_ELFNOTE_PHYS32_ENTRY and notes[name_at : name_at + name_bytes] == b"Xen\0" and desc_bytes in (4, 8):
            desc = notes[desc_at : desc_at + desc_bytes]
            return int.from_bytes(desc, "little") if len(desc) == desc_bytes else None
        at = desc_at + (desc_bytes + 3 & ~3)
    return None


def check_room(elf: Elf, low_ram: int) -> None:
    """InvalidRequest when the machine has too little memory, Corrupt for an address below 1 MiB."""
    for segment in elf.segments:
        if segment.gpa < HIGH_MEMORY:
            raise Corrupt(f"the kernel wants to be at {segment.gpa:#x}, where our own tables are")
    if elf.end > low_ram:
        raise InvalidRequest(
            f"the kernel occupies memory up to {elf.end >> 20} MiB, and the VM has {low_ram >> 20} MiB",
            hint="give the VM more memory, for example --memory 256m",
        )


def load(file: BootFile, elf: Elf, memory: GuestMemory) -> None:
    """Read the segments to where they belong. The memory must be fresh: what is to be zero is not written."""
    for segment in elf.segments:
        file.into(memory.view(segment.gpa, segment.file_bytes), segment.offset)
