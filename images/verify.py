"""The scrub: whether every blob has its digest and every layer is what its blob says, and the repair of what is not.

A layer is a pure function of its archive, so it is checked by making it once more and comparing. Repair makes a bad layer
again from its blob, and gets a damaged blob again from a registry that an image's digest names.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ambi.core.errors import AmbiError, NotFound
from ambi.core.events import Progress, ProgressSink
from ambi.core.plan import Layer
from images import reference
from images.database import LayerRow
from images.layers.supervisor import Worker
from images.model import Image
from images.registry import settings as registries
from images.registry.client import Descriptor, Repository
from images.registry.settings import Credentials
from images.registry.stream import BlobStream
from images.snapshots import discard

if TYPE_CHECKING:
    from images.store import Store

_READ = 1 << 20
_STEP = 64 << 20


class Finding(NamedTuple):
    """One damaged object. kind: `blob` or `layer`. name: the digest, or the layer's short name. images: that need it.

    repaired: how, "" when it is still damaged; then `hint` says what can be done.
    """

    kind: str
    name: str
    problem: str
    images: tuple[str, ...]
    repaired: str = ""
    hint: str = ""


def verify(store: Store, *, repair: bool, progress: ProgressSink) -> list[Finding]:
    """Everything that is damaged. Nothing is changed without `repair`, and nothing that is whole ever is."""
    images = store.list()
    with store.hold([diff_id for image in images for diff_id in image.layers]):
        return list(_Scrub(store, images, repair, progress).findings())


class _Scrub:
    def __init__(self, store: Store, images: list[Image], repair: bool, progress: ProgressSink) -> None:
        self._store, self._images, self._repair, self._progress = store, images, repair, progress
        self._users: dict[str, list[Image]] = {}  # of blobs
        self._rows: dict[str, LayerRow] = {}
        for image in images:
            rows = store.image_layers(image)
            for digest in dict.fromkeys((image.manifest, image.id, *(row.blob for row in rows))):
                self._users.setdefault(digest, []).append(image)
            self._rows.update({row.diff_id: row for row in rows})

    def findings(self) -> Iterator[Finding]:
        bad: set[str] = set()
        for digest, users in self._users.items():
            if problem := self._blob_problem(digest):
                found = self._mended_blob(digest, problem, users)
                bad |= {digest} if not found.repaired else set()
                yield found
        form = self._store.layer_form()[0]
        for row in self._rows.values():
            layer = self._store.snapshots.find(row.diff_id, form)
            if layer is not None and row.blob not in bad:
                yield from self._layer(row, layer)

    # Blobs

    def _blob_problem(self, digest: str) -> str:
        try:
            fd = self._store.content.open(digest)
        except NotFound:
            return "it is missing"
        done, hashed = 0, hashlib.sha256()
        with os.fdopen(fd, "rb", 0) as file:
            size = os.fstat(fd).st_size
            try:
                while data := file.read(_READ):
                    hashed.update(data)
                    done += len(data)
                    if done % _STEP < _READ:
                        self._progress(Progress(digest[7:19], "Checking", done, size))
            except OSError as error:
                return f"it cannot be read: {error.strerror}"
        found = hashed.hexdigest()
        return "" if f"sha256:{found}" == digest else f"its digest is sha256:{found}"

    def _mended_blob(self, digest: str, problem: str, users: list[Image]) -> Finding:
        names = tuple(_shown(image) for image in users)
        finding = Finding(
            "blob", digest, problem, names, hint=f"get the image again: ambi pull {names[0]}, or load its archive"
        )
        if not self._repair:
            return finding
        for source in _sources(users):
            try:
                self._get(digest, source, manifest=digest in {image.manifest for image in users})
                return finding._replace(repaired=f"pulled again from {source.repository}", hint="")
            except AmbiError as error:
                finding = finding._replace(hint=f"{source.repository}: {error.message}")
        return finding

    def _get(self, digest: str, source: reference.Reference, *, manifest: bool) -> None:
        repository = Repository(source, registries.load(), Credentials())
        blob = self._store.content.partial(digest)
        blob.spoil()
        blob = self._store.content.partial(digest)
        try:
            if manifest:
                blob.write(repository.manifest(digest).data)
            else:
                size = next((row.blob_bytes for row in self._rows.values() if row.blob == digest), None)
                wanted = Descriptor("", digest, 16 << 20 if size is None else size)
                if size is None:
                    blob.write(repository.document(wanted, "config"))
                else:
                    stream = BlobStream(repository, wanted, 0, lambda done: self._tell(digest, "Downloading", done, size))
                    while data := stream.read(_READ):
                        blob.write(data)
            if blob.digest != digest:
                raise NotFound(f"{source.repository} sends other bytes for {digest}")
            blob.sync()
            os.rename(blob.path, self._store.content.path(digest))
        finally:
            blob.spoil()
            repository.close()

    def _tell(self, digest: str, status: str, done: int, total: int) -> None:
        self._progress(Progress(digest[7:19], status, done, total))

    # Layers

    def _layer(self, row: LayerRow, layer: Layer) -> Iterator[Finding]:
        self._tell(row.diff_id, "Checking layer", 0, row.tar_bytes)
        source = self._store.content.open(row.blob)
        try:
            with Worker() as worker:
                made = self._store.snapshots.prepare(layer.form, worker, source)
        finally:
            os.close(source)
        try:
            problem = _difference(made.path, layer.path)
            if not problem:
                return
            names = tuple(_shown(image) for image in self._images if row.diff_id in image.layers)
            finding = Finding("layer", layer.name, problem, names, hint="ambi image verify --repair makes it again")
            if self._repair:
                discard(layer.path)
                os.rename(made.path, layer.path)
                finding = finding._replace(repaired="made again from its archive", hint="")
            yield finding
        finally:
            discard(made.path)


def _shown(image: Image) -> str:
    return image.names[0] if image.names else image.id[7:19]


def _sources(users: list[Image]) -> list[reference.Reference]:
    """Repositories that are known to have what these images need."""
    known = [reference.parse(name) for image in users for name in image.digests]
    return list({x.repository: x for x in known}.values())


def _difference(right: Path, found: Path) -> str:
    """What is wrong with a layer, "" for nothing. Directories are compared by names, owners, modes, times and contents."""
    if not found.exists():
        return "it is missing"
    if not found.is_dir():
        return "" if _same_bytes(right, found) else "its bytes are not what its archive makes"
    for here, there in zip(_walk(right), _walk(found), strict=False):
        if here[:2] != there[:2]:
            return f"{here[0]!r} is not as in its archive"
        if here[2] and not _same_bytes(right / here[0], found / there[0]):
            return f"the content of {here[0]!r} is not as in its archive"
    return "" if sum(1 for _ in _walk(right)) == sum(1 for _ in _walk(found)) else "it has other files than its archive"


def _walk(root: Path) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Path below `root`, what stat says, and whether it is a file; in one order everywhere."""
    waiting = [""]
    while waiting:
        directory = waiting.pop()
        for entry in sorted(os.scandir(root / directory), key=lambda x: x.name):
            path = f"{directory}/{entry.name}" if directory else entry.name
            status = entry.stat(follow_symlinks=False)
            regular = entry.is_file(follow_symlinks=False)
            size = status.st_size if regular else 0
            yield path, (status.st_mode, status.st_uid, status.st_gid, size, status.st_mtime_ns), regular
            if entry.is_dir(follow_symlinks=False):
                waiting.append(path)


def _same_bytes(one: Path, other: Path) -> bool:
    with open(one, "rb", 0) as first, open(other, "rb", 0) as second:
        if os.fstat(first.fileno()).st_size != os.fstat(second.fileno()).st_size:
            return False
        while data := first.read(_READ):
            if data != second.read(_READ):
                return False
    return True
