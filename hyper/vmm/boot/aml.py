"""ACPI machine language, as much of it as describes a machine without methods (ACPI 6.5, chapter 20)."""

from __future__ import annotations

import struct

ZERO, ONE = 0x00, 0x01
NAME, BYTE, WORD, DWORD, STRING, QWORD, SCOPE, BUFFER, PACKAGE = 0x08, 0x0A, 0x0B, 0x0C, 0x0D, 0x0E, 0x10, 0x11, 0x12
EXTENDED, DEVICE = 0x5B, 0x82


def integer(value: int) -> bytes:
    if value in (0, 1):
        return bytes((value,))
    for opcode, size in ((BYTE, 1), (WORD, 2), (DWORD, 4), (QWORD, 8)):
        if value < 1 << 8 * size:
            return bytes((opcode,)) + value.to_bytes(size, "little")
    raise ValueError(f"{value:#x} has more than 64 bits")


def string(text: str) -> bytes:
    return bytes((STRING,)) + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """`PNP0501`: three letters of five bits, four digits, in big-endian order."""
    letters = [ord(letter) - 0x40 for letter in text[:3]]
    value = letters[0] << 26 | letters[1] << 21 | letters[2] << 16 | int(text[3:], 16)
    return bytes((DWORD,)) + value.to_bytes(4, "big")


def _sized(content: bytes) -> bytes:
    """PkgLength, which counts itself, and `content`."""
    if len(content) + 1 < 1 << 6:
        return bytes((len(content) + 1,)) + content
    for more in (1, 2, 3):
        length = len(content) + 1 + more
        if length < 1 << 4 + 8 * more:
            return bytes((more << 6 | length & 0xF,)) + (length >> 4).to_bytes(more, "little") + content
    raise ValueError("a package of more than 256 MiB")


def name(path: str, value: bytes) -> bytes:
    return bytes((NAME,)) + path.encode("ascii") + value


def scope(path: str, *content: bytes) -> bytes:
    return bytes((SCOPE,)) + _sized(path.encode("ascii") + b"".join(content))


def device(path: str, *content: bytes) -> bytes:
    return bytes((EXTENDED, DEVICE)) + _sized(path.encode("ascii") + b"".join(content))


def package(*elements: bytes) -> bytes:
    return bytes((PACKAGE,)) + _sized(bytes((len(elements),)) + b"".join(elements))


def buffer(data: bytes) -> bytes:
    return bytes((BUFFER,)) + _sized(integer(len(data)) + data)


# Resource descriptors (ACPI 6.5, section 6.4).


def io_ports(base: int, count: int) -> bytes:
    return struct.pack("<BBHHBB", 0x47, 1, base, base, 1, count)  # decodes 16 bits


def memory32_fixed(base: int, size: int) -> bytes:
    return struct.pack("<BHBII", 0x86, 9, 1, base, size)  # read-write


def edge_interrupt(gsi: int) -> bytes:
    """A consumer's, active high, not shared: irqfds make edges."""
    return struct.pack("<BHBBI", 0x89, 6, 0b011, 1, gsi)


def resources(*descriptors: bytes) -> bytes:
    return buffer(b"".join(descriptors) + b"\x79\0")  # an end tag whose checksum is not used
