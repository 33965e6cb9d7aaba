"""Images from one place to another: registries, archives and the store, in skopeo's words.

    docker://HOST/NAME[:TAG|@DIGEST]      a registry
    docker-archive:[NAME[:TAG]]           an archive on its way in or out (`oci-archive:` is the same: what is written is
                                          both, and what is read is told by what is in it); NAME chooses among several
    NAME[:TAG]                            the store; `docker-daemon:` before it is allowed

Nothing is unpacked, and between registries nothing is written to the disk: a blob goes through memory in pieces and is
hashed on its way, one that the target has is left out, one of the same registry is mounted. Layers of an archive wait in
the ingest directory, for its list of contents may be its last member. Of an index the manifest for linux/amd64 is copied, or
between registries the whole of it when that is asked for; what refers to what is copied goes with it there.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Protocol

from ambi.core.errors import Corrupt, InvalidRequest, NotFound
from ambi.core.events import Progress, ProgressSink, ignore
from images import archive, manifest, pull, push, reference, referrers, save
from images.content import Ingest, digest_of, parse_json
from images.database import LayerRow
from images.layers.decoder import compression_of
from images.members import Members, split
from images.reference import Reference
from images.registry import settings as registries
from images.registry.client import Descriptor, Document, Repository, descriptor
from images.registry.settings import Credentials
from images.registry.stream import BlobStream

if TYPE_CHECKING:
    from images.model import Image
    from images.store import Store

AT_ONCE = 3
_MOST, _DEEPEST = 200, 3  # manifests of one index, and indexes in indexes
_ARCHIVES = ("docker-archive", "oci-archive")
_KNOWN = "docker://HOST/NAME, docker-archive:FILE, oci-archive:FILE, or the name of an image here"


class Place(NamedTuple):
    """kind: `registry`, `archive` or `store`. name: None for an archive that is to be taken as it is."""

    kind: str
    name: Reference | None


class Copied(NamedTuple):
    """digest: of the manifest at the target. image: when the target is the store."""

    digest: str
    image: Image | None = None


class Reader(Protocol):
    """The bytes of a blob, from the start again after `seek(0)`."""

    def read(self, size: int = -1, /) -> bytes: ...
    def seek(self, offset: int, whence: int = 0, /) -> int: ...
    def close(self) -> None: ...


class Source(Protocol):
    """One image. document: its manifest. name: what its place calls it. place: for messages. sources: where else it is."""

    place: str
    name: Reference | None
    sources: list[Reference]

    @property
    def document(self) -> Document: ...
    def open(self, blob: Descriptor, told: Callable[[int], None]) -> Reader: ...


def place(text: str) -> Place:
    """What SOURCE or TARGET means, the file of an archive left out: `docker-archive:NAME`. Raises InvalidRequest."""
    transport, colon, rest = text.partition(":")
    if transport == "docker" and rest.startswith("//"):
        return Place("registry", reference.parse(rest[2:]))
    if colon and transport in _ARCHIVES:
        return Place("archive", reference.parse(rest) if rest else None)
    if transport == "docker-daemon":
        return Place("store", reference.parse(rest))
    if "://" in text or (colon and transport in ("dir", "oci", "containers-storage", "ostree", "sif", "tarball")):
        raise InvalidRequest(f"cannot copy '{text}': the transport {transport} is not known", hint=_KNOWN)
    return Place("store", reference.parse(text) if not text.startswith("sha256:") else None)


def copy(
    store: Store,
    source: str,
    target: str,
    *,
    credentials: Mapping[str, Credentials],
    upload: BinaryIO | None = None,
    download: BinaryIO | None = None,
    whole_index: bool = False,
    progress: ProgressSink = ignore,
) -> Copied:
    """Copy one image. credentials: by the domain of a registry. upload, download: the archives that are read and written.
    whole_index: an index with every manifest that it lists, between registries.

    Raises NotFound, Corrupt, Unavailable, Forbidden, Unsupported, InvalidRequest; each names the place.
    """
    wanted, goal = place(source), place(target)
    if goal.name is not None and goal.name.digest and goal.kind != "registry":
        raise InvalidRequest(f"cannot copy to {target}: a digest cannot be chosen", hint="give a name and a tag")
    if whole_index and (wanted.kind, goal.kind) != ("registry", "registry"):
        raise InvalidRequest(
            f"cannot copy every platform of {source.rstrip(':')} to {target.rstrip(':')}: archives and the store hold images"
            " for this host",
            hint="leave --all away, or copy between registries: docker://HOST/NAME",
        )
    if goal.kind == "store" and wanted.kind != "archive":
        return _into_store(store, wanted, source, goal, credentials, progress)
    with _opened(store, wanted, source, credentials, upload, progress) as found:
        if goal.kind == "registry":
            assert goal.name is not None
            with _repository(goal.name, credentials, "pull,push") as repository:
                sending = _Sending(found, repository, progress)
                return sending.index() if whole_index else sending.image()
        if goal.kind == "archive":
            if download is None:
                raise InvalidRequest(f"cannot copy to {target}: there is nothing to write to", hint=f"{target}FILE")
            return _to_archive(found, goal.name or found.name, download)
        assert isinstance(found, _FromArchive) and goal.name is not None
        image = archive.store_plan(store, found.plan._replace(names=(goal.name,)), progress)
        return Copied(image.manifest, image)


def _into_store(
    store: Store, wanted: Place, text: str, goal: Place, credentials: Mapping[str, Credentials], progress: ProgressSink
) -> Copied:
    """A pull under another name, or one more name."""
    if goal.name is None:
        raise InvalidRequest("an image id cannot be chosen", hint="give a name and a tag")
    if wanted.kind == "store":
        image = store.resolve(text.removeprefix("docker-daemon:"))
        store.tag(image, goal.name.canonical)
        return Copied(image.manifest, store.resolve(image.id))
    assert wanted.name is not None
    own = credentials.get(wanted.name.domain, Credentials())
    pulled = pull.pull(store, wanted.name, own, progress, called=goal.name)
    return Copied(pulled.image.manifest, store.resolve(pulled.image.id))


@contextmanager
def _repository(name: Reference, credentials: Mapping[str, Credentials], action: str) -> Iterator[Repository]:
    repository = Repository(name, registries.load(), credentials.get(name.domain, Credentials()), action=action)
    try:
        yield repository
    finally:
        repository.close()


# Sources


@contextmanager
def _opened(
    store: Store,
    wanted: Place,
    text: str,
    credentials: Mapping[str, Credentials],
    upload: BinaryIO | None,
    progress: ProgressSink,
) -> Iterator[Source]:
    if wanted.kind == "registry":
        assert wanted.name is not None
        with _repository(wanted.name, credentials, "pull") as repository:
            yield _FromRegistry(repository)
    elif wanted.kind == "store":
        image = store.resolve(text.removeprefix("docker-daemon:"))
        with store.hold(image.layers):
            yield _FromStore(store, image, wanted.name)
    else:
        if upload is None:
            raise InvalidRequest(f"cannot copy from {text}: there is no archive", hint=f"{text}FILE")
        with Members() as members:
            split(store.content, upload, members, progress)
            yield _FromArchive(archive.plans(members), wanted.name)


class _FromRegistry:
    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        self.name: Reference | None = repository.reference
        self.sources = [repository.reference]
        self.place = repository.name
        self.top = repository.manifest(repository.reference.digest or repository.reference.tag)

    @cached_property
    def document(self) -> Document:
        return pull.choose(self.repository, self.top)

    def open(self, blob: Descriptor, told: Callable[[int], None]) -> Reader:
        return _Streamed(self.repository, blob, told)


class _Streamed:
    """A blob from its registry; its last bytes are given out only when the digest is right."""

    def __init__(self, repository: Repository, blob: Descriptor, told: Callable[[int], None]) -> None:
        self._repository, self._blob, self._told = repository, blob, told
        self.seek(0)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        if offset or whence:
            raise OSError("a blob that comes from a registry is read from its start")
        self._stream = BlobStream(self._repository, self._blob, 0, self._told)
        self._hash, self._read = hashlib.sha256(), 0
        return 0

    def tell(self) -> int:
        return self._read

    def close(self) -> None:
        self._stream.close()

    def read(self, size: int = -1, /) -> bytes:
        data = self._stream.read(size if size > 0 else 1 << 20)
        self._hash.update(data)
        self._read += len(data)
        found = "sha256:" + self._hash.hexdigest() if self._read == self._blob.size else self._blob.digest
        if found != self._blob.digest:
            raise Corrupt(
                f"blob {self._blob.digest} of {self._repository.name} is damaged: the registry sent {self._read} bytes with"
                f" digest {found}",
                hint="try again; if it stays so, the registry's copy is damaged",
            )
        return data


class _FromStore:
    def __init__(self, store: Store, image: Image, name: Reference | None) -> None:
        self._store = store
        names = [reference.parse(text) for text in image.names]
        self.name = name if name in names else None
        self.sources = [*names, *map(reference.parse, image.digests)]
        self.place = "the image store"
        data = self._blob(image.manifest)
        body = parse_json(data, f"manifest {image.manifest}")
        self.document = Document(data, image.manifest, str(body.get("mediaType") or manifest.MANIFEST), body)

    def _blob(self, digest: str) -> bytes:
        with os.fdopen(self._store.content.open(digest), "rb") as file:
            return file.read()

    def open(self, blob: Descriptor, told: Callable[[int], None]) -> Reader:
        return _Counted(self._store.content.open(blob.digest), told)


class _FromArchive:
    """One image of an archive, with the manifest that it has or one made for it."""

    place = "the archive"

    def __init__(self, plans: list[archive.Plan], wanted: Reference | None) -> None:
        fitting = [plan for plan in plans if wanted is None or wanted in plan.names]
        if len(fitting) != 1:
            named = ", ".join(sorted({name.familiar for plan in plans for name in plan.names})[:8]) or "none with a name"
            if wanted is not None:
                raise NotFound(f"the archive has no image {wanted.familiar}", hint=f"it has: {named}")
            raise InvalidRequest(
                f"the archive has {len(fitting)} images, one can be copied",
                hint=f"docker-archive:FILE:NAME; it has: {named}",
            )
        self.plan = fitting[0]
        self.sources: list[Reference] = []
        self.name = wanted or next(iter(self.plan.names), None)
        self._blobs: dict[str, Ingest] = {blob.digest: blob for blob in self.plan.layers}
        self._config = digest_of(self.plan.config)
        rows = [_row(blob, diff_id) for blob, diff_id in zip(self.plan.layers, self.plan.diff_ids, strict=True)]
        data = self.plan.manifest or manifest.manifest_of(self._config, len(self.plan.config), rows)
        body = parse_json(data, "manifest of the archive")
        self.document = Document(data, digest_of(data), str(body.get("mediaType") or manifest.MANIFEST), body)

    def open(self, blob: Descriptor, told: Callable[[int], None]) -> Reader:
        if blob.digest == self._config:
            return io.BytesIO(self.plan.config)
        return _Counted(os.open(self._blobs[blob.digest].path, os.O_RDONLY | os.O_CLOEXEC), told)


def _row(blob: Ingest, diff_id: str) -> LayerRow:
    media_type = manifest.layer_media_type(compression_of(os.pread(blob.fd, 6, 0)))
    return LayerRow(diff_id, 0, 0, blob.digest, media_type, blob.size)


class _Counted(io.FileIO):
    """A file that tells how far it has been read."""

    def __init__(self, fd: int, told: Callable[[int], None]) -> None:
        super().__init__(fd, "rb")
        self._told = told

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(-1 if size is None else size) or b""
        self._told(self.tell())
        return data


# Targets


def _blobs(document: Document, place: str) -> tuple[Descriptor, list[Descriptor]]:
    """The config and the distinct layers."""
    what = f"manifest {document.digest} of {place}"
    layers = document.body.get("layers")
    if not isinstance(layers, list):
        raise Corrupt(f"{what} is damaged: it has no list of layers")
    config = descriptor(document.body.get("config"), what)
    return config, list(dict.fromkeys(descriptor(entry, what) for entry in layers))


class _Sending:
    """One image, or an index, on its way to a registry."""

    def __init__(self, source: Source, target: Repository, progress: ProgressSink) -> None:
        self._source, self._target, self._progress = source, target, progress
        self._telling, self._stop = threading.Lock(), threading.Event()
        goal = target.reference
        paths = [x.path for x in source.sources if x.domain == goal.domain and x.path != goal.path]
        self._froms = list(dict.fromkeys(paths))

    def image(self) -> Copied:
        return self._named(self._source.document, self._manifest)

    def index(self) -> Copied:
        """An index with all that it lists; a manifest as it is."""
        assert isinstance(self._source, _FromRegistry)
        return self._named(self._source.top, self._tree)

    def _named(self, document: Document, send: Callable[[Document, str], None]) -> Copied:
        goal = self._target.reference
        if goal.digest and goal.digest != document.digest:
            raise InvalidRequest(
                f"cannot copy to {goal.familiar}: the manifest of {self._source.place} has the digest {document.digest}",
                hint="give a tag",
            )
        send(document, goal.tag or goal.digest)
        return Copied(document.digest)

    def _tree(self, document: Document, name: str, depth: int = 0) -> None:
        """What an index lists goes first, and under its digest: a registry takes none whose manifests it has not."""
        assert isinstance(self._source, _FromRegistry)
        entries = document.body.get("manifests")
        if entries is None:
            self._manifest(document, name)
            return
        what = f"index {document.digest} of {self._source.place}"
        if not isinstance(entries, list) or depth > _DEEPEST or len(entries) > _MOST:
            raise Corrupt(f"{what} is damaged: its list of manifests is none, too long, or nested too deeply")
        for entry in entries:
            below = self._source.repository.manifest(descriptor(entry, what).digest)
            self._tree(below, below.digest, depth + 1)
        self._put(document, name)

    def _manifest(self, document: Document, name: str) -> None:
        config, layers = _blobs(document, self._source.place)
        with ThreadPoolExecutor(AT_ONCE, "copy") as pool:
            sent = [pool.submit(self._unless_stopped, blob) for blob in layers if not blob.urls]  # else at its address
        for result in sent:
            result.result()
        self._blob(config)
        self._put(document, name)

    def _put(self, document: Document, name: str) -> None:
        self._target.put_manifest(name, document.data, document.media_type)
        if isinstance(self._source, _FromRegistry):
            referrers.copy(self._source.repository, self._target, document.digest, self._blob)

    def _tell(self, unit: str, status: str, done: int = 0, total: int = 0) -> None:
        with self._telling:
            self._progress(Progress(unit, status, done, total))

    def _unless_stopped(self, blob: Descriptor) -> None:
        if self._stop.is_set():
            return
        try:
            self._blob(blob)
        except BaseException:
            self._stop.set()
            raise

    def _blob(self, blob: Descriptor) -> None:
        short = blob.digest[7:19]
        if told := push.spared(self._target, blob.digest, self._froms):
            self._tell(short, told)
            return
        reader = self._source.open(blob, lambda done: self._tell(short, "Copying", done, blob.size))
        try:
            self._target.upload(blob.digest, blob.size, reader)
        finally:
            reader.close()
        self._tell(short, "Copied")


def _to_archive(source: Source, name: Reference | None, target: BinaryIO) -> Copied:
    """An archive as `save` writes it, blob by blob as they come. One that ends in an error is cut short."""
    config, layers = _blobs(source.document, source.place)
    tags = [name] if name is not None and name.tag else []
    with tarfile.open(fileobj=target, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        save.directories(tar)
        save.text(tar, save.path(source.document.digest), source.document.data)
        for blob in (config, *layers):
            reader = source.open(blob, lambda _: None)
            try:
                tar.addfile(save.member(save.path(blob.digest), blob.size), _as_file(reader))
            finally:
                reader.close()
        entry = {
            "mediaType": source.document.media_type,
            "digest": source.document.digest,
            "size": len(source.document.data),
        }
        listed: list[dict[str, Any]] = source.document.body["layers"]
        docker = save.docker_entry(config.digest, tags, [str(layer["digest"]) for layer in listed])
        save.contents(tar, save.oci_entries(entry, tags), [docker])
    return Copied(source.document.digest)


def _as_file(reader: Reader) -> Any:
    """tarfile wants no more of a file than `read`, and takes less than it asked for as the end."""
    return io.BufferedReader(_Raw(reader), 1 << 20)


class _Raw(io.RawIOBase):
    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        data = self._reader.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
