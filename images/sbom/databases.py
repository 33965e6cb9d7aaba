"""The small files of an image that say what is installed in it: found in its layers, the highest one first.

A worker picks them out of the layers' archives; nothing is mounted or unpacked. A whiteout hides what lies below it, as does
a file or link where a lower layer has a directory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from ambi.core.errors import AmbiError, Corrupt, Internal, Unsupported
from images.layers.frames import FrameReader
from images.layers.supervisor import Worker, pipe
from images.members import clean

if TYPE_CHECKING:
    from images.model import Image
    from images.store import Store

# What `re.fullmatch` picks of a path, which has no leading slash.
PATTERN = (
    r"var/lib/dpkg/(status|status\.d/[^/]+)|(usr/)?lib/apk/db/installed|(usr/lib|etc)/os-release"
    r"|(usr/lib/sysimage|var/lib)/rpm/(rpmdb\.sqlite(-wal)?|Packages|Packages\.db)"
    r"|.*\.(dist-info/METADATA|egg-info/PKG-INFO|egg-info)|(.*/)?node_modules/(@[^/]+/)?[^/@]+/package\.json"
)
RPM_FOLDERS = ("usr/lib/sysimage/rpm", "var/lib/rpm")
RPM = ("rpmdb.sqlite", "Packages.db", "Packages")  # of those in one folder the first that can be read counts
FILE_BYTES = 64 << 20
ALL_BYTES = 256 << 20
_PACKAGES = 100_000  # of one rpm database


class _Layer(NamedTuple):
    """hidden: paths that the layer takes away. opaque: directories that show nothing of lower layers."""

    files: dict[str, bytes]
    hidden: set[str]
    opaque: set[str]


class Databases(NamedTuple):
    """files: path to content, rpm's databases as lines of JSON, one a package. unread: paths that nothing here reads."""

    files: dict[str, bytes]
    unread: list[str]


def read(store: Store, image: Image) -> Databases:
    """Raises Corrupt, and Unsupported for more than a bill of materials can be made of."""
    found: dict[str, bytes] = {}
    with store.hold(image.layers), Worker() as worker:
        for row in store.image_layers(image):
            source = store.content.open(row.blob)
            try:
                layer = _pick(worker, source)
            finally:
                os.close(source)
            found = {path: data for path, data in found.items() if not _is_hidden(path, layer)} | layer.files
            if sum(map(len, found.values())) > ALL_BYTES:
                raise Unsupported(f"the package databases of {image.id} have more than {ALL_BYTES >> 20} MiB")
    return _translated(found)


def _translated(found: Mapping[str, bytes]) -> Databases:
    """With rpm's databases read. What lies beside one that was read is older, or what SQLite had not written back."""
    files, left = dict[str, bytes](), dict[str, bytes]()
    for path, data in found.items():
        (left if path.startswith(RPM_FOLDERS) else files)[path] = data
    for folder in RPM_FOLDERS:
        for path in (f"{folder}/{name}" for name in RPM):
            if not left.get(path):
                continue
            try:
                files[path] = _of_rpm(path, left[path])
            except Unsupported:
                continue
            del left[path]
            break
    return Databases(files, sorted(path for path, data in left.items() if data))


def _of_rpm(path: str, database: bytes) -> bytes:
    """A database of rpm as lines of JSON, one a package. Raises Corrupt, Unsupported."""
    lines: list[bytes] = []
    with open(os.memfd_create("rpmdb", os.MFD_CLOEXEC), "r+b") as file, Worker(load="images.sbom.rpm") as worker:
        file.write(database)
        file.seek(0)
        take, give = pipe()
        try:
            worker.start({"do": "rpm", "limit": FILE_BYTES}, file.fileno(), give)
        except BaseException:
            os.close(take)
            raise
        finally:
            os.close(give)
        try:
            frames = FrameReader(take)
            while (frame := frames.frame()) is not None and not frame.get("end"):
                lines.append(json.dumps(frame).encode())
                if frame["data"] or len(lines) > _PACKAGES:
                    raise Corrupt("the image worker sent a frame of another form")
        finally:
            os.close(take)
        try:
            worker.result()
        except Corrupt as error:
            raise Corrupt(f"{path}: {error.message}", hint="rpm --rebuilddb repairs it, or leave the file out") from None
    return b"\n".join(lines)


def _is_hidden(path: str, layer: _Layer) -> bool:
    parts = path.split("/")
    above = ["/".join(parts[:count]) for count in range(len(parts))]
    return any(x in layer.opaque for x in above) or any(x in layer.hidden for x in (*above[1:], path))


def _pick(worker: Worker, source: int) -> _Layer:
    take, give = pipe()
    try:
        worker.start({"do": "pick", "pattern": PATTERN, "limit": FILE_BYTES}, source, give)
    except BaseException:
        os.close(take)
        raise
    finally:
        os.close(give)
    layer, broken = _Layer({}, set(), set()), None
    try:
        _take(FrameReader(take), layer)
    except AmbiError as error:
        broken = error
    finally:
        os.close(take)
    try:
        worker.result()
    except Internal as error:
        raise broken or error from None
    if broken is not None:
        raise broken
    return layer


def _take(frames: FrameReader, layer: _Layer) -> None:
    size = 0
    while (frame := frames.frame()) is not None and not frame.get("end"):
        name, kind = clean(str(frame["name"])), frame.get("kind")
        size += frame["data"] + 64
        if size > ALL_BYTES:
            raise Unsupported(f"the package databases of a layer have more than {ALL_BYTES >> 20} MiB")
        if kind == "f":
            data = bytearray()
            frames.copy(frame["data"], data.extend)
            layer.files[name] = bytes(data)
        elif kind == "opaque":
            layer.opaque.add(name)
        elif kind == "hidden":
            layer.hidden.add(name)
        else:
            raise Corrupt("the image worker sent a frame of another form")
