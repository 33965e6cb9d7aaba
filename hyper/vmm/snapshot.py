"""The `state` file of a saved machine: what was saved, on which host, with checksums. snapshot_memory.py has the other file.

    0    8   magic "AMBI-VM\\n"
    8    4   format, little-endian, 1
    12   4   length of the header
    16   32  blake2b of the header: the snapshot's id
    48       header, JSON: {"host": {...}, "parent": id or null, "regions": [[gpa, size], ...],
             "sections": {name: [offset, length, blake2b]}}, offsets from the end of the header
             sections, one behind the other, to the end of the file

Sections are the caller's (KVM's state, the devices', the configuration) but for RUNS and DIGESTS, which describe the memory
file. A snapshot with a parent has only the pages that changed since; ids chain them, so none can be swapped for another.

No byte is outside of a checksum. What does not fit is refused by name: Corrupt when the file is damaged, Unsupported when it
is whole but of another format, or of a machine, kernel or ambi that this one is not.
"""

from __future__ import annotations

import json
import os
import struct
from _blake2 import blake2b  # hashlib brings OpenSSL with it, which a monitor can do without
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ambi.core.errors import Corrupt, Unsupported, from_os_error
from ambi.core.version import VERSION
from hyper.kvm.cpuid import CpuidEntry

MAGIC = b"AMBI-VM\n"
FORMAT = 1
_HEAD = struct.Struct("<8sII32s")
MAX_HEADER = 1 << 20
MAX_FILE = 1 << 28
PAGE = 4096
DIGEST = 32  # bytes of blake2b
RUNS, DIGESTS = "runs", "digests"

# CPUID (function, index, register): the words that say what the processor can do.
_FEATURES = (
    (1, 0, "ecx"), (1, 0, "edx"), (7, 0, "ebx"), (7, 0, "ecx"), (7, 0, "edx"), (7, 1, "eax"), (0xD, 0, "eax"),
    (0xD, 1, "eax"), (0x80000001, 0, "ecx"), (0x80000001, 0, "edx"), (0x80000008, 0, "ebx"), (0x40000001, 0, "eax"),
)  # fmt: skip


def digest_of(data: bytes) -> bytes:
    return blake2b(data, digest_size=DIGEST).digest()


class Host(NamedTuple):
    """What a machine was saved on. `features`: words of CPUID by name, of what KVM can show a guest."""

    vendor: str
    family: int
    model: int
    features: dict[str, int]
    kernel: str
    version: str


class Saved(NamedTuple):
    """A state file that was read and is whole. `id` is hex, `regions` are (gpa, bytes) in the memory file's order."""

    id: str
    parent: str | None
    host: Host
    regions: tuple[tuple[int, int], ...]
    sections: dict[str, bytes]

    @property
    def memory_bytes(self) -> int:
        return sum(size for _, size in self.regions)


def this_host(supported: Iterable[CpuidEntry]) -> Host:
    """`supported`: of Kvm.supported_cpuid(), before anything is changed in it."""
    leaves = {(entry.function, entry.index): entry for entry in supported}
    first, second = leaves[0, 0], leaves[1, 0]
    family, model = second.eax >> 8 & 0xF, second.eax >> 4 & 0xF
    if family in (6, 15):
        model |= second.eax >> 12 & 0xF0
    if family == 15:
        family += second.eax >> 20 & 0xFF
    features = {}
    for function, index, register in _FEATURES:
        if (function, index) in leaves:
            features[f"{function:#x}.{index}.{register}"] = int(getattr(leaves[function, index], register))
    vendor = struct.pack("<III", first.ebx, first.edx, first.ecx).decode("latin-1")
    return Host(vendor, family, model, features, os.uname().release, VERSION)


def refuse_other_host(saved: Host, here: Host) -> None:
    """Raises Unsupported with what differs. More features than were there are fine, fewer are not."""
    processor = f"{saved.vendor} family {saved.family} model {saved.model}"
    ours = f"{here.vendor} family {here.family} model {here.model}"
    if processor != ours:
        raise _other("on another processor", processor, ours)
    for name, word in saved.features.items():
        if missing := word & ~here.features.get(name, 0):
            raise _other("with more of the processor", f"CPUID {name} {word:#x}", f"not its bits {missing:#x}")
    if saved.kernel != here.kernel:
        raise _other("under another kernel", saved.kernel, here.kernel)
    if saved.version != here.version:
        raise _other("by another version of ambi", saved.version, here.version)


