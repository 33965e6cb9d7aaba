"""Archives for layer tests, and layers made of them the way the store does it."""

from __future__ import annotations

import io
import os
import random
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ambi.linux import mount
from images.layers.convert import Converted
from images.layers.supervisor import Worker
from images.snapshots import FORMS, discard

LIMIT = 8 << 30


def member(name: str, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    """A member for `write_tar`; `fields` are those of TarInfo, and `pax` for records of its own."""
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    entry.pax_headers = fields.pop("pax", {})
    for key, value in fields.items():
        setattr(entry, key, value)
    return entry, data


def directory(name: str, *, mode: int = 0o755, **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, type=tarfile.DIRTYPE, mode=mode, **fields)


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


def many_layers(work: Path, count: int) -> list[Path]:
    """Layers that add, change, replace, link, hide and clear, made from one seed."""
    random.seed(count)
    archives = []
    for number in range(count):
        members = [directory("./", mode=0o755, mtime=number), directory("shared", mode=0o700 + number % 8)]
        members.append(
            member(f"shared/{number}", random.randbytes(number * 37 % 5000), uid=number, mode=0o644, mtime=number)
        )
        members.append(member("shared/last", b"%d" % number, mode=0o600))
        if number % 5 == 1:
            members.append(hard_link(f"shared/{number}-again", f"shared/{number}"))
        if number % 7 == 3:
            members.append(member(f"shared/.wh.{number - 1}"))
        if number % 11 == 5:
            members += [directory("cleared"), member("cleared/.wh..wh..opq"), member(f"cleared/{number}", b"new")]
        elif number % 3 == 0:
            members.append(member(f"cleared/{number}", b"old", mode=0o640))
        if number % 13 == 6:
            members += [member(".wh.swap"), directory("swap"), member(f"swap/{number}", b"dir")]
        elif number % 13 == 12:
            members.append(symlink("swap", "shared"))
        if number % 17 == 9:
            members.append(member(f"dev{number}", type=b"3", devmajor=1, devminor=number, mode=0o600))
        archives.append(write_tar(work / f"{number}.tar", *members))
    return archives


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
