"""Disks and random numbers: what a driver reads, writes and gets told, and what the file has afterwards."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from hyper.vmm.virtio import registers as reg
from hyper.vmm.virtio.blk import DISCARD, F_FLUSH, F_RO, FLUSH, GET_ID, IN, IOERR, OK, OUT, UNSUPP, WRITE_ZEROES, Blk
from hyper.vmm.virtio.disk import Extents, File, Nothing
from hyper.vmm.virtio.rng import Rng
from tests.virtiokit import Buffers, Driver

SIZE = 1 << 20


class Guest(Driver):
    def request(self, kind: int, sector: int, data: list[Buffers], *, indirect: bool = False) -> int:
        """The status."""
        status = self.writable(1)
        self.memory.write(status.address, b"\xee")
        pieces = [self.readable(struct.pack("<IIQ", kind, 0, sector)), *data, status]
        head = self.rings[0].add(pieces, indirect=self.data(16 * len(pieces)) if indirect else 0)
        self.kick(0)
        assert [used[0] for used in self.rings[0].got()] == [head]
        return self.bytes(status)[0]

    def read_disk(self, sector: int, *sizes: int) -> bytes:
        pieces = [self.writable(size) for size in sizes]
        assert self.request(IN, sector, pieces) == OK
        return b"".join(map(self.bytes, pieces))


def opened(path: Path, flags: int = os.O_RDWR) -> int:
    return os.open(path, flags | os.O_CLOEXEC)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(b"".join(struct.pack("<I", number) * 128 for number in range(SIZE // 512)))
    return path


@pytest.fixture
def guest(image: Path) -> Iterator[Guest]:
    made = Guest(Blk(File(opened(image)), "disk"))
    made.start()
    yield made
    made.close()


def sector(number: int) -> bytes:
    return struct.pack("<I", number) * 128


def test_configuration(guest: Guest) -> None:
    assert guest.config(0, 8) == SIZE // 512 and guest.config(20, 4) == 512
    assert not guest.offered() & F_RO
    assert guest.config(8, 4) == 1 << 20 and guest.config(12, 4) == 126 and guest.config(34, 2) == 1
    assert [guest.config(at, 4) for at in (36, 40, 44, 48, 52)] == [1 << 22, 32, 8, 1 << 15, 32] and guest.config(56, 1) == 1


def test_reads(guest: Guest) -> None:
    assert guest.read_disk(5, 512) == sector(5)
    assert guest.read_disk(7, 100, 924, 4096) == b"".join(map(sector, range(7, 17)))
    pieces = [guest.writable(512) for _ in range(100)]
    assert guest.request(IN, 9, pieces, indirect=True) == OK
    assert b"".join(map(guest.bytes, pieces)) == b"".join(map(sector, range(9, 109)))
    assert guest.device.counters()["read"] == 512 + 5120 + 51200


def test_used_length_counts_the_status(guest: Guest) -> None:
    ring = guest.rings[0]
    head = ring.add([guest.readable(struct.pack("<IIQ", IN, 0, 1)), guest.writable(513)])  # data and status in one piece
    guest.kick(0)
    assert ring.got() == [(head, 513)]


def test_writes_and_flush(guest: Guest, image: Path) -> None:
    assert guest.request(OUT, 3, [guest.readable(b"a" * 300), guest.readable(b"b" * 724)]) == OK
    assert guest.request(FLUSH, 0, []) == OK
    content = image.read_bytes()
    assert content[1536:2560] == b"a" * 300 + b"b" * 724 and content[2560:3072] == sector(5) and len(content) == SIZE
    assert guest.device.counters()["flushes"] == 1


def test_header_in_pieces(guest: Guest) -> None:
    header = struct.pack("<IIQ", IN, 0, 4)
    target, status = guest.writable(512), guest.writable(1)
    guest.rings[0].add([guest.readable(header[:3]), guest.readable(header[3:]), target, status])
    guest.kick(0)
    assert guest.bytes(target) == sector(4) and guest.bytes(status) == b"\0"


def test_serial(guest: Guest) -> None:
    target = guest.writable(20)
    assert guest.request(GET_ID, 0, [target]) == OK
    assert guest.bytes(target) == b"disk".ljust(20, b"\0")


def test_discard_and_zeroes(guest: Guest, image: Path) -> None:
    before = image.stat().st_blocks
    assert guest.request(DISCARD, 0, [guest.readable(struct.pack("<QII", 64, 1024, 0))]) == OK
    assert image.stat().st_blocks < before
    assert guest.read_disk(64, 512) == bytes(512)
    for flags, first in ((0, 1200), (1, 1300)):
        two = struct.pack("<QII", first, 1, flags) + struct.pack("<QII", first + 2, 1, flags)
        assert guest.request(WRITE_ZEROES, 0, [guest.readable(two)]) == OK
        assert guest.read_disk(first, 1536) == bytes(512) + sector(first + 1) + bytes(512)
    assert image.stat().st_size == SIZE


@pytest.mark.parametrize(
    ("kind", "data", "status"),
    [
        (DISCARD, struct.pack("<QII", 0, 1, 1), UNSUPP),
        (WRITE_ZEROES, struct.pack("<QII", 0, 1, 2), UNSUPP),
        (DISCARD, struct.pack("<QII", SIZE // 512, 1, 0), IOERR),
        (DISCARD, struct.pack("<QII", (1 << 64) - 1, 1, 0), IOERR),
        (WRITE_ZEROES, struct.pack("<QII", 0, 0xFFFFFFFF, 0), IOERR),
        (DISCARD, struct.pack("<QII", 0, 1, 0) * 33, IOERR),
        (DISCARD, b"x" * 15, IOERR),
        (DISCARD, b"", IOERR),
        (OUT, b"x" * 511, IOERR),
        (2, b"x", UNSUPP),
        (0xFFFFFFFF, b"x", UNSUPP),
    ],
)
def test_refused(guest: Guest, image: Path, kind: int, data: bytes, status: int) -> None:
    before = image.read_bytes()
    assert guest.request(kind, 0, [guest.readable(data)] if data else []) == status
    assert image.read_bytes() == before


@pytest.mark.parametrize("at", [SIZE // 512, SIZE // 512 - 1, 1 << 55, (1 << 64) - 1])
def test_beyond_the_end(guest: Guest, image: Path, at: int) -> None:
    assert guest.request(IN, at, [guest.writable(1024)]) == IOERR
    assert guest.request(OUT, at, [guest.readable(b"x" * 1024)]) == IOERR
    assert image.stat().st_size == SIZE
    assert guest.device.counters()["errors"] == 2


def test_disk_that_shrinks_and_grows(guest: Guest, image: Path) -> None:
    os.truncate(image, SIZE // 2)
    assert guest.request(IN, SIZE // 512 - 1, [guest.writable(512)]) == IOERR
    assert guest.request(IN, SIZE // 1024 - 1, [guest.writable(1024)]) == IOERR, "half of it is still there"
    assert guest.read_disk(0, 512) == sector(0)
    os.truncate(image, 2 * SIZE)
    blk = guest.device
    assert isinstance(blk, Blk)
    guest.transport.run(blk.refresh)
    assert guest.config(0, 8) == 2 * SIZE // 512 and guest.read(reg.INTERRUPT_STATUS) == 3
    assert guest.read_disk(2 * SIZE // 512 - 1, 512) == bytes(512)


def test_error_of_the_file(tmp_path: Path) -> None:
    """A descriptor that cannot be written: the guest sees an error, and the device goes on."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    guest = Guest(Blk(File(opened(path, os.O_RDONLY)), "disk"))
    guest.start()
    assert guest.request(OUT, 0, [guest.readable(b"x" * 512)]) == IOERR
    assert guest.read_disk(0, 512) == bytes(512)
    guest.close()


