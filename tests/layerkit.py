"""Archives for layer tests, and layers made of them the way the store does it."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ambi.linux import mount
from images.layers.convert import Converted
from images.layers.supervisor import Worker
from images.snapshots import FORMS, discard

LIMIT = 8 << 30


def member(name: str, data: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    """A member for `write_tar`; `fields` are those of TarInfo, and `pax` for records of its own."""
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    entry.pax_headers = fields.pop("pax", {})  # type: ignore[assignment]
    for key, value in fields.items():
        setattr(entry, key, value)
    return entry, data


def directory(name: str, **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, type=tarfile.DIRTYPE, **{"mode": 0o755, **fields})


def symlink(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, type=tarfile.SYMTYPE, linkname=target)


def hard_link(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, type=tarfile.LNKTYPE, linkname=target)


def tar_bytes(*members: tuple[tarfile.TarInfo, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format, encoding="utf-8", errors="surrogateescape") as tar:
        for entry, data in members:
            tar.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def write_tar(path: Path, *members: tuple[tarfile.TarInfo, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    path.write_bytes(tar_bytes(*members, format=format))
    return path


def convert(form: str, archive: Path, target: Path, limit_bytes: int = LIMIT) -> Converted:
    """Make a layer of `archive` at `target` with a real worker; nothing is left there after an error."""
    source = os.open(archive, os.O_RDONLY)
    try:
        with Worker() as worker:
            return FORMS[form].make(worker, source, target, limit_bytes)
    except BaseException:
        discard(target)
        raise
    finally:
        os.close(source)


def mount_erofs(layer: Path, place: Path) -> None:
    """From the file itself, or by a loop device where the kernel or the file system wants that."""
    try:
        mount.mount(layer, place, "erofs", mount.MS_RDONLY)
    except OSError:
        subprocess.run(["mount", "-t", "erofs", "-o", "ro,loop", layer, place], check=True)


@contextmanager
def tree_of(form: str, layer: Path) -> Iterator[Path]:
    """The tree of a layer: mounted when it is a file, after fsck.erofs has accepted it."""
    if form == "dir":
        yield layer
        return
    checked = subprocess.run(["fsck.erofs", layer], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    place = layer.with_name(layer.name + ".mnt")
    place.mkdir()
    mount_erofs(layer, place)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)
        place.rmdir()
