"""Layers as one disk: the partition table, the extents, and what QEMU makes of them."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from ambi.core.errors import AmbiError, Corrupt, NotFound, Unsupported
from ambi.core.plan import Layer
from hyper.qemu import vmdk
from hyper.vm import gpt, layers

SECTOR = 512


def test_header_checksums_and_copies() -> None:
    table = gpt.table((4096, 5, 8))
    disk_end = table.total_sectors - 1
    primary, backup = table.header[SECTOR : 2 * SECTOR], table.trailer[-SECTOR:]
    entries = table.header[2 * SECTOR : 34 * SECTOR]
    assert entries == table.trailer[:-SECTOR]
    for header, own, other, entries_at in ((primary, 1, disk_end, 2), (backup, disk_end, 1, disk_end - 32)):
        fields = gpt.HEADER.unpack_from(header)
        assert (fields[0], fields[5], fields[6], fields[10]) == (b"EFI PART", own, other, entries_at)
        zeroed = header[:16] + bytes(4) + header[20:92]
        assert fields[3] == zlib.crc32(zeroed)
        assert fields[13] == zlib.crc32(entries)
    assert table.header[510:512] == b"\x55\xaa" and table.header[450] == 0xEE


def test_partitions_do_not_overlap_and_are_aligned() -> None:
    sizes = (4096, 5, 8, 1)
    table = gpt.table(sizes)
    assert [p.sectors for p in table.partitions] == list(sizes)
    at = gpt.FIRST
    for partition in table.partitions:
        assert partition.start >= at and partition.start % 8 == 0
        at = partition.start + partition.sectors
    assert table.total_sectors >= at + gpt.TRAILER_SECTORS and table.total_sectors % gpt.ALIGN == 0


def test_partition_type_is_linux_data() -> None:
    entry = gpt.table((8,)).header[2 * SECTOR : 2 * SECTOR + gpt.ENTRY_SIZE]
    assert uuid.UUID(bytes_le=entry[:16]) == uuid.UUID("0FC63DAF-8483-4772-8E79-3D69D8477DE4")
    assert struct.unpack_from("<QQ", entry, 32) == (2048, 2055)


def test_128_partitions_fit_and_no_more() -> None:
    table = gpt.table((8,) * 128)
    assert len({entry.start for entry in table.partitions}) == 128
    with pytest.raises(ValueError):
        gpt.table((8,) * 129)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[tuple[Layer, ...]]:
    made = []
    for number, size in enumerate((4096, 512 * 13, 1 << 20, 512)):
        path = tmp_path / f"{number}.erofs"
        path.write_bytes(os.urandom(size))
        made.append(Layer(f"l{number}", "erofs", path, size))
    yield tuple(made)


def assembled(disk: layers.LayerDisk) -> bytes:
    """What the extents add up to."""
    return b"".join(os.pread(x.fd, x.sectors * SECTOR, x.offset * SECTOR) for x in disk.extents)


def test_extents_are_the_whole_disk(files: tuple[Layer, ...]) -> None:
    disk = layers.open_layers(files)
    try:
        whole = assembled(disk)
        table = gpt.table(tuple(layer.size_bytes // SECTOR for layer in files))
        assert len(whole) == table.total_sectors * SECTOR
        for layer, partition in zip(files, table.partitions, strict=True):
            start = partition.start * SECTOR
            assert whole[start : start + layer.size_bytes] == layer.path.read_bytes()
    finally:
        for fd in disk.fds:
            os.close(fd)


@pytest.mark.skipif(not shutil.which("qemu-img"), reason="needs qemu: qemu-img is not there")
def test_qemu_reads_the_descriptor_as_we_mean_it(files: tuple[Layer, ...], tmp_path: Path) -> None:
    disk = layers.open_layers(files)
    try:
        text = vmdk.descriptor(disk.extents)
        for fd in disk.fds:
            text = text.replace(f'"/dev/fdset/{fd}"'.encode(), f'"/proc/{os.getpid()}/fd/{fd}"'.encode())
        source, raw = tmp_path / "layers.vmdk", tmp_path / "layers.raw"
        source.write_bytes(text)
        subprocess.run(["qemu-img", "convert", "-f", "vmdk", "-O", "raw", source, raw], check=True, timeout=60)
        assert raw.read_bytes() == assembled(disk)
    finally:
        for fd in disk.fds:
            os.close(fd)


@pytest.mark.parametrize(
    "content,form,error",
    [(None, "erofs", NotFound), (b"", "erofs", Corrupt), (bytes(513), "erofs", Corrupt), (bytes(512), "dir", Unsupported)],
    ids=["gone", "empty", "cut", "directory"],
)
def test_what_is_no_layer_is_refused(tmp_path: Path, content: bytes | None, form: str, error: type[AmbiError]) -> None:
    good = tmp_path / "good"
    good.write_bytes(bytes(4096))
    if content is not None:
        (tmp_path / "bad").write_bytes(content)
    bad = Layer("base", form, tmp_path / "bad", 0)  # type: ignore[arg-type]
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(error, match="base"):
        layers.open_layers((Layer("good", "erofs", good, 4096), bad))
    assert len(os.listdir("/proc/self/fd")) == before


def test_too_many_layers_are_refused(files: tuple[Layer, ...]) -> None:
    with pytest.raises(Unsupported, match="129 layers"):
        layers.open_layers(files[:1] * 129)


def test_nothing_that_is_handed_over_can_be_written(files: tuple[Layer, ...]) -> None:
    disk = layers.open_layers(files)
    again = os.open(f"/proc/self/fd/{disk.fds[-1]}", os.O_RDWR)  # the table; root may open it so, and still not write
    try:
        for fd in (*disk.fds, again):
            with pytest.raises(OSError):
                os.write(fd, b"x")
    finally:
        for fd in (*disk.fds, again):
            os.close(fd)