def test_write_through_without_flush(image: Path) -> None:
    flushed = []

    class Watched(File):
        def flush(self) -> None:
            flushed.append(True)
            super().flush()

    guest = Guest(Blk(Watched(opened(image)), "disk"))
    guest.start(guest.offered() & ~F_FLUSH)
    assert guest.request(OUT, 0, [guest.readable(b"x" * 512)]) == OK
    assert flushed == [True]
    guest.reset()
    guest.start()
    assert guest.request(OUT, 0, [guest.readable(b"x" * 512)]) == OK
    assert flushed == [True]
    guest.close()


def test_layers_behind_one_another(tmp_path: Path) -> None:
    """Pieces of three files, one of them twice; a read over all borders; nothing can be written."""
    expect = b""
    extents = []
    for number, (sectors, offset) in enumerate(((3, 0), (1, 2), (5, 1))):
        path = tmp_path / str(number)
        content = os.urandom(16 * 512)
        path.write_bytes(content)
        extents.append((opened(path, os.O_RDONLY), sectors, offset))
        expect += content[offset * 512 : (offset + sectors) * 512]
    extents += [(extents[0][0], 0, 0), (extents[0][0], 2, 0)]
    expect += expect[:1024]
    guest = Guest(Blk(Extents(extents), "layers"))
    guest.start()
    assert guest.offered() & F_RO and guest.config(0, 8) == 11
    assert guest.read_disk(0, 100, 5532) == expect
    assert guest.read_disk(2, 512 * 3) == expect[1024:2560]
    assert [guest.read_disk(number, 512) for number in range(11)] == [expect[at : at + 512] for at in range(0, 5632, 512)]
    assert guest.request(IN, 10, [guest.writable(1024)]) == IOERR
    assert guest.request(OUT, 0, [guest.readable(b"x" * 512)]) == IOERR
    assert guest.request(DISCARD, 0, [guest.readable(struct.pack("<QII", 0, 1, 0))]) == UNSUPP
    os.truncate(tmp_path / "2", 512)
    assert guest.request(IN, 4, [guest.writable(512)]) == IOERR
    guest.close()
    with pytest.raises(OSError):
        os.fstat(extents[0][0])


