"""The three forms of rpm's database, read into the headers of its packages. In the jailed worker alone: all is a stranger's.

- `rpmdb.sqlite` (rpm 4.16 and later): a table of them.
- `Packages.db` (SUSE's ndb): 32 bytes of header, slots of 16 bytes in pages of 4 KiB, and for each slot in use a blob in
  blocks of 16 bytes: magic, number, generation and length; the header; zeros; Adler-32 of all that, length, magic.
- `Packages` (until RHEL 8): a hash of Berkeley DB, versions 8 and 9 of its format. Its buckets hold pairs of a number and a
  header, which is on the page or in a chain of overflow pages; number 0 is a counter.

Sources: rpm, lib/backend/ndb/rpmpkg.c and lib/backend/sqlite.c; Berkeley DB, dbinc/db_page.h. librpm would read them too,
but needs a file system, write access and rpm's configuration, and Debian's knows no ndb.
"""

from __future__ import annotations

import sqlite3
import struct
import zlib
from collections.abc import Iterator

from ambi.core.errors import Corrupt, Unsupported

SQLITE, NDB, BERKELEY = "rpmdb.sqlite", "Packages.db", "Packages"

_PAGE = 4096  # of ndb
_NDB_SLOT = struct.Struct("<4sIII")  # magic, number, first block, blocks
_BLOCK, _BLOB_HEAD, _BLOB_TAIL = 16, 16, 12
_HASH_MAGIC, _HASH_VERSIONS = 0x061561, (8, 9)
_P_HASH_UNSORTED, _P_OVERFLOW, _P_HASHMETA, _P_HASH = 2, 7, 8, 13
_H_KEYDATA, _H_OFFPAGE = 1, 3
_PAGE_HEAD = 26  # SIZEOF_PAGE


def headers(database: bytearray) -> Iterator[bytes]:
    """The headers in the bytes of a database, which are changed, whatever its form.

    Raises Corrupt, and Unsupported for a form that is not read.
    """
    if database[:16] == b"SQLite format 3\0":
        return _sqlite(database)
    if database[:4] == b"RpmP":
        return _ndb(bytes(database))
    for order in "<>":
        if len(database) >= 512 and struct.unpack_from(f"{order}I", database, 12)[0] == _HASH_MAGIC:
            return _Hash(bytes(database), order).headers()
    raise Unsupported("it is in no form of rpm's that is known here")


def _sqlite(database: bytearray) -> Iterator[bytes]:
    if len(database) < 100:
        raise Corrupt("rpmdb.sqlite is cut short")
    database[18:20] = b"\x01\x01"  # not in WAL mode: one in memory cannot be
    connection = sqlite3.connect(":memory:")
    try:
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.deserialize(database)
        connection.execute("PRAGMA cell_size_check = ON")
        shape = connection.execute("SELECT type FROM sqlite_schema WHERE name = 'Packages'").fetchall()
        if shape != [("table",)]:
            raise Corrupt("rpmdb.sqlite has no table of packages")
        for (header,) in connection.execute("SELECT blob FROM Packages"):
            if not isinstance(header, bytes):
                raise Corrupt("rpmdb.sqlite holds something else than packages")
            yield header
    except sqlite3.Error as error:
        raise Corrupt(f"rpmdb.sqlite is damaged: {error}") from None
    finally:
        connection.close()


def _ndb(database: bytes) -> Iterator[bytes]:
    if len(database) < 32:
        raise Corrupt(f"{NDB} is cut short")
    version, _, pages = struct.unpack_from("<III", database, 4)
    if version:
        raise Unsupported(f"{NDB} is of version {version}, this reads version 0")
    end = pages * _PAGE
    if end > len(database):
        raise Corrupt(f"{NDB} is cut short: it tells of {pages} pages of slots")
    left = len(database)  # no byte is in two blobs
    for at in range(32, end, _NDB_SLOT.size):
        magic, number, first, count = _NDB_SLOT.unpack_from(database, at)
        if magic != b"Slot":
            raise Corrupt(f"{NDB} has a damaged slot at {at}")
        if not first:
            continue
        left -= count * _BLOCK
        if first * _BLOCK < end or left < 0:
            raise Corrupt(f"{NDB} has a slot at {at} whose blob lies over others")
        yield _blob(database, number, first * _BLOCK, count * _BLOCK)


