"""The files of snapshots of users' VMs, below the instance's `snapshots` directory. Files only; saving.py makes them.

    NAME/manifest.json   MANIFEST
    NAME/state           of the VMM and its devices, as the back-end wrote it; of QEMU with the memory
    NAME/memory          the guest's memory, of our monitor: hyper/vmm/snapshot_memory.py
    NAME/disk.img        the writable disk; and VOLUME.img, the disk of each writable volume
    .new-NAME/           one that is being made, or was when its maker ended

    MANIFEST = {"format": 1, "name", "created_ns", "parent": NAME or null, "vmm": name of the back-end,
                "words": {what: value}, "vcpus", "memory_bytes", "common": whether it has the devices of a template,
                "nics": how many, "devices": {interface: number of its device}, "next_id": of the guest protocol,
                "paused": bool, "still_ns": how long the guest stood still, "notes": {of whoever had it made},
                "files": {file: [bytes, digest or null]}, "checksum": of all this}

A directory NAME is complete: it is renamed to its name when all of it is on the disk. All of it is root's alone. A digest is
blake2b of what a file has besides zeros, block by block: holes and zeros are the same. `memory` has its digests in `state`.
"""

from __future__ import annotations

import json
import os
from _blake2 import blake2b  # hashlib brings OpenSSL with it, which a shim can do without
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ambi.core.deadline import Deadline
from ambi.core.errors import Conflict, Corrupt, InvalidRequest, NotFound, Unsupported, from_os_error
from ambi.linux import holes

FORMAT = 1
DIRECTORY = "snapshots"  # in the instance's data directory
MANIFEST, STATE, MEMORY, DISK = "manifest.json", "state", "memory", "disk.img"
NEW = ".new-"
BLOCK = 1 << 20
DIGEST = 32  # bytes
MAX_MANIFEST = 1 << 20
MAX_CHAIN = 16  # snapshots, of which all but the first are differences
ELSEWHERE = "restore it where it was made, or start the machine from its image: ambi start"
AGAIN = "remove the snapshot, and make it again"
_FIRST = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
_REST = _FIRST | frozenset("_.-")
_ZEROS = bytes(BLOCK)


class Snapshot(NamedTuple):
    """A manifest that was read and is whole, and where it lies. `files`: (bytes, digest in hex or None) by name."""

    home: Path
    name: str
    created_ns: int
    parent: str | None
    vmm: str
    words: dict[str, str]
    vcpus: int
    memory_bytes: int
    common: bool
    devices: dict[str, int]
    nics: int
    next_id: int
    paused: bool
    still_ns: int
    notes: dict[str, str]
    files: dict[str, tuple[int, str | None]]

    @property
    def disks(self) -> dict[str, str]:
        """Files of disks by what the guest calls them: `disk`, `volume3`."""
        return {name.removesuffix(".img"): name for name in self.files if name.endswith(".img")}

    def allocated_bytes(self) -> int:
        """What its files take on the disk. Clones count, though they may share their blocks."""
        return sum((self.home / name).stat().st_blocks * 512 for name in (*self.files, MANIFEST))


def check_name(name: str) -> None:
    """Raises InvalidRequest."""
    if not name or name[0] not in _FIRST or not _REST.issuperset(name) or len(name) > 128:
        raise InvalidRequest(
            f"invalid name of a snapshot: {name!r}, only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed",
            hint="1 to 128 letters, digits, `_`, `.` and `-`, the first a letter or digit",
        )


