"""The memory map that the guest is given, in the words of the e820 BIOS call, which PVH uses too."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from hyper.vmm.layout import ACPI, ACPI_END, HIGH_MEMORY, LOW_RAM_END, Piece

RAM = 1
RESERVED = 2
ENTRY = struct.Struct("<QQI")  # boot_e820_entry, asm/bootparam.h


class Range(NamedTuple):
    start: int
    size: int
    kind: int


def ranges(pieces: Sequence[Piece]) -> list[Range]:
    """The map for RAM at `pieces`, of which the first begins at 0: all of it but the hole of a PC below 1 MiB."""
    low = pieces[0]
    return [
        Range(0, LOW_RAM_END, RAM),
        Range(ACPI, ACPI_END - ACPI, RESERVED),
        Range(HIGH_MEMORY, low.size - HIGH_MEMORY, RAM),
        *(Range(piece.gpa, piece.size, RAM) for piece in pieces[1:]),
    ]
