"""rpm's packages: one header each, out of a database (`rpmdb`). Read in the jailed worker alone: all is a stranger's.

A header is rpm's own format (rpm, docs/manual/hregions.md and format_header.md): two numbers, of index entries and of bytes
of data; index entries of four numbers each, tag, type, offset and count; the data. All numbers are big-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from ambi.core.errors import Corrupt
from images.sbom import rpmdb

_ENTRY = struct.Struct(">IIII")
_INT32, _STRING, _ARRAY, _I18N = 4, 6, 8, 9  # rpmTagType
_TAGS = {
    1000: "name",
    1001: "version",
    1002: "release",
    1003: "epoch",
    1011: "supplier",
    1014: "licence",
    1022: "architecture",
}
_MOST_ENTRIES, _HEADER_BYTES, _TEXT_BYTES = 0xFFFF, 16 << 20, 1024
_MAX_PACKAGES = 100_000

Fields = dict[str, str]


def packages(database: bytearray) -> Iterator[Fields]:
    """The fields of every package in the bytes of a database, which are changed. Raises Corrupt, Unsupported."""
    for number, header in enumerate(rpmdb.headers(database)):
        if number >= _MAX_PACKAGES:
            raise Corrupt("the database holds more packages than any system")
        yield fields(header)


def fields(header: bytes) -> Fields:
    """Name, version (`epoch:version-release`), architecture, licence and supplier; "" where one is not told."""
    if not 8 <= len(header) <= _HEADER_BYTES:
        raise Corrupt(f"a header of rpm has {len(header)} bytes")
    entries, size = struct.unpack_from(">II", header)
    start = 8 + entries * _ENTRY.size
    if entries > _MOST_ENTRIES or start + size > len(header):
        raise Corrupt(f"a header of rpm with {entries} entries and {size} bytes of data is cut short")
    found = dict.fromkeys(_TAGS.values(), "")
    data = header[start : start + size]
    for tag, kind, offset, count in _ENTRY.iter_unpack(header[8:start]):
        name = _TAGS.get(tag)
        if name is not None:
            found[name] = _value(data, kind, offset, count)
    version, release, epoch = found["version"], found.pop("release"), found.pop("epoch")
    found["version"] = (f"{epoch}:" if epoch not in ("", "0") else "") + version + (f"-{release}" if release else "")
    return found


def _value(data: bytes, kind: int, offset: int, count: int) -> str:
    """The first value of an entry, as text."""
    if kind == _INT32 and count and offset + 4 <= len(data):
        return str(struct.unpack_from(">I", data, offset)[0])
    if kind in (_STRING, _ARRAY, _I18N) and count and offset < len(data):
        end = data.find(b"\0", offset, offset + _TEXT_BYTES + 1)
        if end >= 0:
            return data[offset:end].decode("utf-8", "replace")
    raise Corrupt(f"a header of rpm has a value of type {kind} at {offset}, beyond its {len(data)} bytes or not for it")
