"""Layers in the form in which they are mounted, by diff ID: `layers/NAME.erofs`, a file, or `layers/NAME`, a directory.

`prepare` makes a layer from an archive in the ingest directory, with a worker that the caller gives; `publish`, under the
store's mutex, moves it to its place. Nothing is mounted here: a container's driver and a VM's take the same answer.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from ambi.core.errors import from_os_error
from ambi.core.plan import Layer
from ambi.linux.libc import syscall
from images.content import ContentStore
from images.database import Database, SnapshotRow
from images.layers import apply
from images.layers.convert import Converted
from images.layers.supervisor import Worker, pipe

FormName = Literal["erofs", "dir"]
_RESERVE_BYTES = 64 << 20  # of free space, left for everybody else
_NR_SYNCFS = 306


class Form(Protocol):
    """How one form is made, synced and named."""

    name: FormName
    suffix: str

    def make(self, worker: Worker, source: int, target: Path, limit_bytes: int) -> Converted: ...


class ErofsForm:
    """One EROFS file, written by the worker through a descriptor."""

    name: FormName = "erofs"
    suffix = ".erofs"

    def make(self, worker: Worker, source: int, target: Path, limit_bytes: int) -> Converted:
        fd = self.start(worker, source, target, limit_bytes)
        try:
            converted = worker.converted()
            os.fsync(fd)
            return converted
        finally:
            os.close(fd)

    def start(self, worker: Worker, source: int, target: Path, limit_bytes: int) -> int:
        """Begin, so that the caller can feed `source`; the descriptor is the caller's to close after the worker's answer.
        The file is not synced then.
        """
        fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        worker.start({"do": "erofs", "limit": limit_bytes}, source, fd)
        return fd


class DirForm:
    """A directory tree, for hosts that cannot mount EROFS. The worker parses, `apply` makes the files."""

    name: FormName = "dir"
    suffix = ""

    def make(self, worker: Worker, source: int, target: Path, limit_bytes: int) -> Converted:
        read_end, write_end = pipe()
        try:
            try:
                worker.start({"do": "tree", "limit": limit_bytes}, source, write_end)
            finally:
                os.close(write_end)
            size, failed = 0, None
            try:
                size = apply.apply(read_end, target)
            except Exception as error:
                failed = error
        finally:
            os.close(read_end)
        converted = worker.converted()  # the worker's own error, where it has one, is the cause
        if failed is not None:
            raise failed
        self._sync(target)
        return converted._replace(size_bytes=size)

    def _sync(self, target: Path) -> None:
        fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            syscall(_NR_SYNCFS, fd, what="syncfs")
        finally:
            os.close(fd)


EROFS, DIR = ErofsForm(), DirForm()
FORMS: dict[str, Form] = {"erofs": EROFS, "dir": DIR}


class Prepared(NamedTuple):
    """A layer that is complete but not yet in its place; a directory is synced, a file need not be."""

    form: FormName
    path: Path
    converted: Converted


class Snapshots:
    """The layers of one store."""

    def __init__(self, content: ContentStore, database: Database) -> None:
        self._content = content
        self._database = database
        self._root = content.root / "layers"
        self._root.mkdir(mode=0o711, exist_ok=True)

    def prepare(self, form: FormName, worker: Worker, source: int) -> Prepared:
        """Make a layer of the archive in the file `source`. Nothing is left after an error."""
        path = self._content.staging()
        try:
            return Prepared(form, path, FORMS[form].make(worker, source, path, self.limit_bytes()))
        except OSError as error:
            discard(path)
            raise from_os_error("cannot store the layer", error) from error
        except BaseException:
            discard(path)
            raise

    def limit_bytes(self) -> int:
        """How much a layer may hold: what the file system has free for anyone, less a reserve."""
        free = os.statvfs(self._root)
        return max(free.f_bavail * free.f_frsize - _RESERVE_BYTES, 0)

    def staging(self) -> Path:
        return self._content.staging()

    def find(self, diff_id: str, form: FormName) -> Layer | None:
        row = self._database.snapshot(diff_id, form)
        return Layer(row.name, form, self._path(row.name, form), row.size_bytes) if row else None

    def publish(self, prepared: Prepared) -> None:
        """Move it to its place, in a transaction that has stored its layer; discard it when there is one already."""
        diff_id = prepared.converted.diff_id
        if self._database.snapshot(diff_id, prepared.form) is not None:
            discard(prepared.path)
            return
        name = self._name(diff_id, prepared.form)
        path = self._path(name, prepared.form)
        discard(path)  # left by a crash before its transaction ended
        os.rename(prepared.path, path)
        self._database.add_snapshot(SnapshotRow(diff_id, prepared.form, name, prepared.converted.size_bytes))

    def _name(self, diff_id: str, form: FormName) -> str:
        """Eleven digits of the diff ID behind the form's letter; others, when somebody has contrived a collision."""
        digits, taken = diff_id.removeprefix("sha256:"), self._database.snapshot_names()
        for start in range(len(digits) - 10):
            name = form[0] + digits[start : start + 11]
            if name not in taken:
                return name
        raise AssertionError("54 names are taken")

    def _path(self, name: str, form: FormName) -> Path:
        return self._root / (name + FORMS[form].suffix)

    def sweep(self) -> int:
        """Remove what the database does not list; the bytes freed."""
        freed, keep = 0, self._database.snapshot_names()
        for entry in list(os.scandir(self._root)):
            if entry.name.removesuffix(".erofs") not in keep:
                freed += _disk_bytes(entry)
                discard(Path(entry.path))
        return freed


def _disk_bytes(entry: os.DirEntry[str]) -> int:
    """What a layer of either form takes on the disk, each inode once."""
    inodes: dict[int, int] = {}
    waiting = [entry]
    while waiting:
        found = waiting.pop()
        status = found.stat(follow_symlinks=False)
        inodes[status.st_ino] = status.st_blocks * 512
        if found.is_dir(follow_symlinks=False):
            with os.scandir(found.path) as entries:
                waiting += entries
    return sum(inodes.values())


def discard(path: Path) -> None:
    """Remove a prepared or half-made layer of either form, and its bodies."""
    for found in (path, path.with_name(path.name + ".bodies")):
        if found.is_dir() and not found.is_symlink():
            shutil.rmtree(found)
        else:
            found.unlink(missing_ok=True)