def test_another_disk_behind_it(guest: Guest, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"z" * 2048)
    blk = guest.device
    assert isinstance(blk, Blk)
    guest.transport.run(lambda: blk.replace(File(opened(other))))
    assert guest.config(0, 8) == 4 and guest.read_disk(3, 512) == b"z" * 512
    with pytest.raises(ValueError, match="other rights"):
        blk.replace(File(opened(other), readonly=True))


def test_no_disk_behind_it_yet(image: Path) -> None:
    blk = Blk(Nothing(readonly=False), "disk")
    guest = Guest(blk)
    guest.start()
    assert guest.config(0, 8) == 0
    assert guest.request(IN, 0, [guest.writable(512)]) == IOERR
    assert guest.request(OUT, 0, [guest.readable(b"x" * 512)]) == IOERR
    assert guest.request(FLUSH, 0, []) == OK
    guest.transport.run(lambda: blk.replace(File(opened(image))))
    assert guest.config(0, 8) == SIZE // 512 and guest.read_disk(2, 512) == sector(2)
    guest.close()


@pytest.mark.parametrize("other", [False, True])
def test_restored_on_another_disk(guest: Guest, image: Path, other: bool) -> None:
    """A driver that is restored learns that the size has changed, and is left alone when it has not."""
    state = guest.transport.save()
    if other:
        os.truncate(image, 2 * SIZE)
    restored = Guest(Blk(File(opened(image)), "disk"), ram=guest.backing)
    restored.transport.restore(state)
    restored.transport.resume()
    assert restored.interrupted() and restored.read(reg.INTERRUPT_STATUS) == (3 if other else 1)
    restored.rings, restored.features = guest.rings, guest.features
    restored.turn()
    assert restored.read_disk(5, 512) == sector(5)
    restored.close()


def test_request_without_room_or_header(guest: Guest) -> None:
    guest.rings[0].add([guest.readable(struct.pack("<IIQ", IN, 0, 0))])
    guest.kick(0)
    assert "status" in guest.transport.failure
    guest.reset()
    guest.start()
    guest.rings[0].add([guest.readable(b"short"), guest.writable(1)])
    guest.kick(0)
    assert "16 are needed" in guest.transport.failure


def test_random_numbers() -> None:
    guest = Guest(Rng())
    guest.start()
    pieces = [guest.writable(64), guest.writable(100), guest.writable(8000)]
    guest.rings[0].add(pieces[:2])
    guest.rings[0].add(pieces[2:])
    guest.kick(0)
    assert [used[1] for used in guest.rings[0].got()] == [164, 4096]
    first, second = guest.bytes(pieces[0]), guest.bytes(pieces[1])
    assert len(set(first)) > 10 and len(set(second)) > 10 and first != second[:64]
    assert guest.bytes(pieces[2])[4096:] == bytes(3904)
    guest.rings[0].add([guest.readable(b"x")])
    guest.kick(0)
    assert "no room" in guest.transport.failure
    guest.close()
