"""From the store to a registry: what it lacks of the layers, the config, then the manifest under its tag."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from ambi.core.errors import AmbiError, InvalidRequest, NotFound
from ambi.core.events import Progress, ProgressSink
from images import reference
from images.content import parse_json
from images.model import Image
from images.reference import Reference
from images.registry import settings as registries
from images.registry.client import Descriptor, Repository, descriptor
from images.registry.settings import Credentials

if TYPE_CHECKING:
    from images.store import Store

AT_ONCE = 3


class Pushed(NamedTuple):
    """digest, size: of the manifest."""

    image: Image
    tag: str
    digest: str
    size: int


def push(store: Store, wanted: Reference, credentials: Credentials, progress: ProgressSink) -> Pushed:
    """Send the image that has this name, as it was stored: its digests are the same there.

    Raises NotFound (no such image here), Forbidden, Unavailable, InvalidRequest.
    """
    if wanted.digest:
        raise InvalidRequest(
            "cannot push a digest reference", hint="give the image a name with a tag: ambi tag IMAGE NAME:TAG"
        )
    try:
        image = store.resolve(wanted.canonical)
    except NotFound as error:
        raise NotFound(
            f"An image does not exist locally with the tag: {wanted.repository}", hint="`ambi image ls` lists what is there"
        ) from error
    with store.hold(image.layers):
        repository = Repository(wanted, registries.load(), credentials, action="pull,push")
        try:
            return _Push(store, image, repository, progress).run()
        finally:
            repository.close()


class _Push:
    """One image into one repository."""

    def __init__(self, store: Store, image: Image, repository: Repository, progress: ProgressSink) -> None:
        self._store, self._image, self._repository = store, image, repository
        self._progress = progress
        self._telling = threading.Lock()

    def _tell(self, unit: str, status: str, done: int = 0, total: int = 0) -> None:
        with self._telling:
            self._progress(Progress(unit, status, done, total))

    def run(self) -> Pushed:
        store, image, repository = self._store, self._image, self._repository
        data = _whole(store, image.manifest)
        body = parse_json(data, f"manifest {image.manifest}")
        name = f"manifest {image.manifest}"
        layers = list(dict.fromkeys(descriptor(entry, name) for entry in body.get("layers") or ()))
        self._tell("", f"The push refers to repository [{repository.reference.domain}/{repository.reference.path}]")
        for layer in layers:
            self._tell(layer.digest[7:19], "Preparing")
        sources = self._sources()
        with ThreadPoolExecutor(AT_ONCE, "push") as pool:
            results = [pool.submit(self._layer, layer, sources) for layer in layers]
        for result in results:
            result.result()
        config = descriptor(body.get("config"), name)
        if not repository.has_blob(config.digest):
            self._upload(config, lambda _: None)
        media_type = body.get("mediaType")
        kind = media_type if isinstance(media_type, str) else "application/vnd.oci.image.manifest.v1+json"
        tag = repository.reference.tag
        repository.put_manifest(tag, data, kind)
        plain = repository.reference._replace(tag="", digest=image.manifest)
        store.set_names(image, [plain])
        return Pushed(store.resolve(image.id), tag, image.manifest, len(data))

    def _sources(self) -> list[str]:
        """Other repositories of this registry that are known to have the image, for mounts."""
        own = self._repository.reference
        known = [reference.parse(name) for name in (*self._image.digests, *self._image.names)]
        return list(dict.fromkeys(x.path for x in known if x.domain == own.domain and x.path != own.path))

    def _layer(self, layer: Descriptor, sources: list[str]) -> None:
        short = layer.digest[7:19]
        if told := spared(self._repository, layer.digest, sources):
            self._tell(short, told)
            return
        self._upload(layer, lambda sent: self._tell(short, "Pushing", sent, layer.size))
        self._tell(short, "Pushed")

    def _upload(self, blob: Descriptor, told: Callable[[int], None]) -> None:
        with os.fdopen(self._store.content.open(blob.digest), "rb") as file:
            self._repository.upload(blob.digest, blob.size, _Counted(file, told))


class _Counted:
    """A file that tells how far it has been read."""

    def __init__(self, file: BinaryIO, told: Callable[[int], None]) -> None:
        self._file, self._told = file, told
        self._sent = 0

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._sent += len(data)
        if data:
            self._told(self._sent)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        self._sent = offset if not whence else self._sent
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _whole(store: Store, digest: str) -> bytes:
    with os.fdopen(store.content.open(digest), "rb") as file:
        return file.read()


def spared(repository: Repository, digest: str, sources: Sequence[str]) -> str | None:
    """Why a blob need not be sent, in docker's words: it is there, or the registry took it from one of two `sources`, paths
    of its other repositories. None when it is to be sent. Raises an AmbiError when the registry does not answer."""
    if repository.has_blob(digest):
        return "Layer already exists"
    for source in sources[:2]:
        try:
            if repository.mount(digest, source):
                return f"Mounted from {source}"
        except AmbiError:  # we may not read there: it is sent
            continue
    return None
