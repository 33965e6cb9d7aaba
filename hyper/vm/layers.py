"""The layers of an image as one read-only disk, without copying a byte: a list of extents, a partition a layer.

The VMM concatenates them: the front of a partition table, each layer's file, gaps of zeros between them, and the table's
copy at the end. The table is a memory file: nothing of it lies on a disk. Every file is handed over as a descriptor, so that
a VMM without rights can read them.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from ambi.core.errors import Corrupt, NotFound, Unsupported, from_os_error
from ambi.core.plan import Layer
from ambi.linux import memfd
from hyper.vm import gpt


class Extent(NamedTuple):
    """`sectors` of the descriptor `fd`, from sector `offset` on."""

    fd: int
    sectors: int
    offset: int


class LayerDisk(NamedTuple):
    """The disk. fds: all descriptors to be inherited; the caller owns and closes them."""

    extents: tuple[Extent, ...]
    fds: tuple[int, ...]


def open_layers(layers: tuple[Layer, ...]) -> LayerDisk:
    """Open the files of `layers`, lowest first, and lay a partition table around them.

    Raises NotFound, Unsupported (not EROFS, more than 128), Corrupt (no whole number of sectors).
    """
    if len(layers) > gpt.MAX_PARTITIONS:
        raise Unsupported(f"an image of {len(layers)} layers does not fit a virtual machine: {gpt.MAX_PARTITIONS} at most")
    fds: list[int] = []
    try:
        sizes = []
        for layer in layers:
            fd, sectors = _open(layer)
            fds.append(fd)
            sizes.append(sectors)
        table = gpt.table(tuple(sizes))
        around = readable("partition table", table.header + table.trailer)
        return LayerDisk(tuple(_extents(table, fds, around)), (*fds, around))
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def _open(layer: Layer) -> tuple[int, int]:
    if layer.form != "erofs":
        raise Unsupported(
            f"layer {layer.name} is a directory; a virtual machine needs EROFS layers",
            hint="the package erofs-utils makes them: apt-get install erofs-utils",
        )
    try:
        fd = os.open(layer.path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NotFound(f"layer {layer.name} is gone: {layer.path}", hint="import the image again") from error
    except OSError as error:
        raise from_os_error(f"cannot open layer {layer.name}", error) from error
    size = os.fstat(fd).st_size
    if size == 0 or size % gpt.SECTOR:
        os.close(fd)
        raise Corrupt(f"layer {layer.name} is damaged: {layer.path} has {size} bytes")
    return fd, size // gpt.SECTOR


def _extents(table: gpt.Table, fds: list[int], around: int) -> list[Extent]:
    extents = [Extent(around, gpt.FIRST, 0)]
    at = gpt.FIRST
    for fd, partition in zip(fds, table.partitions, strict=True):
        if partition.start > at:
            extents.append(_zeros(around, partition.start - at))
        extents.append(Extent(fd, partition.sectors, 0))
        at = partition.start + partition.sectors
    gap = table.total_sectors - gpt.TRAILER_SECTORS - at
    if gap:
        extents.append(_zeros(around, gap))
    extents.append(Extent(around, gpt.TRAILER_SECTORS, gpt.FIRST))
    return extents


def _zeros(around: int, sectors: int) -> Extent:
    """The table's front is zeros between the entries and the first partition."""
    return Extent(around, sectors, gpt.FIRST - gpt.ALIGN)


def readable(name: str, content: bytes) -> int:
    """A sealed memory file, opened for reading only: QEMU takes a descriptor only if its mode is the one it wants."""
    fd = memfd.sealed(name, content)
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(fd)