def _blob(database: bytes, number: int, start: int, size: int) -> bytes:
    stop = start + size - _BLOB_TAIL
    if size >= _BLOB_HEAD + _BLOB_TAIL and stop + _BLOB_TAIL <= len(database):
        magic, known, _, length = _NDB_SLOT.unpack_from(database, start)
        check, again, tail = struct.unpack_from("<II4s", database, stop)
        if (
            (magic, known, tail) == (b"BlbS", number, b"BlbE")
            and length == again
            and 0 <= stop - start - _BLOB_HEAD - length < _BLOCK
            and zlib.adler32(database[start:stop]) == check
        ):
            return database[start + _BLOB_HEAD : start + _BLOB_HEAD + length]
    raise Corrupt(f"{NDB} is damaged: package {number} at byte {start}")


class _Hash:
    """A hash of Berkeley DB. order: `<` or `>`, of the machine that made it."""

    def __init__(self, database: bytes, order: str) -> None:
        self._database, self._order = database, order
        version, self._size = self._number(16), self._number(20)
        encryption, kind, flags = database[24:27]
        if version not in _HASH_VERSIONS or kind != _P_HASHMETA or encryption or flags:
            raise Unsupported(f"{BERKELEY} is of version {version} of Berkeley DB's format, or encrypted, or of parts")
        if self._size not in (512 << power for power in range(8)):
            raise Corrupt(f"{BERKELEY} has pages of {self._size} bytes")
        self._last = self._number(32)
        if (self._last + 1) * self._size > len(database):
            raise Corrupt(f"{BERKELEY} is cut short: it tells of {self._last + 1} pages")
        self._left = len(database)  # no byte is in two headers

    def _number(self, at: int) -> int:
        return int(struct.unpack_from(f"{self._order}I", self._database, at)[0])

    def _page(self, number: int) -> bytes:
        if not 0 < number <= self._last:
            raise Corrupt(f"{BERKELEY} is damaged: page {number} of {self._last} is named")
        return self._database[number * self._size : (number + 1) * self._size]

    def headers(self) -> Iterator[bytes]:
        for number in range(1, self._last + 1):
            page = self._page(number)
            if page[25] in (_P_HASH, _P_HASH_UNSORTED):
                items = self._items(page, number)
                for key, value in zip(items[::2], items[1::2], strict=True):
                    if key[1:] != b"\0\0\0\0":
                        yield self._value(page, value, number)

    def _items(self, page: bytes, number: int) -> list[bytes]:
        """Keys and values in turn, each with its type as first byte. They lie from the end of the page downwards."""
        (count,) = struct.unpack_from(f"{self._order}H", page, 20)
        if count % 2 or _PAGE_HEAD + 2 * count > len(page):
            raise Corrupt(f"{BERKELEY} is damaged: page {number} has {count} items")
        items, end = [], len(page)
        for start in struct.unpack_from(f"{self._order}{count}H", page, _PAGE_HEAD):
            if not _PAGE_HEAD + 2 * count <= start < end:
                raise Corrupt(f"{BERKELEY} is damaged: page {number} has an item at {start}")
            items.append(page[start:end])
            end = start
        return items

    def _value(self, page: bytes, item: bytes, number: int) -> bytes:
        if item[0] == _H_KEYDATA:
            return item[1:]
        if item[0] != _H_OFFPAGE or len(item) != 12:
            raise Corrupt(f"{BERKELEY} is damaged: page {number} has an item of type {item[0]}")
        following, length = struct.unpack_from(f"{self._order}II", item, 4)
        self._left -= length
        parts: list[bytes] = []
        while following and length > 0 and self._left >= 0:
            page = self._page(following)
            (used,) = struct.unpack_from(f"{self._order}H", page, 22)
            if page[25] != _P_OVERFLOW or not 0 < used <= len(page) - _PAGE_HEAD:
                break
            parts.append(page[_PAGE_HEAD : _PAGE_HEAD + used])
            length -= used
            following = struct.unpack_from(f"{self._order}I", page, 16)[0]
        if length or following or self._left < 0:
            raise Corrupt(f"{BERKELEY} is damaged: what page {number} refers to does not end where it should")
        return b"".join(parts)
