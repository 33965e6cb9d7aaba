"""The `memory` file of a saved machine: a raw, sparse image of its RAM, and what of it a snapshot defines.

The regions of RAM stand one behind the other, from low to high; a page of the file is 4096 bytes. A first snapshot defines
all pages and has a hole for each that is zero, so that it can be mapped as it is, copy on write (then nothing is checked but
its size, see Chain.check). One with a parent defines the pages that changed since, zeros among them; the others are its
parent's, and their place is a hole.

Two sections of the state file belong to it. RUNS: zlib of (first page, pages) as pairs of u32, ascending: what the file has;
of a first snapshot, what is not zero. DIGESTS: for each 2 MiB of the file with pages in RUNS, in order, blake2b of those.
"""

from __future__ import annotations

import errno
import os
import struct
import zlib
from _blake2 import blake2b
from collections.abc import Iterable, Iterator, Sequence

from ambi.core.errors import Corrupt, from_os_error
from hyper.kvm.memory import Memory, set_bits
from hyper.vmm.memory import GuestMemory, Region
from hyper.vmm.snapshot import DIGEST, DIGESTS, PAGE, RUNS, Saved

Run = tuple[int, int]  # pages of the file: (first, end)
CHUNK = 512  # pages of a digest, and of a read
_PAIR = struct.Struct("<II")
_ZEROS = bytes(CHUNK * PAGE)
_ZERO = bytes(PAGE)
MAX_CHAIN = 64
_ENTRY = 8  # bytes of a page in /proc/PID/pagemap, Documentation/admin-guide/mm/pagemap.rst
_IS_THERE = bytes(int(byte & 0xC0 != 0) for byte in range(256))  # of its last byte: present, or swapped
_MAX_RUNS = 1 << 27  # bytes: of 64 GiB where every other page is zero