def _other(what: str, saved: str, here: str) -> Unsupported:
    return Unsupported(
        f"the snapshot was made {what}: {saved}, here is {here}",
        hint="restore it where it was made, or start the machine from its image: ambi run",
    )


def write_state(
    fd: int,
    host: Host,
    regions: Iterable[tuple[int, int]],
    sections: Mapping[str, bytes],
    *,
    parent: str | None = None,
) -> str:
    """Replace what is in the file by this; the result is the snapshot's id.

    Give it a file under another name, sync that, and rename it afterwards. Raises an AmbiError when it cannot be written,
    and leaves a file that no one can read for a snapshot.
    """
    table, at = {}, 0
    for name, data in sections.items():
        table[name] = [at, len(data), digest_of(data).hex()]
        at += len(data)
    header = json.dumps(
        {"host": host._asdict(), "parent": parent, "regions": [list(region) for region in regions], "sections": table},
        separators=(",", ":"),
    ).encode()
    if len(header) > MAX_HEADER or at > MAX_FILE - MAX_HEADER - _HEAD.size:
        raise ValueError(f"a state of {len(header)} and {at} bytes")
    digest = digest_of(header)
    try:
        os.ftruncate(fd, 0)
        offset = _HEAD.size
        for piece in (header, *sections.values()):
            _write_all(fd, piece, offset)
            offset += len(piece)
        _write_all(fd, _HEAD.pack(MAGIC, FORMAT, len(header), digest), 0)  # last: without it the file is nothing
    except OSError as error:
        raise from_os_error("cannot write the snapshot's state", error) from error
    return digest.hex()


def read_state(fd: int) -> Saved:
    """All of it, checked.

    Raises:
        Corrupt: it is damaged, cut, or no snapshot.
        Unsupported: of a format that a newer ambi writes.
    """
    try:
        size = os.fstat(fd).st_size
        if size > MAX_FILE:
            raise _damaged(f"it has {size} bytes, more than any")
        data = _read_all(fd, size)
    except OSError as error:
        raise from_os_error("cannot read the snapshot's state", error) from error
    if len(data) < _HEAD.size or not data.startswith(MAGIC):
        raise _damaged("it does not begin as one")
    _, form, length, digest = _HEAD.unpack_from(data)
    if form != FORMAT:
        raise Unsupported(
            f"the snapshot has format {form}, and this ambi knows {FORMAT}", hint="use the ambi that made it: ambi version"
        )
    header = data[_HEAD.size : _HEAD.size + length]
    if length > MAX_HEADER or len(header) != length or digest_of(header) != digest:
        raise _damaged("its header does not match its checksum")
    try:
        return _parse(digest.hex(), json.loads(header), memoryview(data)[_HEAD.size + length :])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise _damaged(f"its header makes no sense ({error!r})") from error


def _parse(digest: str, header: Any, rest: memoryview) -> Saved:
    """The header's values, each of the type that it must have; ValueError, KeyError or TypeError when one is not."""
    raw = header["host"]
    features = {str(name): _number(word) for name, word in raw["features"].items()}
    host = Host(
        _text(raw["vendor"]), _number(raw["family"]), _number(raw["model"]), features, _text(raw["kernel"]),
        _text(raw["version"]),
    )  # fmt: skip
    regions = tuple((_number(gpa), _number(size)) for gpa, size in header["regions"])
    if not regions or any(gpa % PAGE or size % PAGE or not size for gpa, size in regions):
        raise ValueError("regions that cut pages")
    sections, end = {}, 0
    for name, (offset, length, expected) in header["sections"].items():
        section = bytes(rest[_number(offset) : offset + _number(length)])
        if offset != end or len(section) != length or digest_of(section).hex() != expected:
            raise _damaged(f"its section {name!r} does not match its checksum")
        sections[str(name)] = section
        end += length
    if end != len(rest):
        raise _damaged(f"{len(rest) - end} bytes follow its last section")
    parent = header["parent"]
    return Saved(digest, parent if parent is None else _text(parent), host, regions, sections)


def _number(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 64:
        raise ValueError(f"{value!r} for a number")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} for a text")
    return value


def _damaged(what: str) -> Corrupt:
    return Corrupt(f"the snapshot's state is damaged: {what}", hint="remove the snapshot, and make it again")


def _write_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def _read_all(fd: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = os.pread(fd, size - len(data), len(data))
        if not piece:
            break
        data += piece
    return data