def names(directory: Path) -> list[str]:
    """Of those that are complete, sorted."""
    try:
        found = [entry.name for entry in os.scandir(directory) if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    return sorted(name for name in found if name[0] in _FIRST)


def read(home: Path) -> Snapshot:
    """Raises NotFound, Corrupt (its manifest), Unsupported (one of a newer ambi)."""
    path = home / MANIFEST
    try:
        with open(path, "rb") as file:
            body = json.loads(file.read(MAX_MANIFEST))
        checksum = body.pop("checksum")
        if body["format"] != FORMAT:
            raise Unsupported(
                f"snapshot {home.name} has format {body['format']}, and this ambi knows {FORMAT}",
                hint="use the ambi that made it: ambi version",
            )
        if checksum != _checksum(body):
            raise ValueError("it does not match its checksum")
        del body["format"]
        body["files"] = {str(name): (int(size), digest) for name, (size, digest) in body["files"].items()}
        return Snapshot(home, **{**body, "name": home.name})
    except FileNotFoundError as error:
        if home.is_dir():
            raise Corrupt(f"snapshot {home.name} is damaged: {path} is gone", hint=AGAIN) from error
        raise NotFound(f"there is no snapshot {home.name}", hint="ambi snapshot ls") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Corrupt(f"snapshot {home.name} is damaged: {path}: {error}", hint=AGAIN) from error
    except OSError as error:
        raise from_os_error(f"cannot read snapshot {home.name}", error) from error


def chain(snapshot: Snapshot) -> list[Snapshot]:
    """It and those that it follows, the first one first. Raises as `read`, and Corrupt for one without end."""
    found = [snapshot]
    while (parent := found[0].parent) is not None:
        if len(found) >= MAX_CHAIN:
            raise Corrupt(f"snapshot {snapshot.name} follows more than {MAX_CHAIN} others", hint=AGAIN)
        try:
            found.insert(0, read(snapshot.home.with_name(parent)))
        except NotFound as error:
            raise Corrupt(f"snapshot {found[0].name} follows {parent}, which is gone", hint=AGAIN) from error
    return found


def children(directory: Path, name: str) -> list[str]:
    """Those that directly follow `name`. One whose manifest cannot be read follows nothing: it is of no use as it is."""
    found = []
    for other in names(directory):
        try:
            if read(directory / other).parent == name:
                found.append(other)
        except (Corrupt, Unsupported, NotFound):
            pass
    return found


def verify(snapshot: Snapshot, by: Deadline) -> None:
    """Read all its files that have a digest of their own. Raises Corrupt with the file's name, DeadlineExceeded."""
    for name, (size, digest) in snapshot.files.items():
        path = snapshot.home / name
        try:
            with open(path, "rb") as file:
                check_file(file.fileno(), size, digest, path, by)
        except FileNotFoundError as error:
            raise Corrupt(f"snapshot {snapshot.name} is damaged: {path} is gone", hint=AGAIN) from error
        except OSError as error:
            raise from_os_error(f"cannot read snapshot {snapshot.name}", error) from error


def check_file(fd: int, size: int, digest: str | None, path: Path, by: Deadline) -> None:
    """Whether the file behind `fd` is the one that was saved as `path`. Raises Corrupt, OSError, DeadlineExceeded."""
    there = os.fstat(fd).st_size
    if there != size:
        raise Corrupt(f"{path} is damaged: it has {there} bytes, not {size}", hint=AGAIN)
    if digest is not None and digest_of(fd, by) != digest:
        raise Corrupt(f"{path} is damaged: it does not match its checksum", hint=AGAIN)


def digest_of(fd: int, by: Deadline) -> str:
    digest = blake2b(digest_size=DIGEST)
    for number in _blocks(fd, os.fstat(fd).st_size):
        by.check("the checksum of a file")
        block = os.pread(fd, BLOCK, number * BLOCK)
        if block != _ZEROS[: len(block)]:
            digest.update(number.to_bytes(8, "little"))
            digest.update(block)
    return digest.hexdigest()


def _blocks(fd: int, size: int) -> Iterator[int]:
    """The numbers of the blocks that are not in a hole, ascending."""
    done = 0
    for start, end in holes.data(fd, 0, size):
        yield from range(max(done, start // BLOCK), -(-end // BLOCK))
        done = -(-end // BLOCK)


def copy(source: int, target: int, by: Deadline) -> None:
    """Make `target`, which is empty, what `source` is: sharing its blocks where the file system can, else without its holes.

    Raises OSError, DeadlineExceeded.
    """
    if holes.share_blocks(source, target):
        return
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    for start, end in holes.data(source, 0, size):
        for at in range(start, end, BLOCK):
            by.check("the copy of a disk")
            piece = os.pread(source, min(BLOCK, end - at), at)
            if piece != _ZEROS[: len(piece)]:
                write_all(target, piece, at)


def write_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def make(home: Path) -> None:
    """The directory `.new-NAME` of `home`, empty. Raises Conflict when there is a snapshot of that name, an AmbiError."""
    if os.path.lexists(home):
        raise Conflict(
            f"there is a snapshot {home.name} already", hint="choose another name, or remove it: ambi snapshot rm"
        )
    draft = draft_of(home)
    try:
        home.parent.mkdir(mode=0o700, exist_ok=True)
        remove(draft)
        draft.mkdir(mode=0o700)
    except OSError as error:
        raise from_os_error(f"cannot make snapshot {home.name}", error) from error


def draft_of(home: Path) -> Path:
    return home.with_name(NEW + home.name)


def create_file(draft: Path, name: str) -> int:
    """A descriptor of a new file, for reading and writing. Raises OSError."""
    return os.open(draft / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def publish(home: Path, manifest: dict[str, Any], by: Deadline) -> None:
    """Complete what lies in `.new-NAME`: checksums, all of it on stable storage, its name.

    `manifest`: what saving.save returned, without format, checksum and digests. Raises an AmbiError; then nothing is left.
    """
    draft = draft_of(home)
    try:
        body = {**manifest, "format": FORMAT, "files": {name: _sealed(draft / name, by) for name in manifest["files"]}}
        fd = create_file(draft, MANIFEST)
        try:
            write_all(fd, json.dumps({**body, "checksum": _checksum(body)}).encode(), 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        _sync_directory(draft)
        os.rename(draft, home)
        _sync_directory(home.parent)
    except OSError as error:
        discard(home)
        raise from_os_error(f"cannot write snapshot {home.name}", error) from error
    except BaseException:
        discard(home)
        raise


def _sealed(path: Path, by: Deadline) -> list[object]:
    """[bytes, digest] of a file, which is on the disk afterwards."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return [os.fstat(file.fileno()).st_size, None if path.name == MEMORY else digest_of(file.fileno(), by)]


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def discard(home: Path) -> None:
    """Remove what lies in `.new-NAME`, as far as it can be; its space is free even while somebody has a file of it open."""
    try:
        for name in os.listdir(draft_of(home)):
            os.truncate(draft_of(home) / name, 0)
        remove(draft_of(home))
    except OSError:  # the next engine tries again
        pass


def sweep(directory: Path) -> None:
    """Remove what was being made when its maker ended. Raises OSError."""
    try:
        left = [entry.name for entry in os.scandir(directory) if entry.name.startswith(NEW)]
    except FileNotFoundError:
        return
    for name in left:
        remove(directory / name)


def remove(home: Path) -> None:
    """Remove a snapshot's directory; under another name first, so that none is ever there in part. Raises OSError."""
    try:
        if not home.name.startswith(NEW):
            gone = draft_of(home)
            remove(gone)
            os.rename(home, gone)
            home = gone
        for entry in os.listdir(home):
            (home / entry).unlink()
        home.rmdir()
    except FileNotFoundError:
        return


def _checksum(body: dict[str, Any]) -> str:
    return blake2b(json.dumps(body, sort_keys=True).encode(), digest_size=DIGEST).hexdigest()
