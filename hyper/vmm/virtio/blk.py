"""Disks (virtio 1.2, section 5.2). Data goes between the file and guest memory by preadv and pwritev, without a copy.

    request     u32 type, u32 0, u64 sector; data; u8 status (0 done, 1 error, 2 not known)
    segments    of a discard and of zeros, as data: u64 sector, u32 sectors, u32 flags (1: give the space back)

An error of the file is the guest's to handle: it gets status 1, as of a bad disk. Requests are served one at a time.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from hyper.vmm.virtio.device import Device
from hyper.vmm.virtio.disk import SECTOR, Disk
from hyper.vmm.virtio.queue import Chain, Damaged, Queue, fill, take
from hyper.vmm.virtio.registers import RING_FEATURES

F_SIZE_MAX, F_SEG_MAX, F_RO, F_BLK_SIZE, F_FLUSH = 1 << 1, 1 << 2, 1 << 5, 1 << 6, 1 << 9
F_DISCARD, F_WRITE_ZEROES = 1 << 13, 1 << 14
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2

QUEUE_SIZE = 128
MAX_SEGMENT = 1 << 20  # bytes of one piece
MAX_DISCARD = 1 << 22  # sectors
MAX_ZEROES = 1 << 15  # sectors, for where the host has to write them
MAX_RANGES = 32
ID_BYTES = 20

_HEADER = struct.Struct("<IIQ")
_RANGE = struct.Struct("<QII")
# capacity, size_max, seg_max, geometry, blk_size, topology, writeback, unused, queues, discard: sectors, ranges, alignment,
# zeroes: sectors, ranges, may unmap, unused
_CONFIG = struct.Struct("<QIIHBBIBBHIBBHIIIIIB3x")
assert _CONFIG.size == 60  # struct virtio_blk_config


class Blk(Device):
    """A disk on `disk`, which it owns, and whose `serial` the guest reads (20 bytes of it)."""

    device_id = 2
    name = "blk"
    queue_sizes = (QUEUE_SIZE,)

    def __init__(self, disk: Disk, serial: str) -> None:
        super().__init__()
        self._disk = disk
        self.serial = serial
        self._serial = serial.encode()[:ID_BYTES].ljust(ID_BYTES, b"\0")
        self._write_through = False
        self.features = RING_FEATURES | F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_FLUSH
        self.features |= F_RO if disk.readonly else F_DISCARD | F_WRITE_ZEROES
        self.counts |= {"read": 0, "written": 0, "flushes": 0}
        del self.counts["bytes"]

    def config(self) -> bytes:
        return _CONFIG.pack(
            self._disk.size // SECTOR, MAX_SEGMENT, QUEUE_SIZE - 2, 0, 0, 0, SECTOR, 0, 0, 0, 0, 1, 0, 1,
            MAX_DISCARD, MAX_RANGES, 8, MAX_ZEROES, MAX_RANGES, 1,
        )  # fmt: skip

    @property
    def size(self) -> int:
        return self._disk.size

    def refresh(self) -> None:
        """The file has another size: tell the guest. Through Transport.run."""
        self._disk.refresh()
        self.port.config_changed()

    def replace(self, disk: Disk) -> None:
        """Put another disk behind it, with the same right to write; the old one is closed. Through Transport.run."""
        if disk.readonly != self._disk.readonly:
            raise ValueError("a disk is replaced by one with other rights")
        old, self._disk = self._disk, disk
        old.close()
        self.port.config_changed()

    def activate(self, queues: Sequence[Queue | None], features: int) -> None:
        super().activate(queues, features)
        self._write_through = not features & F_FLUSH  # a driver that never flushes expects each write to last

    def notified(self, index: int) -> None:
        queue = self.queues[index]
        assert queue is not None
        for chain in queue.chains():
            queue.push(chain, self._serve(chain))
        queue.signal()

    def _serve(self, chain: Chain) -> int:
        """Do what `chain` asks for; how many bytes of it were written."""
        self.counts["requests"] += 1
        kind, _, sector = _HEADER.unpack(take(chain.readable, _HEADER.size))
        if not chain.writable:
            raise Damaged("a request to a disk without room for its status")
        status = chain.writable[-1][-1:]
        if len(chain.writable[-1]) > 1:
            chain.writable[-1] = chain.writable[-1][:-1]
        else:
            del chain.writable[-1]
        room = chain.writable_bytes - 1
        try:
            result, written = self._do(kind, sector, chain, room)
        except OSError:
            result, written = IOERR, 0
        if result:
            self.counts["errors"] += 1
        status[0] = result
        # What is written is counted up to the status byte, which is the last.
        return chain.writable_bytes if written == room else written

    def _do(self, kind: int, sector: int, chain: Chain, room: int) -> tuple[int, int]:
        size = chain.readable_bytes - _HEADER.size
        if kind == IN:
            return self._read(sector, chain.writable, room)
        if kind == OUT:
            return self._write(sector, chain.readable, size), 0
        if kind == FLUSH:
            self.counts["flushes"] += 1
            self._disk.flush()
            return OK, 0
        if kind == GET_ID:
            return OK, fill(chain.writable, self._serial)
        if kind in (DISCARD, WRITE_ZEROES) and not self._disk.readonly:
            return self._ranges(kind, chain.readable, size), 0
        return UNSUPP, 0

    def _outside(self, sector: int, size: int) -> bool:
        return bool(size % SECTOR) or sector * SECTOR + size > self._disk.size

    def _read(self, sector: int, pieces: list[memoryview], size: int) -> tuple[int, int]:
        if self._outside(sector, size):
            return IOERR, 0
        self._disk.read(sector * SECTOR, pieces)
        self.counts["read"] += size
        return OK, size

    def _write(self, sector: int, pieces: list[memoryview], size: int) -> int:
        if self._disk.readonly or self._outside(sector, size):
            return IOERR
        self._disk.write(sector * SECTOR, pieces)
        self.counts["written"] += size
        if self._write_through:
            self._disk.flush()
        return OK

    def _ranges(self, kind: int, pieces: list[memoryview], size: int) -> int:
        """A discard or zeros of one or more ranges, all of them checked before the first is touched."""
        if not size or size % _RANGE.size or size > MAX_RANGES * _RANGE.size:
            return IOERR
        ranges = list(_RANGE.iter_unpack(take(pieces, size)))
        most = MAX_DISCARD if kind == DISCARD else MAX_ZEROES
        for sector, count, flags in ranges:
            if flags & ~int(kind == WRITE_ZEROES):
                return UNSUPP
            if count > most or self._outside(sector, count * SECTOR):
                return IOERR
        for sector, count, flags in ranges:
            if not count:
                continue
            if kind == DISCARD:
                self._disk.discard(sector * SECTOR, count * SECTOR)
            else:
                self._disk.zero(sector * SECTOR, count * SECTOR, unmap=bool(flags & 1))
        if self._write_through:
            self._disk.flush()
        return OK

    def close(self) -> None:
        self._disk.close()
