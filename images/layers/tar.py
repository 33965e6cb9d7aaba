"""A strict streaming reader of tar: v7, ustar, GNU and PAX, with sparse files of all kinds.

`TarReader(chunks)` yields `Entry` values; between two of them `pieces()` yields the data of the last one. Data is never
copied: a piece is a slice of a chunk. Whatever breaks the format is Corrupt, and nothing of an entry is shown before its
header's check sum has been verified.

Precedence: PAX over GNU long names over the header. Header-only types (links, devices, directories, fifos) have no data
whatever their size says, as in Go's archive/tar, which Docker uses.
Sources: pax(1), tar(5) of libarchive, GNU tar manual "Basic Tar Format" and "Storing Sparse Files".
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ambi.core.errors import Corrupt
from images.layers.limits import MAX_APPARENT, MAX_EXTENTS, MAX_HEADER
from images.layers.pax import Extensions, parse_pax, xattrs_of

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
# name, mode, uid, gid, size, mtime, check sum, type, link name, magic + version, -, -, devmajor, devminor, prefix
_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s32s32s8s8s155s12x")
_KINDS = {
    b"0": "f", b"\0": "f", b"7": "f", b"S": "f", b"1": "h", b"2": "l", b"3": "c", b"4": "b", b"5": "d",
    b"6": "p", b"D": "d",
}  # fmt: skip
_EXTENSIONS = b"xgLKX"
_NO_XATTRS: dict[bytes, bytes] = {}  # shared by all entries without any; never changed
_NO_NAMES: dict[bytes, bytes] = {}
_NO_DEVICE = (0, 0)
_NO_ID = 0xFFFFFFFF


class Entry(NamedTuple):
    """One member of the archive.

    kind: f file, d directory, l symbolic link, h hard link, c, b device, p fifo. path, link: raw bytes as written.
    size: of the file with its holes. extents: (offset, length) of what is not a hole, None for a file without holes.
    """

    path: bytes
    kind: str
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int
    link: bytes
    device: tuple[int, int]
    xattrs: dict[bytes, bytes]
    extents: tuple[tuple[int, int], ...] | None


class _Octal(dict[bytes, int]):
    """Numeric fields to their values; few are distinct, so that most cost a look-up."""

    def __missing__(self, field: bytes) -> int:
        value = _number(field)
        if len(self) < 50_000:
            self[field] = value
        return value


def _number(field: bytes) -> int:
    """Octal with blanks and NULs around it, empty for 0, or base-256 in two's complement when the top bit is set."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
        return value - (1 << (8 * len(field) - 2)) * 2 if field[0] & 0x40 else value
    text = field.split(b"\0", 1)[0].strip(b" ")
    if not text:
        return 0
    if text.strip(b"01234567"):
        raise Corrupt(f"tar header has {field!r} where a number belongs")
    return int(text, 8)