class Chain:
    """A snapshot with its parents: `layers` are (state, descriptor of the memory file), the first snapshot first.

    The descriptors stay the caller's. Raises Corrupt when they do not follow each other, a memory file is not as long as its
    state says, or the map of its pages makes no sense. Contents are checked as they are read.
    """

    __slots__ = ("_digests", "_runs", "layers")

    def __init__(self, layers: Sequence[tuple[Saved, int]]) -> None:
        if not layers or len(layers) > MAX_CHAIN:
            raise Corrupt(f"a chain of {len(layers)} snapshots", hint=f"give 1 to {MAX_CHAIN}, the first one first")
        self.layers = tuple(layers)
        parent: Saved | None = None
        for saved, fd in layers:
            if saved.parent != (parent.id if parent else None) or (parent and parent.regions != saved.regions):
                raise Corrupt(
                    f"snapshot {saved.id[:12]} does not follow {parent.id[:12] if parent else 'nothing'}",
                    hint="give its parent before it: the state file names it",
                )
            size = os.fstat(fd).st_size
            if size != saved.memory_bytes:
                raise _damaged(saved, f"it has {size} bytes, not {saved.memory_bytes}")
            parent = saved
        self._runs = [unpack_runs(saved) for saved, _ in layers]
        self._digests = [_digests(saved, runs) for (saved, _), runs in zip(layers, self._runs, strict=True)]

    @property
    def top(self) -> Saved:
        return self.layers[-1][0]

    def load(self, memory: GuestMemory) -> None:
        """Fill `memory`, which must be fresh (zeros) and of the same regions. Raises Corrupt, or an AmbiError of the file.

        After an error it holds some of it.
        """
        _same_regions(self.top, memory)
        views = [region.view for region in memory.regions]
        for first, end, data in self.chunks():
            for start, stop, region, at in _in_regions(memory, first, end):
                offset = (start - first) * PAGE
                views[region][at : at + (stop - start) * PAGE] = data[offset : offset + (stop - start) * PAGE]

    def chunks(self) -> Iterator[tuple[int, int, memoryview]]:
        """(first page, end, content) of each chunk that is not all zero, checked, ascending."""
        for number in sorted(set().union(*self._digests)):
            first, end, data = self._chunk(number)
            yield first, end, memoryview(data)

    def check(self) -> None:
        """Read all that the layers have. Raises Corrupt."""
        for _ in self.chunks():
            pass

    def content(self, number: int) -> bytearray | None:
        """Chunk `number`, as it is: who restores it finds out whether it was good. None where no layer has anything."""
        if any(number in digests for digests in self._digests):
            return self._chunk(number, check=False)[2]
        return None

    def _chunk(self, number: int, *, check: bool = True) -> tuple[int, int, bytearray]:
        first = number * CHUNK
        end = min(first + CHUNK, self.top.memory_bytes // PAGE)
        data = bytearray((end - first) * PAGE)
        view = memoryview(data)
        for (saved, fd), runs, digests in zip(self.layers, self._runs, self._digests, strict=True):
            if number not in digests:
                continue
            digest = blake2b(digest_size=DIGEST)
            for start, stop in _clip(runs, first, end):
                piece = view[(start - first) * PAGE : (stop - first) * PAGE]
                _read_into(fd, piece, start * PAGE, saved)
                if check:
                    digest.update(piece)
            if check and digest.digest() != digests[number]:
                raise _damaged(saved, f"its bytes from {first * PAGE} to {end * PAGE} do not match their checksum")
        return first, end, data


class Look:
    """Which pages of RAM are there, so that others need not be touched: a fault would make them.

    pagemap: a descriptor of the process's own /proc/self/pagemap. source: of the file that RAM is a private copy of, in the
    order of a memory file; -1 where what is not there is zeros.
    """

    __slots__ = ("pagemap", "source")

    def __init__(self, pagemap: int, source: int = -1) -> None:
        self.pagemap = pagemap
        self.source = source

    def read(self, region: Region, at: int, pages: int, offset: int) -> bytes | bytearray:
        """A copy of [at, at + pages) of the region, which is at `offset` of a memory file. Raises OSError."""
        length = pages * PAGE
        entries = os.pread(self.pagemap, pages * _ENTRY, (region.memory.address + at) // PAGE * _ENTRY)
        there = entries[_ENTRY - 1 :: _ENTRY].translate(_IS_THERE)
        if there.count(1) == pages:
            return bytes(region.view[at : at + length])
        first = there.find(1)
        if first < 0 and not self._has_data(offset, length):
            return _ZEROS[:length]
        data = self._untouched(length, offset)
        while first >= 0:
            end = there.find(0, first)
            end = pages if end < 0 else end
            data[first * PAGE : end * PAGE] = region.view[at + first * PAGE : at + end * PAGE]
            first = there.find(1, end)
        return data

    def _has_data(self, offset: int, length: int) -> bool:
        try:
            return self.source >= 0 and os.lseek(self.source, offset, os.SEEK_DATA) < offset + length
        except OSError as error:
            if error.errno != errno.ENXIO:  # a hole to its end
                raise
            return False

    def _untouched(self, length: int, offset: int) -> bytearray:
        data = bytearray(length)
        if self.source < 0:
            return data
        view, end, found = memoryview(data), offset + length, offset
        while found < end:
            try:
                start = os.lseek(self.source, found, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:  # a hole to its end
                    raise
                break
            found = min(end, os.lseek(self.source, start, os.SEEK_HOLE))
            while start < found:
                count = os.preadv(self.source, [view[start - offset : found - offset]], start)
                if not count:
                    raise OSError(errno.EIO, "the file that memory is a copy of has become shorter")
                start += count
        return data


def write_memory(
    fd: int,
    memory: GuestMemory,
    parent: Chain | None = None,
    written: Sequence[bytes | bytearray] | None = None,
    *,
    look: Look | None = None,
) -> dict[str, bytes]:
    """Save the RAM of a machine that stands still to an empty file; the result are the sections for its state.

    With a parent only what changed is written. `written` says what did: a bitmap of pages for each region, from low to high,
    of the dirty log of KVM *and* of all that devices and vhost wrote, which that log has not. Without it every page is
    compared with the parent's; `look` spares those that are not there. The file is still to be synced: no guest has
    to wait for that. Raises an AmbiError when it cannot be written, and leaves a file that fits no state.
    """
    total = memory.size // PAGE
    if parent is not None:
        _same_regions(parent.top, memory)
    if written is not None:
        if parent is None:
            raise ValueError("without a parent all pages are written")
        runs = _from_bitmaps(memory, written)
    else:
        runs = _merged(run for number in range(-(-total // CHUNK)) for run in _changed(memory, number, total, parent, look))
    try:
        os.ftruncate(fd, 0)
        os.ftruncate(fd, total * PAGE)
        digests = _write_runs(fd, memory, runs)
    except OSError as error:
        raise from_os_error("cannot write the snapshot's memory", error) from error
    packed = b"".join(_PAIR.pack(first, end - first) for first, end in runs)
    return {RUNS: zlib.compress(packed, 1), DIGESTS: b"".join(digests)}


def unpack_runs(saved: Saved) -> list[Run]:
    """What pages the memory file of `saved` has. Raises Corrupt when they are not ascending, or beyond its end."""
    total = saved.memory_bytes // PAGE
    unpack = zlib.decompressobj()
    try:
        data = unpack.decompress(saved.sections[RUNS], min(_PAIR.size * (total + 1), _MAX_RUNS))
    except (KeyError, zlib.error) as error:
        raise _damaged(saved, f"the map of its pages cannot be read ({error})") from error
    if len(data) % _PAIR.size or not unpack.eof:
        raise _damaged(saved, "the map of its pages has no end")
    runs, at = [], 0
    for first, count in _PAIR.iter_unpack(data):
        if first < at or not count or first + count > total:
            raise _damaged(saved, f"the map of its pages has {count} at {first} behind {at}")
        at = first + count
        runs.append((first, at))
    return runs


def _digests(saved: Saved, runs: list[Run]) -> dict[int, bytes]:
    """By number of chunk."""
    numbers = sorted({number for first, end in runs for number in range(first // CHUNK, (end - 1) // CHUNK + 1)})
    data = saved.sections.get(DIGESTS, b"")
    if len(data) != 32 * len(numbers):
        raise _damaged(saved, f"{len(data)} bytes of checksums, not {32 * len(numbers)}")
    return {number: data[32 * n : 32 * n + 32] for n, number in enumerate(numbers)}


def _write_runs(fd: int, memory: GuestMemory, runs: list[Run]) -> list[bytes]:
    digests: dict[int, blake2b] = {}
    for first, end in _split(runs):
        digest = digests.setdefault(first // CHUNK, blake2b(digest_size=DIGEST))
        for start, stop, region, at in _in_regions(memory, first, end):
            piece = memory.regions[region].view[at : at + (stop - start) * PAGE]
            digest.update(piece)
            offset = start * PAGE
            while piece:
                done = os.pwrite(fd, piece, offset)
                piece, offset = piece[done:], offset + done
    return [digests[number].digest() for number in sorted(digests)]


def _changed(memory: GuestMemory, number: int, total: int, parent: Chain | None, look: Look | None) -> Iterator[Run]:
    """The pages of a chunk that differ from the parent's, or from zeros."""
    first, end = number * CHUNK, min((number + 1) * CHUNK, total)
    before = (parent and parent.content(number)) or _ZEROS[: (end - first) * PAGE]
    pieces = [
        look.read(memory.regions[n], at, stop - start, start * PAGE) if look else _bytes(memory.regions[n], at, stop - start)
        for start, stop, n, at in _in_regions(memory, first, end)
    ]
    now = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    if now == before:
        return
    for page in range(first, end):
        at = (page - first) * PAGE
        if now[at : at + PAGE] != before[at : at + PAGE]:
            yield page, page + 1


def _bytes(region: Region, at: int, pages: int) -> bytes:
    """A copy. A hole of a memfd is not looked at, because reading it would fill it."""
    memory, length = region.memory, pages * PAGE
    if isinstance(memory, Memory) and memory.fd >= 0:
        try:
            data = os.lseek(memory.fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # no data from here to the end
                raise
            data = memory.size
        if data >= at + length:
            return bytes(length)
    return bytes(region.view[at : at + length])


def _from_bitmaps(memory: GuestMemory, bitmaps: Sequence[bytes | bytearray]) -> list[Run]:
    runs, base = [], 0
    for region, bitmap in zip(memory.regions, bitmaps, strict=True):
        pages = (region.end - region.gpa) // PAGE
        for first, end in set_bits(bitmap):
            if end > pages:
                raise ValueError(f"page {end - 1} of {pages} in the log of a region")
            runs.append((base + first, base + end))
        base += pages
    return _merged(runs)


def _merged(runs: Iterable[Run]) -> list[Run]:
    """Ascending runs, neighbours joined."""
    result: list[Run] = []
    for first, end in runs:
        if result and result[-1][1] == first:
            result[-1] = (result[-1][0], end)
        else:
            result.append((first, end))
    return result


def _split(runs: Iterable[Run]) -> Iterator[Run]:
    """The same pages, no run across the end of a chunk."""
    for first, end in runs:
        at = first
        while at < end:
            stop = min(end, (at // CHUNK + 1) * CHUNK)
            yield at, stop
            at = stop


def _clip(runs: Sequence[Run], first: int, end: int) -> Iterator[Run]:
    """What of the runs is in [first, end)."""
    low, high = 0, len(runs)
    while low < high:  # the first run that ends behind `first`
        middle = (low + high) // 2
        low, high = (middle + 1, high) if runs[middle][1] <= first else (low, middle)
    while low < len(runs) and runs[low][0] < end:
        yield max(runs[low][0], first), min(runs[low][1], end)
        low += 1


def _in_regions(memory: GuestMemory, first: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """[first, end) of the file as (first, end, number of the region, byte in it)."""
    base = 0
    for number, region in enumerate(memory.regions):
        stop = base + (region.end - region.gpa) // PAGE
        if first < stop and base < end:
            start = max(first, base)
            yield start, min(end, stop), number, (start - base) * PAGE
        base = stop


def _same_regions(saved: Saved, memory: GuestMemory) -> None:
    here = tuple((region.gpa, region.end - region.gpa) for region in memory.regions)
    if here != saved.regions:
        raise ValueError(f"the snapshot has its RAM at {saved.regions}, the machine at {here}")


def _read_into(fd: int, piece: memoryview, offset: int, saved: Saved) -> None:
    try:
        while piece:
            done = os.preadv(fd, [piece], offset)
            if not done:
                raise _damaged(saved, f"it ends at {offset}")
            piece, offset = piece[done:], offset + done
    except OSError as error:
        raise from_os_error("cannot read the snapshot's memory", error) from error


def _damaged(saved: Saved, what: str) -> Corrupt:
    return Corrupt(
        f"the memory of snapshot {saved.id[:12]} is damaged: {what}", hint="remove the snapshot, and make it again"
    )
