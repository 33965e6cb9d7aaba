"""Images as one archive: an OCI image layout that has Docker's `manifest.json` as well, written in one pass.

Blobs go in as they are stored, so digests survive a save and a load; a blob that several images share is there once.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

from ambi.core.errors import InvalidRequest
from images import manifest, reference
from images.content import parse_json
from images.model import Image

if TYPE_CHECKING:
    from images.store import Store

_NAME, _TAG = "io.containerd.image.name", "org.opencontainers.image.ref.name"


def save(store: Store, names: Sequence[str], target: BinaryIO) -> None:
    """Write the images that `names` mean to `target`, which need not be a file. Raises NotFound before the first byte."""
    if not names:
        raise InvalidRequest("no image is named", hint="ambi save -o FILE IMAGE...")
    wanted: dict[str, tuple[Image, list[reference.Reference]]] = {}
    for image, found in (pair for name in names for pair in _meant(store, name)):
        _, tags = wanted.setdefault(image.id, (image, []))
        tags += [tag for tag in found if tag not in tags]
    held = [diff_id for image, _ in wanted.values() for diff_id in image.layers]
    with store.hold(held), tarfile.open(fileobj=target, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        _write(store, list(wanted.values()), archive)


def _meant(store: Store, name: str) -> list[tuple[Image, list[reference.Reference]]]:
    """Images with the names that the archive gives them: the one asked for, all of a repository, none for an id."""
    if ":" not in name.rpartition("/")[2] and "@" not in name:
        repository = reference.parse(name).repository
        of = [
            (image, [x for x in map(reference.parse, image.names) if x.repository == repository]) for image in store.list()
        ]
        if found := [(image, tags) for image, tags in of if tags]:
            return found
    image = store.resolve(name)
    asked = [tag for tag in map(reference.parse, image.names) if tag.familiar == name or tag.canonical == name]
    return [(image, asked)]


def _write(store: Store, images: Sequence[tuple[Image, list[reference.Reference]]], archive: tarfile.TarFile) -> None:
    docker: list[dict[str, Any]] = []
    entries: list[dict[str, Any]] = []
    written: set[str] = set()
    directories(archive)
    for image, tags in images:
        size = _blob(store, archive, image.manifest, written)
        with os.fdopen(store.content.open(image.manifest), "rb") as file:
            body = parse_json(file.read(), f"manifest {image.manifest}")
        layers = [str(entry["digest"]) for entry in body["layers"]]
        for digest in (image.id, *layers):
            _blob(store, archive, digest, written)
        kind = body.get("mediaType") or manifest.MANIFEST
        entries += oci_entries({"mediaType": kind, "digest": image.manifest, "size": size}, tags)
        docker.append(docker_entry(image.id, tags, layers))
    contents(archive, entries, docker)


def oci_entries(entry: dict[str, Any], tags: Sequence[reference.Reference]) -> list[dict[str, Any]]:
    """The descriptor of a manifest in `index.json`, once for each name."""
    return [{**entry, "annotations": {_NAME: tag.canonical, _TAG: tag.tag}} for tag in tags] or [entry]


def docker_entry(config: str, tags: Sequence[reference.Reference], layers: Sequence[str]) -> dict[str, Any]:
    """An image in `manifest.json`."""
    return {
        "Config": path(config),
        "RepoTags": [tag.familiar for tag in tags] or None,
        "Layers": [path(digest) for digest in layers],
    }


def directories(archive: tarfile.TarFile) -> None:
    for directory in ("blobs", "blobs/sha256"):
        archive.addfile(member(directory, 0, tarfile.DIRTYPE))


def contents(archive: tarfile.TarFile, entries: Sequence[dict[str, Any]], docker: Sequence[dict[str, Any]]) -> None:
    """The lists of what the archive has, an OCI tool's and docker's."""
    index = {"schemaVersion": 2, "mediaType": manifest.INDEX, "manifests": entries}
    for name, body in (("index.json", index), ("manifest.json", docker), ("oci-layout", {"imageLayoutVersion": "1.0.0"})):
        text(archive, name, json.dumps(body, separators=(",", ":")).encode())


def path(digest: str) -> str:
    return f"blobs/sha256/{digest.removeprefix('sha256:')}"


def member(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.type, found.size = kind, size
    found.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    return found


def _blob(store: Store, archive: tarfile.TarFile, digest: str, written: set[str]) -> int:
    """Write a blob that is not there yet; its size."""
    with os.fdopen(store.content.open(digest), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if digest not in written:
            written.add(digest)
            archive.addfile(member(path(digest), size), file)
    return size


def text(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """A small member."""
    archive.addfile(member(name, len(data)), io.BytesIO(data))