class TarReader:
    """See the module. `entries` counts headers of every kind; `offset` is where the next byte lies in the archive."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._chunk = memoryview(b"")
        self._position = 0
        self._octal = _Octal()
        self._global: Extensions = {}
        self._left = 0  # bytes of data of the present entry
        self._padding = 0
        self._before = 0  # bytes of the archive before the present chunk
        self.ended = False

    @property
    def offset(self) -> int:
        return self._before + self._position

    def __iter__(self) -> Iterator[Entry]:
        while True:
            if self._left or self._padding:
                for _ in self.pieces():
                    pass
            entry = self._next()
            if entry is None:
                return
            yield entry

    def drain(self) -> None:
        """Read what follows the end of the archive: it belongs to the digest."""
        while self._fill():
            self._position = len(self._chunk)

    def whole(self) -> memoryview | None:
        """The stored data of the entry that was yielded last, where one chunk has all of it; else `pieces` has."""
        start, end = self._position, self._position + self._left
        if end + self._padding > len(self._chunk):
            return None
        self._position = end + self._padding
        self._left = self._padding = 0
        return self._chunk[start:end]

    def pieces(self) -> Iterator[memoryview]:
        """The stored data of the entry that was yielded last, without what its header keeps as a map."""
        while self._left:
            if not self._fill():
                raise Corrupt(f"archive is cut short: {self._left} bytes of a file are missing")
            end = min(len(self._chunk), self._position + self._left)
            piece = self._chunk[self._position : end]
            self._left -= end - self._position
            self._position = end
            yield piece
        if self._padding:
            self._take(self._padding)
            self._padding = 0

    def _fill(self) -> bool:
        """Have at least one byte ready; False at the end."""
        while self._position == len(self._chunk):
            chunk = next(self._chunks, None)
            if chunk is None:
                return False
            self._before += len(self._chunk)
            self._chunk, self._position = memoryview(chunk), 0
        return True

    def _take(self, count: int) -> bytes:
        """The next `count` bytes."""
        start = self._position
        if start + count <= len(self._chunk):
            self._position = start + count
            return bytes(self._chunk[start : start + count])
        parts = []
        while count:
            if not self._fill():
                if self.offset < _BLOCK:
                    raise Corrupt(f"not a tar archive: it has {self.offset} bytes")
                raise Corrupt(f"archive is cut short at byte {self.offset}")
            part = self._chunk[self._position : self._position + count]
            self._position += len(part)
            count -= len(part)
            parts.append(part)
        return b"".join(parts)

    def _block(self) -> bytes | None:
        """The next header block, or None at the end: two blocks of zeros, or no more bytes (some writers omit them)."""
        if not self._fill():
            return None
        block = self._take(_BLOCK)
        if block != _ZEROS:
            return block
        self.ended = True
        return None

    def _next(self) -> Entry | None:
        extensions, names = self._global, _NO_NAMES
        pending = False
        while True:
            block = self._block()
            if block is None:
                if pending:
                    raise Corrupt("archive ends after an extension header, without the entry that it describes")
                return None
            kind = self._verify(block)
            if kind == b"V":  # a volume label
                self._skip(self._octal[block[124:136]])
            elif kind not in _EXTENSIONS:
                return self._entry(block, kind, extensions, names)
            else:
                body = self._extension(block)
                pending = kind != b"g"
                if kind == b"g":
                    self._global = parse_pax(body, self._global)
                    extensions = {**self._global, **extensions}
                elif kind in b"xX":
                    extensions = parse_pax(body, extensions)
                else:
                    names = {**names, kind: body.split(b"\0", 1)[0]}

    def _verify(self, block: bytes) -> bytes:
        """The type of a header whose check sum is right. adler32's low half is 1 + the sum of the bytes, modulo 65521."""
        try:
            stored = self._octal[block[148:156]]
        except Corrupt:
            stored = -1  # no check sum is
        low = ((zlib.adler32(block) & 0xFFFF) - 1 - sum(block[148:156]) + 8 * 32) % 65521
        if low != stored % 65521:
            signed = sum(struct.unpack("512b", block)) - sum(struct.unpack("8b", block[148:156])) + 8 * 32
            if signed != stored:
                if self.offset <= _BLOCK:
                    raise Corrupt("not a tar archive")
                raise Corrupt(f"the tar archive is damaged: wrong check sum of the header before byte {self.offset}")
        return block[156:157]

    def _skip(self, size: int) -> None:
        self._left, self._padding = size, -size % _BLOCK
        for _ in self.pieces():
            pass

    def _extension(self, block: bytes) -> bytes:
        size = self._octal[block[124:136]]
        if not 0 <= size <= MAX_HEADER:
            raise Corrupt(f"tar extension header of {size} bytes is larger than {MAX_HEADER}")
        body = self._take(size)
        self._take(-size % _BLOCK)
        return body

    def _entry(self, block: bytes, flag: bytes, extensions: Extensions, names: dict[bytes, bytes]) -> Entry:
        name, mode, uid, gid, size, mtime, _, _, link, magic, _, _, major, minor, prefix = _HEADER.unpack(block)
        octal = self._octal
        path = name.split(b"\0", 1)[0]
        if prefix[0] and magic[:6] == b"ustar\0":
            path = prefix.split(b"\0", 1)[0] + b"/" + path
        target = link.split(b"\0", 1)[0] if link[0] else b""
        if names:
            path, target = names.get(b"L") or path, names.get(b"K") or target
        stored, user, group, seconds = octal[size], octal[uid], octal[gid], octal[mtime]
        fraction = None
        if extensions:
            path, target = extensions.get("path") or path, extensions.get("linkpath") or target
            stored = _whole(extensions, "size", stored)
            user, group = _whole(extensions, "uid", user), _whole(extensions, "gid", group)
            fraction = extensions.get("mtime")
        kind = _KINDS.get(flag)
        if kind is None:
            raise Corrupt(f"tar entry {path!r} is of unknown type {flag!r}")
        if flag == b"\0" and path.endswith(b"/"):
            kind = "d"
        if stored < 0 or stored > MAX_APPARENT:
            raise Corrupt(f"tar entry {path!r} has an impossible size of {stored} bytes")
        if kind == "f" or flag == b"D":
            self._left, self._padding = stored, -stored % _BLOCK
        else:
            self._left = self._padding = 0
        extents: tuple[tuple[int, int], ...] | None = None
        real = stored
        if flag == b"S" or (kind == "f" and "GNU.sparse" in extensions):
            path, real, extents = self._sparse(block, flag, path, extensions)
        if not (0 <= user < _NO_ID and 0 <= group < _NO_ID):
            raise Corrupt(f"tar entry {path!r} has an impossible owner {user}:{group}")
        return Entry(
            path,
            kind,
            octal[mode] & 0o7777,
            user,
            group,
            _time_ns(path, fraction, seconds),
            real if kind == "f" else 0,
            target,
            (octal[major], octal[minor]) if kind in "cb" else _NO_DEVICE,
            xattrs_of(path, extensions) if extensions else _NO_XATTRS,
            extents,
        )

    def _sparse(
        self, block: bytes, flag: bytes, path: bytes, extensions: Extensions
    ) -> tuple[bytes, int, tuple[tuple[int, int], ...]]:
        """The name, the real size and the extents of a sparse file."""
        if flag == b"S":
            real = _number(block[483:495])
            numbers = self._old_map(block)
        else:
            path = extensions.get("GNU.sparse.name") or path
            real = _whole(extensions, "GNU.sparse.realsize", _whole(extensions, "GNU.sparse.size", -1))
            if extensions.get("GNU.sparse.major") == b"1":
                numbers = self._map_in_data(path)
            else:
                text = extensions.get("GNU.sparse.map", b"")
                numbers = [_decimal(path, part) for part in text.split(b",")] if text else []
        if len(numbers) % 2 or len(numbers) > 2 * MAX_EXTENTS:
            raise Corrupt(f"sparse file {path!r} has a damaged map of {len(numbers)} numbers")
        extents = tuple(pair for pair in zip(numbers[::2], numbers[1::2], strict=True) if pair[1])
        _check_extents(path, extents, real, self._left)
        return path, real, extents

    def _old_map(self, block: bytes) -> list[int]:
        """Offsets and lengths from a header of type S and the blocks that continue it."""
        numbers = [_number(block[at : at + 12]) for at in range(386, 482, 12) if block[at : at + 12].strip(b"\0 ")]
        more = block[482]
        while more:
            block = self._take(_BLOCK)
            numbers += [_number(block[at : at + 12]) for at in range(0, 504, 12) if block[at : at + 12].strip(b"\0 ")]
            if len(numbers) > 2 * MAX_EXTENTS:
                raise Corrupt(f"sparse file has more than {MAX_EXTENTS} pieces")
            more = block[504]
        return numbers

    def _map_in_data(self, path: bytes) -> list[int]:
        """The map of format 1.0: decimal lines at the start of the data, the count first, padded to a block."""
        buffer, numbers, wanted = b"", list[int](), -1
        while wanted < 0 or len(numbers) < 2 * wanted:
            line, newline, rest = buffer.partition(b"\n")
            if not newline:
                if self._left < _BLOCK or len(buffer) > 32:
                    raise Corrupt(f"sparse file {path!r} has a damaged map")
                self._left -= _BLOCK
                buffer += self._take(_BLOCK)
                continue
            buffer = rest
            number = _decimal(path, line)
            if wanted < 0:
                wanted = number
                if wanted > MAX_EXTENTS:
                    raise Corrupt(f"sparse file {path!r} has {wanted} pieces, more than {MAX_EXTENTS}")
            else:
                numbers.append(number)
        return numbers


