"""Databases of rpm of its older forms, out of headers."""

from __future__ import annotations

import struct
import subprocess
import zlib
from collections.abc import Sequence
from pathlib import Path


def ndb(headers: Sequence[bytes]) -> bytes:
    """A `Packages.db`."""
    pages = (len(headers) + 2) // 256 + 1
    slots, blobs = b"", b""
    for number, header in enumerate(headers, 1):
        first = pages * 256 + len(blobs) // 16
        blob = struct.pack("<4sIII", b"BlbS", number, 1, len(header)) + header
        blob += bytes(-(len(blob) + 12) % 16)
        blob += struct.pack("<II4s", zlib.adler32(blob), len(header), b"BlbE")
        slots += struct.pack("<4sIII", b"Slot", number, first, len(blob) // 16)
        blobs += blob
    head = struct.pack("<4sIIII", b"RpmP", 0, 1, pages, len(headers) + 1).ljust(32, b"\0")
    unused = (pages * 256 - 2 - len(headers)) * struct.pack("<4sIII", b"Slot", 0, 0, 0)
    return head + slots + unused + blobs


def berkeley(headers: Sequence[bytes], order: str, size: int = 512) -> bytes:
    """A `Packages` with a bucket for each header, which lies on its page where it fits."""
    pages: list[bytes] = [b""]
    for number, header in enumerate(headers, 1):
        key = b"\1" + struct.pack(f"{order}I", number)
        fits = len(header) < size - 60
        kept = b"\1" + header if fits else struct.pack(f"{order}B3xII", 3, len(pages) + 1, len(header))
        starts = (size - len(key), size - len(key) - len(kept))
        pages.append(
            _page(order, len(pages), 0, 2, starts[1], 13, struct.pack(f"{order}HH", *starts)).ljust(starts[1], b"\0")
            + kept
            + key
        )
        if not fits:
            room = size - 26
            parts = [header[at : at + room] for at in range(0, len(header), room)]
            for index, part in enumerate(parts):
                following = len(pages) + 1 if index + 1 < len(parts) else 0
                pages.append(_page(order, len(pages), following, 1, len(part), 7, part).ljust(size, b"\0"))
    meta = struct.pack(f"{order}8xIIIIBBBxII", 0, 0x061561, 9, size, 0, 8, 0, 0, len(pages) - 1)
    pages[0] = meta.ljust(size, b"\0")
    return b"".join(pages)


def _page(order: str, number: int, following: int, entries: int, offset: int, kind: int, rest: bytes) -> bytes:
    return struct.pack(f"{order}8xIIIHHBB", number, 0, following, entries, offset, 0, kind) + rest


def load_berkeley(target: Path, headers: Sequence[bytes]) -> None:
    """A `Packages` that Berkeley DB itself has written, with its counter."""
    pairs = [(0, struct.pack("<I", len(headers) + 1)), *enumerate(headers, 1)]
    lines = "".join(f" {struct.pack('<I', number).hex()}\n {value.hex()}\n" for number, value in pairs)
    text = f"VERSION=3\nformat=bytevalue\ntype=hash\ndb_pagesize=4096\nHEADER=END\n{lines}DATA=END\n"
    subprocess.run(["db5.3_load", target], input=text.encode(), check=True)
