"""The writable disk of a VM: a sparse ext4 image, made once by mkfs.ext4 and then cloned. The host never mounts it."""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path
from typing import NamedTuple

from ambi.core.errors import AmbiError, Conflict, Internal, InvalidRequest, StorageFull, Unsupported, from_os_error
from ambi.linux import holes
from hyper.vm import jail

FILE = "disk.img"  # in the upper directory
MIN_BYTES = 64 << 20
MKFS_VERSION = 1  # raised when the options below change, so that old templates are not used
MKFS = (
    "mkfs.ext4", "-q", "-F", "-m", "0", "-L", "ambi",
    # A hole reads as zeros: nothing is left for the guest to initialise, and a clone copies some hundred KiB.
    "-E", "discard,lazy_journal_init=1",
)  # fmt: skip


class Volume(NamedTuple):
    """A disk of a mount: an image file with ext4, which the guest finds by `name` as its serial number."""

    name: str
    path: Path
    readonly: bool


def ensure(path: Path, size_bytes: int, templates: Path) -> None:
    """Make `path` unless it is there already: an empty file system of `size_bytes` (rounded up to MiB).

    One that is there is made longer if it is shorter, and keeps its file system: see `has_room`.
    templates: where the file system to clone is kept.
    Raises Unsupported (no mkfs.ext4), StorageFull.
    """
    if path.exists():
        if path.stat().st_size < _rounded(size_bytes):
            grow(path, size_bytes)
        return
    size_bytes = _rounded(size_bytes)
    template = _template(size_bytes, templates)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        clone(template, temporary)
        os.rename(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise from_os_error(f"cannot make the disk {path}", error) from error


def grow(path: Path, size_bytes: int) -> int:
    """Make the image `path` longer, to whole MiB; how long it is. Raises InvalidRequest (it would shrink), StorageFull."""
    size_bytes = _rounded(size_bytes)
    try:
        now = path.stat().st_size
        if size_bytes < now:
            raise InvalidRequest(
                f"the disk of a virtual machine cannot shrink from {now >> 20} MiB to {size_bytes >> 20} MiB",
                hint="a new one can be smaller: ambi create --storage-opt size=...",
            )
        os.truncate(path, size_bytes)
    except OSError as error:
        raise from_os_error("cannot make the disk of a virtual machine larger", error) from error
    return size_bytes


def has_room(path: Path) -> bool:
    """Whether the file system of the image `path` is smaller than the image: one that has grown, and was not told yet.

    Two numbers of the superblock are compared (ext4(5): s_blocks_count, s_log_block_size), which the guest may have forged.
    """
    with open(path, "rb") as file:
        block = os.pread(file.fileno(), 0x400, 0x400)
        size = os.fstat(file.fileno()).st_size
    if len(block) < 0x400:
        return False
    low, high = (int.from_bytes(block[at : at + 4], "little") for at in (0x4, 0x150))
    log = min(int.from_bytes(block[0x18:0x1C], "little"), 6)
    return (low | high << 32) << 10 + log < size


def _rounded(size_bytes: int) -> int:
    return -(-max(size_bytes, MIN_BYTES) >> 20) << 20


def open_volume(volume: Volume) -> int:
    """A descriptor of the image, locked as long as it or a copy of it is open: one writer, or readers, at a time.

    Raises Conflict (in use), NotFound, InvalidRequest (no regular file).
    """
    flags = os.O_RDONLY if volume.readonly else os.O_RDWR
    try:
        fd = os.open(volume.path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise from_os_error("cannot open the disk of a volume", error) from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise InvalidRequest(f"the disk of a volume, {volume.path}, is no regular file")
        fcntl.flock(fd, (fcntl.LOCK_SH if volume.readonly else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise Conflict(
            f"the disk {volume.path} is in use by another virtual machine",
            hint="stop that one first: `ambi ps` shows what runs; a disk belongs to one at a time",
        ) from error
    except BaseException:
        os.close(fd)
        raise
    return fd


def _template(size_bytes: int, directory: Path) -> Path:
    path = directory / f"ext4-{size_bytes >> 20}m-{MKFS_VERSION}.img"
    if path.exists():
        return path
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.truncate(size_bytes)
        status, output = jail.run((*MKFS, str(temporary)))
        if status:
            raise _mkfs_error(output)
        os.rename(temporary, path)
    except FileNotFoundError as error:
        raise Unsupported(
            "cannot make the disk of a virtual machine: there is no mkfs.ext4", hint="apt-get install e2fsprogs"
        ) from error
    except OSError as error:
        raise from_os_error(f"cannot make {path}", error) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _mkfs_error(output: str) -> AmbiError:
    text = " ".join(output.split())
    kind = StorageFull if "No space left" in text else Internal
    return kind(f"mkfs.ext4 failed: {text[-300:]}")


def clone(source: Path, target: Path) -> None:
    """A copy of `source` that shares its blocks where the file system can, else of its data without its holes."""
    with open(source, "rb") as reader, open(target, "xb") as writer:
        os.fchmod(writer.fileno(), 0o600)
        if holes.share_blocks(reader.fileno(), writer.fileno()):
            return
        size = os.fstat(reader.fileno()).st_size
        writer.truncate(size)
        for at, end in holes.data(reader.fileno(), 0, size):
            _copy_data(reader.fileno(), writer.fileno(), at, end)


def _copy_data(reader: int, writer: int, at: int, end: int) -> None:
    while at < end:
        data = os.pread(reader, min(end - at, 1 << 20), at)
        if not data:
            return
        at += os.pwrite(writer, data, at)