def _check_extents(path: bytes, extents: tuple[tuple[int, int], ...], real: int, stored: int) -> None:
    end = 0
    for offset, length in extents:
        if offset < end or length < 0:
            raise Corrupt(f"sparse file {path!r} has pieces that overlap")
        end = offset + length
    if not 0 <= real <= MAX_APPARENT or end > real:
        raise Corrupt(f"sparse file {path!r} has pieces beyond its size of {real}")
    if sum(length for _, length in extents) != stored:
        raise Corrupt(f"sparse file {path!r} stores {stored} bytes, its map says otherwise")


def _decimal(path: bytes, text: bytes) -> int:
    if not text.isdigit() or len(text) > 19:
        raise Corrupt(f"tar entry {path!r} has {text[:30]!r} where a decimal number belongs")
    return int(text)


def _whole(extensions: Extensions, key: str, otherwise: int) -> int:
    text = extensions.get(key)
    return otherwise if text is None else _decimal(key.encode(), text)


def _time_ns(path: bytes, pax: bytes | None, seconds: int) -> int:
    """Nanoseconds since the epoch. PAX has `-1.5` for one and a half seconds before it; digits beyond the ninth are cut."""
    fraction = 0
    if pax is not None:
        whole, _, digits = pax.partition(b".")
        negative = whole.startswith(b"-")
        seconds = _decimal(path, whole.removeprefix(b"-") or b"0")
        fraction = _decimal(path, digits[:9].ljust(9, b"0")) if digits else 0
        if negative:
            seconds, fraction = -seconds, -fraction
    if abs(seconds) >= 1 << 40:
        raise Corrupt(f"tar entry {path!r} has an impossible time of {seconds} s")
    return seconds * 1_000_000_000 + fraction
