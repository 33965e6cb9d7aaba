"""A GUID partition table around files that become partitions. UEFI specification 2.10, chapter 5.

sector 0                protective MBR
1                       header
2..33                   128 entries
2048..                  partition 1, each next one on a 4 KiB boundary
the last 33 sectors     the entries again, the header again; the disk ends on a 4 KiB boundary
"""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

SECTOR = 512
ALIGN = 8  # sectors
FIRST = 2048
MAX_PARTITIONS = 128
ENTRY_SIZE = 128
TABLE_SECTORS = MAX_PARTITIONS * ENTRY_SIZE // SECTOR
TRAILER_SECTORS = TABLE_SECTORS + 1
LINUX_DATA = bytes.fromhex("af3dc60f838472478e793d69d8477de4")  # 0FC63DAF-8483-4772-8E79-3D69D8477DE4 as it lies on disk
DISK_GUID = b"ambi layers disk"  # any 16 bytes; the disk is read-only and known by its serial
HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
ENTRY = struct.Struct("<16s16sQQQ72s")


class Partition(NamedTuple):
    """Where a partition lies; sectors of 512 bytes."""

    start: int
    sectors: int


class Table(NamedTuple):
    """header: the first FIRST sectors; trailer: the last TRAILER_SECTORS; between them lie the partitions and gaps."""

    header: bytes
    trailer: bytes
    partitions: tuple[Partition, ...]
    total_sectors: int


def table(sizes_sectors: tuple[int, ...]) -> Table:
    """The table for partitions of these sizes, in this order; at most 128."""
    if len(sizes_sectors) > MAX_PARTITIONS:
        raise ValueError(f"{len(sizes_sectors)} partitions")
    partitions = []
    at = FIRST
    for sectors in sizes_sectors:
        partitions.append(Partition(at, sectors))
        at += -(-sectors // ALIGN) * ALIGN
    # Of a disk that is no multiple of 4 KiB Linux reads the table in single sectors: 73 requests instead of a dozen.
    total = -(-(at + TRAILER_SECTORS) // ALIGN) * ALIGN
    entries = b"".join(_entry(i, p) for i, p in enumerate(partitions)).ljust(TABLE_SECTORS * SECTOR, b"\0")
    primary = _header(1, total - 1, 2, total, entries)
    backup = _header(total - 1, 1, total - TRAILER_SECTORS, total, entries)
    front = (_protective_mbr(total) + primary + entries).ljust(FIRST * SECTOR, b"\0")
    return Table(front, entries + backup, tuple(partitions), total)


def _entry(index: int, partition: Partition) -> bytes:
    name = f"layer{index + 1}".encode("utf-16-le")
    guid = b"ambi layer" + (index + 1).to_bytes(6, "big")
    return ENTRY.pack(LINUX_DATA, guid, partition.start, partition.start + partition.sectors - 1, 0, name)


def _header(own: int, other: int, entries_at: int, total: int, entries: bytes) -> bytes:
    def pack(checksum: int) -> bytes:
        return HEADER.pack(
            b"EFI PART", 0x10000, HEADER.size, checksum, 0, own, other, TABLE_SECTORS + 2, total - TRAILER_SECTORS - 1,
            DISK_GUID, entries_at, MAX_PARTITIONS, ENTRY_SIZE, zlib.crc32(entries),
        )  # fmt: skip

    return pack(zlib.crc32(pack(0))).ljust(SECTOR, b"\0")


def _protective_mbr(total: int) -> bytes:
    entry = struct.pack("<B3sB3sII", 0, b"\x00\x02\x00", 0xEE, b"\xff\xff\xff", 1, min(total - 1, 0xFFFFFFFF))
    return bytes(446) + entry + bytes(48) + b"\x55\xaa"
