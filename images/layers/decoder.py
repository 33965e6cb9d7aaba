"""Compressed bytes to plain ones, told apart by their first bytes: gzip, zstd, xz, bzip2, or nothing.

gzip may have many members and zeros behind them, zstd many frames and skippable ones. A stream that ends early, fails its
check sum, is followed by other bytes, or expands without measure is Corrupt.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from ambi.core.errors import Corrupt, Unsupported
from images.layers.limits import FREE_EXPANSION, MAX_RATIO

CHUNK = 1 << 20  # at most so much is yielded at once

_ZSTD = b"\x28\xb5\x2f\xfd"
_PROBE = 6


class Decompressor(Protocol):
    """The protocol that bz2 began: one member or frame, output bounded by `max_length`."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Zlib:
    """zlib's own decompressor behind that protocol; isal, where installed, is twice as fast."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        plain = self._inner.decompress(self._inner.unconsumed_tail + data, max_length)
        self.needs_input = not self._inner.unconsumed_tail and len(plain) < max_length
        return plain


def compression_of(head: bytes) -> str:
    """`gzip`, `zstd`, `xz`, `bzip2`, or `` when `head`, the first six bytes or more, is of none of them."""
    if head[:2] == b"\x1f\x8b":
        return "gzip"
    if head[:4] == _ZSTD or (len(head) >= 4 and head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5):
        return "zstd"
    if head[:6] == b"\xfd7zXZ\x00":
        return "xz"
    if head[:3] == b"BZh":
        return "bzip2"
    return ""


def preload() -> None:
    """Load every decoder, so that none is imported later, in a process that may open nothing."""
    for make in _MAKERS.values():
        make()


def _gzip() -> Decompressor:
    try:
        from isal import igzip_lib
    except ImportError:
        return _Zlib()
    return igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)


def _zstd() -> Decompressor:
    from backports.zstd import ZstdDecompressor

    return ZstdDecompressor()


def _xz() -> Decompressor:
    from lzma import FORMAT_XZ, LZMADecompressor

    return LZMADecompressor(FORMAT_XZ, memlimit=256 << 20)


def _bzip2() -> Decompressor:
    from bz2 import BZ2Decompressor

    return BZ2Decompressor()


_MAKERS: dict[str, Callable[[], Decompressor]] = {"gzip": _gzip, "zstd": _zstd, "xz": _xz, "bzip2": _bzip2}


class Decoder:
    """The plain bytes of `chunks`, as an iterator; `compression` is known after the first step."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self.compression = ""
        self.consumed = 0
        self.produced = 0
        self._chunks = iter(chunks)

    def _read(self) -> bytes:
        data = next(self._chunks, b"")
        self.consumed += len(data)
        return data

    def __iter__(self) -> Iterator[bytes]:
        head = b""
        while len(head) < _PROBE:
            data = self._read()
            if not data:
                break
            head += data
        self.compression = compression_of(head)
        for plain in self._plain(head) if self.compression else self._through(head):
            self.produced += len(plain)
            if self.produced > FREE_EXPANSION + MAX_RATIO * self.consumed:
                raise Corrupt(f"archive expands more than {MAX_RATIO} times: {self.produced} bytes of {self.consumed}")
            yield plain

    def _through(self, head: bytes) -> Iterator[bytes]:
        while head:
            yield head
            head = self._read()

    def _plain(self, data: bytes) -> Iterator[bytes]:
        make = _MAKERS[self.compression]
        while data:
            decompressor = make()
            yield from self._member(decompressor, data)
            data = self._next_member(decompressor.unused_data)

    def _member(self, decompressor: Decompressor, data: bytes) -> Iterator[bytes]:
        while True:
            try:
                plain = decompressor.decompress(data, CHUNK)
            except MemoryError:
                raise Unsupported(f"{self.compression} archive needs more than 256 MiB to decompress") from None
            except Exception as error:  # each library has classes of its own
                raise Corrupt(f"{self.compression} archive is damaged: {error}") from None
            if plain:
                yield plain
            if decompressor.eof:
                return
            data = self._read() if decompressor.needs_input else b""
            if not data and decompressor.needs_input:
                raise Corrupt(f"{self.compression} archive is cut short after {self.consumed} bytes")

    def _next_member(self, rest: bytes) -> bytes:
        """The start of the next member, or nothing at the end. Zeros may fill the last block of a tape."""
        rest = rest.lstrip(b"\0")
        while len(rest) < _PROBE:
            more = self._read()
            if not more:
                break
            rest = (rest + more).lstrip(b"\0")
        if rest and compression_of(rest) != self.compression:
            raise Corrupt(f"{self.compression} archive is followed by {rest[:4]!r}, which is not {self.compression}")
        return rest
