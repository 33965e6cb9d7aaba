"""The initramfs: as high in low memory as the kernel takes it, so that it is out of the way of decompression."""

from __future__ import annotations

from typing import NamedTuple

from ambi.core.errors import Corrupt, InvalidRequest
from hyper.vmm.boot.file import BootFile
from hyper.vmm.layout import PAGE
from hyper.vmm.memory import GuestMemory

CPIO = (b"070701", b"070702")  # Documentation/driver-api/early-userspace/buffer-format.rst
HEADER_BYTES = 110
TRAILER = b"TRAILER!!!"
COMPRESSED = (
    b"\x1f\x8b",
    b"\x1f\x9e",
    b"BZh",
    b"\x5d\x00",
    b"\xfd7zXZ",
    b"\x89LZO",
    b"\x02\x21\x4c\x18",
    b"\x28\xb5\x2f\xfd",
)


class Placed(NamedTuple):
    gpa: int
    size: int


def load(file: BootFile, memory: GuestMemory, kernel_end: int, limit: int) -> Placed:
    """Read it to the last pages below `limit`. Raises InvalidRequest where it does not fit above `kernel_end`, Corrupt for
    what is not an initramfs, or is truncated as far as that shows without decompressing it."""
    start = (limit - file.size) & ~(PAGE - 1)
    if start < kernel_end:
        raise InvalidRequest(
            f"the initramfs has {file.size >> 10} KiB, and beside the kernel there are "
            f"{max(0, limit - kernel_end) >> 10} KiB of memory",
            hint="give the VM more memory, for example --memory 512m",
        )
    view = memory.view(start, file.size)
    file.into(view, 0)
    check(view)
    return Placed(start, file.size)


def check(data: memoryview) -> None:
    """Corrupt unless `data` is a row of cpio archives, of which the last may be compressed, each with its end."""
    at = seen = 0
    while at < len(data):
        if bytes(data[at : at + 6]) in CPIO:
            at = _end_of_archive(data, at)
            seen += 1
        elif bytes(data[at : at + 8]).startswith(COMPRESSED):
            return
        elif not any(data[at : at + PAGE]):
            at += PAGE
        elif data[at] == 0:  # padding between archives, to four bytes
            at += 4 - at % 4
        else:
            raise Corrupt(f"the initramfs is damaged at byte {at}" if seen else "the initramfs is not a cpio archive")
    if not seen:
        raise Corrupt("the initramfs has nothing in it")


def _end_of_archive(data: memoryview, at: int) -> int:
    while True:
        header = bytes(data[at : at + HEADER_BYTES])
        if len(header) < HEADER_BYTES:
            raise Corrupt(f"the initramfs is truncated: it ends after {len(data)} bytes, before its archive does")
        try:
            size, name_bytes = int(header[54:62], 16), int(header[94:102], 16)
        except ValueError:
            size = name_bytes = 0
        if header[:6] not in CPIO or not name_bytes:
            raise Corrupt(f"the initramfs is damaged at byte {at}")
        name_at = at + HEADER_BYTES
        name = bytes(data[name_at : name_at + min(name_bytes, len(TRAILER) + 1)])
        at = (name_at + name_bytes + 3) & ~3
        at = (at + size + 3) & ~3
        if name == TRAILER + b"\0":
            return at
