"""From a registry into the store: the manifest for this host, its config, and its layers, several at once.

A layer is downloaded, hashed, unpacked and converted in one go. A blob is got once however many pulls want it, and a
download that was cut goes on where it ended (`content.Partial`). Digest, size and diff ID of everything are checked, and
nothing of an image can be seen before all of it is there.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from ambi.core.errors import AmbiError, Corrupt, NotFound, Unavailable, Unsupported
from ambi.core.events import Progress, ProgressSink
from images import archive, manifest
from images.content import Partial, parse_json
from images.database import LayerRow
from images.importer import NewLayer, receive_layer
from images.model import Image
from images.reference import Reference
from images.registry import settings as registries
from images.registry.client import Descriptor, Document, Repository, descriptor
from images.registry.settings import Credentials, Settings
from images.registry.stream import BlobStream

if TYPE_CHECKING:
    from images.store import Store

AT_ONCE = 3  # layers of one pull
_MAX_LAYERS = 500
_ATTESTATION = "vnd.docker.reference.type"
_READ = 256 << 10


class Pulled(NamedTuple):
    """digest: of what was asked for, an index or a manifest. new: the store did not have it under this name."""

    image: Image
    digest: str
    new: bool


class _Turns:
    """One turn at a time for each key."""

    def __init__(self) -> None:
        self._busy: set[str] = set()
        self._changed = threading.Condition()

    @contextmanager
    def turn(self, key: str) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: key not in self._busy)
            self._busy.add(key)
        try:
            yield
        finally:
            with self._changed:
                self._busy.discard(key)
                self._changed.notify_all()


_TURNS = _Turns()  # a process has one store


def pull(
    store: Store, wanted: Reference, credentials: Credentials, progress: ProgressSink, *, called: Reference | None = None
) -> Pulled:
    """Pull one image and give it its names: `wanted` or `called`, and the digest of what it is in the registry.

    Raises NotFound in Docker's words, Unavailable, Corrupt, Unsupported, StorageFull, Forbidden.
    """
    known = registries.load()
    failed: AmbiError | None = None
    for base in (*known.mirrors.get(wanted.domain, ()), ""):
        repository = Repository(wanted, known, credentials, base=base)
        try:
            return _Pull(store, repository, progress, called).run()
        except (NotFound, Unavailable) as error:
            failed = error
        finally:
            repository.close()
    assert failed is not None
    raise failed


def tags(wanted: Reference, credentials: Credentials) -> list[str]:
    """Every tag of the repository, for `pull --all-tags`."""
    repository = Repository(wanted, registries.load(), credentials)
    try:
        return repository.tags()
    finally:
        repository.close()


def describe(wanted: Reference, credentials: Credentials) -> Document:
    """The manifest or index that the registry has under this name."""
    repository = Repository(wanted, registries.load(), credentials)
    try:
        return repository.manifest(wanted.digest or wanted.tag)
    finally:
        repository.close()


def log_in(domain: str, credentials: Credentials, settings: Settings | None = None) -> None:
    """Raises Forbidden when the registry refuses the credentials."""
    repository = Repository(Reference(domain, "", ""), settings or registries.load(), credentials)
    try:
        repository.check()
    finally:
        repository.close()


def choose(repository: Repository, found: Document, depth: int = 0) -> Document:
    """The manifest for linux/amd64 that `found` is or leads to."""
    entries = found.body.get("manifests")
    if entries is None:
        return found
    name = f"index {found.digest} of {repository.name}"
    if depth > 2 or not isinstance(entries, list):
        raise Corrupt(f"{name} is damaged: its list of manifests is none, or is nested too deeply")
    offered: list[str] = []
    for entry in entries:
        platform = entry.get("platform") if isinstance(entry, dict) else None
        if not isinstance(platform, dict) or _ATTESTATION in (entry.get("annotations") or {}):
            continue
        system, machine = platform.get("os"), platform.get("architecture")
        if (system, machine) == ("linux", "amd64"):
            below = descriptor(entry, name)
            return choose(repository, repository.manifest(below.digest), depth + 1)
        offered.append(f"{system}/{machine}"[:40])
    shown = ", ".join(sorted(set(offered))[:8]) or "none"
    raise NotFound(
        f"no matching manifest for linux/amd64 in the manifest list entries of {repository.reference.familiar}",
        hint=f"it is there for: {shown}",
    )


class _Pull:
    """One image from one repository."""

    def __init__(
        self, store: Store, repository: Repository, progress: ProgressSink, called: Reference | None = None
    ) -> None:
        self._store, self._repository, self._called = store, repository, called
        self._wanted = repository.reference
        self._telling = threading.Lock()
        self._progress = progress
        self._stop = threading.Event()

    def _tell(self, unit: str, status: str, done: int = 0, total: int = 0) -> None:
        """From any thread. A sink that raises (its client went away) ends the pull."""
        if self._stop.is_set():
            raise Unavailable("the pull was given up")
        with self._telling:
            self._progress(Progress(unit, status, done, total))

    def run(self) -> Pulled:
        wanted = self._wanted
        top = self._repository.manifest(wanted.digest or wanted.tag)
        self._tell(wanted.digest or wanted.tag, f"Pulling from {wanted.path}")
        with _TURNS.turn(f"{wanted.domain}/{wanted.path}@{top.digest}"):
            found = choose(self._repository, top)
            config_descriptor = descriptor(found.body.get("config"), f"manifest {found.digest} of {self._repository.name}")
            before = self._already(config_descriptor.digest)
            if before is not None and before.manifest == found.digest:
                return self._named(before, top.digest)
            return Pulled(self._get(found, config_descriptor, top.digest), top.digest, True)

    def _already(self, image_id: str) -> Image | None:
        try:
            image = self._store.resolve(image_id)
            return image if image.id == image_id else None
        except NotFound:
            return None

    def _named(self, image: Image, digest: str) -> Pulled:
        """The store has it: only names can be new."""
        name = self._called or self._wanted
        new = name.tag != "" and name.familiar not in image.names
        self._store.set_names(image, self._names(digest))
        return Pulled(self._store.resolve(image.id), digest, new)

    def _names(self, digest: str) -> list[Reference]:
        plain = self._wanted._replace(tag="", digest="")
        if self._called is not None:
            return [self._called, plain._replace(digest=digest)]
        tagged = [plain._replace(tag=self._wanted.tag)] if self._wanted.tag and not self._wanted.digest else []
        return [*tagged, plain._replace(digest=digest)]

    # Documents

    def _layers_of(self, found: Document, config: bytes) -> list[tuple[Descriptor, str]]:
        """Each layer's descriptor with its diff ID, the lowest first."""
        name = f"manifest {found.digest} of {self._repository.name}"
        body = parse_json(config, f"config of {self._wanted.familiar}")
        manifest.check_config(body, f"config of {self._wanted.familiar}")
        system, machine = body.get("os") or "linux", body.get("architecture") or "amd64"
        if (system, machine) != ("linux", "amd64"):
            raise Unsupported(
                f"{self._wanted.familiar} is for {system}/{machine}, this host is linux/amd64", hint="choose another tag"
            )
        listed = found.body.get("layers")
        if not isinstance(listed, list) or not listed:
            raise Unsupported(f"{self._wanted.familiar} has no layers: it is an artifact, not an image that can be run")
        if len(listed) > _MAX_LAYERS:
            raise Unsupported(f"{self._wanted.familiar} has {len(listed)} layers, more than {_MAX_LAYERS}")
        layers = [descriptor(entry, name) for entry in listed]
        for layer in layers:
            if not layer.media_type.startswith(archive.LAYER_TYPES):
                raise Unsupported(
                    f"{self._wanted.familiar} has a layer of type {layer.media_type[:100]!r}, not a file system"
                )
        rootfs = body.get("rootfs")
        diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
        if not isinstance(diff_ids, list) or len(diff_ids) != len(layers) or not all(isinstance(x, str) for x in diff_ids):
            raise Corrupt(f"config of {self._wanted.familiar} does not list its {len(layers)} layers")
        return list(zip(layers, diff_ids, strict=True))

    # Layers

    def _get(self, found: Document, config_descriptor: Descriptor, top_digest: str) -> Image:
        config = self._repository.document(config_descriptor, "config")
        jobs = self._layers_of(found, config)
        with self._store.hold([diff_id for _, diff_id in jobs]), self._received(jobs) as layers:
            image = self._store.commit(config, found.data, layers, self._names(top_digest))
        self._store.forget_partial({layer.digest: diff_id for layer, diff_id in jobs})
        return image

    @contextmanager
    def _received(self, jobs: Sequence[tuple[Descriptor, str]]) -> Iterator[Sequence[NewLayer]]:
        """The layers, AT_ONCE at a time; the first failure stops all, and what is not published goes afterwards."""
        distinct = list(dict.fromkeys(jobs))
        for layer, _ in distinct:
            self._tell(layer.digest[7:19], "Pulling fs layer")
        done: dict[tuple[Descriptor, str], NewLayer] = {}
        begun: list[Future[None]] = []
        sizes = {job: 0 if self._here(*job) else job[0].size for job in distinct}
        distinct.sort(key=lambda job: -sizes[job])  # the largest first: it takes longest

        def run(job: tuple[Descriptor, str]) -> None:
            try:
                new = done[job] = self._receive(*job, alone=2 * sizes[job] > sum(sizes.values()))
                begun.append(disk.submit(new.write_back))  # the next layer need not wait for the disk
            except BaseException:
                self._stop.set()
                raise

        try:
            with ThreadPoolExecutor(1, "disk") as disk, ThreadPoolExecutor(AT_ONCE, "pull") as pool:
                results = [pool.submit(run, job) for job in distinct]
            _raise_first([*results, *begun])
            yield [done[job] for job in jobs]
        finally:
            for new in done.values():
                new.discard()

    def _here(self, layer: Descriptor, diff_id: str) -> tuple[int, int] | None:
        """The layer's tar_bytes and content_bytes, when the store has it and its blob."""
        return self._store.known_layer(diff_id) if self._store.content.path(layer.digest).exists() else None

    def _receive(self, layer: Descriptor, diff_id: str, *, alone: bool) -> NewLayer:
        """alone: the others are small, or here."""
        short = layer.digest[7:19]
        with _TURNS.turn(layer.digest):
            known = self._here(layer, diff_id)
            if known is not None:
                self._tell(short, "Already exists")
                return NewLayer(LayerRow(diff_id, *known, layer.digest, layer.media_type, layer.size), None, None)
            new = self._download(layer, short, alone=alone)
        try:
            if new.row.diff_id != diff_id:
                self._store.content.partial(layer.digest).spoil()
                archive.check_diff_id(new.row.diff_id, diff_id, layer.digest)
            self._tell(short, "Pull complete")
            return new
        except BaseException:
            new.discard()
            raise

    def _download(self, layer: Descriptor, short: str, *, alone: bool) -> NewLayer:
        try:
            with self._opened(layer, short) as (blob, source):
                resumed = blob.have > 0
                return self._convert(layer, short, blob, source, alone=alone)
        except Corrupt:
            if not resumed:
                raise
        with self._opened(layer, short, afresh=True) as (blob, source):  # what was left of an earlier attempt was bad
            return self._convert(layer, short, blob, source, alone=alone)

    def _convert(self, layer: Descriptor, short: str, blob: Partial, source: _Checked, *, alone: bool) -> NewLayer:
        try:
            return receive_layer(
                source,
                self._store.layer_form()[0],
                content=self._store.content,
                snapshots=self._store.snapshots,
                progress=_silent,
                blob=blob,
                alone=alone,
            )
        except Corrupt as error:
            if not blob.path.exists():  # its digest is wrong, and the error says so
                raise
            with self._opened(layer, short) as (again, whole):  # it cannot be read: are these the bytes that were promised?
                while data := whole.read(_READ):
                    again.write(data)
                again.spoil()
            raise Corrupt(f"layer {short} of {self._repository.name}: {error.message}", hint=error.hint) from error

    @contextmanager
    def _opened(self, layer: Descriptor, short: str, *, afresh: bool = False) -> Iterator[tuple[Partial, _Checked]]:
        """What is there of a blob, and the whole of its bytes. afresh: forget what is there."""
        blob = self._store.content.partial(layer.digest)
        if afresh or blob.have > layer.size:
            blob.spoil()
            blob = self._store.content.partial(layer.digest)
        stream = BlobStream(
            self._repository, layer, blob.have, lambda done: self._tell(short, "Downloading", done, layer.size)
        )
        try:
            yield blob, _Checked(blob, stream, layer, lambda: self._tell(short, "Download complete"))
        finally:
            stream.close()
            if blob.fd >= 0 and blob.size < layer.size:
                blob.discard()


class _Checked:
    """The bytes of a blob: what an earlier attempt has left of it, then the rest from the registry; checked at its end."""

    def __init__(self, blob: Partial, stream: BlobStream, layer: Descriptor, complete: Callable[[], None]) -> None:
        self._blob, self._stream, self._layer, self._complete = blob, stream, layer, complete

    def read(self, size: int, /) -> bytes:
        if self._blob.size < self._blob.have:
            return os.pread(self._blob.fd, min(size, self._blob.have - self._blob.size), self._blob.size)
        data = self._stream.read(size)
        if not data:
            self._check()
            self._complete()
        return data

    def _check(self) -> None:
        blob, layer = self._blob, self._layer
        if blob.digest != layer.digest:
            found = blob.digest
            blob.spoil()
            raise Corrupt(
                f"layer {layer.digest[7:19]} is damaged: the registry sent {blob.size} bytes with digest {found}, its"
                f" manifest says {layer.digest}",
                hint="pull again; if it stays so, the registry's copy is damaged",
            )


def _raise_first(results: Sequence[Any]) -> None:
    """The error that came first, not those of the layers that were given up for it."""
    errors = [error for error in (result.exception() for result in results) if error is not None]
    if errors:
        raise next((error for error in errors if "given up" not in str(error)), errors[0])


def _silent(_: Progress) -> None:
    """The stream tells of its own."""
