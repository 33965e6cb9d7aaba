"""The image store: everything that the engine may do with images.

Blobs (`content`), metadata (`database`) and mountable layers (`snapshots`) lie below one directory, which one process holds
by a lock. Work on archives happens without the mutex, in files of the ingest directory that nobody sees; a commit takes the
mutex, moves them to their places and ends one database transaction. Whatever a crash leaves behind is listed nowhere and is
swept when the store is opened.

    images/  oci-layout, index.json, blobs/sha256/HEX     an OCI image layout
             images.db                                    names, images, layers
             layers/NAME.erofs or layers/NAME/            what is mounted
             ingest/                                      unfinished work
             store.lock
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ambi.core.errors import Conflict, InvalidRequest, NotFound
from ambi.core.events import ProgressSink, ignore
from ambi.core.plan import Layer
from images import archive, bootstrap, manifest, reference, removal
from images.changes import apply_changes
from images.content import ContentStore, Ingest
from images.database import Database, ImageRow, LayerRow
from images.importer import NewLayer, about, receive_layer
from images.layers.nursery import NURSERY
from images.layers.supervisor import Worker
from images.model import HistoryStep, Image, Removed, Usage
from images.probe import layer_form
from images.snapshots import FormName, Prepared, Snapshots, discard
from images.times import parse_ns

if TYPE_CHECKING:
    from images.pull import Pulled
    from images.push import Pushed
    from images.registry.settings import Credentials
    from images.verify import Finding

__all__ = ["HistoryStep", "Image", "Removed", "Store"]

_HEX = frozenset("0123456789abcdef")
InUse = Callable[[str], list[str]]
Images = list[Image]  # `list` is a method below
Removals = list[Removed]


class Store:
    """See the module. Safe to use from any thread."""

    def __init__(self, root: Path, lock: int) -> None:
        self.root = root
        self._lock = lock
        self._mutex = threading.RLock()
        self.content = ContentStore(root)
        self._database = Database(root / "images.db")
        self.snapshots = Snapshots(self.content, self._database)
        self._held: dict[str, int] = {}  # diff IDs that somebody is about to use, and by how many
        self._form: tuple[FormName, str] | None = None
        self._configs: dict[str, Image] = {}
        self.collect()
        NURSERY.keep()

    @classmethod
    def open(cls, root: Path) -> Store:
        """Create or check the store at `root`.

        Raises Conflict when another process has it, Unsupported for a newer format, Corrupt for a damaged database.
        """
        root.mkdir(mode=0o711, parents=True, exist_ok=True)
        lock = os.open(root / "store.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return cls(root, lock)
        except BlockingIOError:
            os.close(lock)
            raise Conflict(
                f"image store {root} is in use by another engine",
                hint="stop it with `ambi engine stop`, or use another --data-root",
            ) from None
        except BaseException:
            os.close(lock)
            raise

    def close(self) -> None:
        NURSERY.release()
        with self._mutex:
            self._database.close()
            os.close(self._lock)

    # What is there

    def layer_form(self) -> tuple[FormName, str]:
        """The form of layers for containers on this host, and why; probed once a boot."""
        if self._form is None:
            self._form = layer_form(self.root)
        return self._form

    def list(self) -> list[Image]:
        """All images, the newest first."""
        with self._mutex:
            return [self._image(row) for row in self._database.images()]

    def resolve(self, name: str) -> Image:
        """The image of a name, an id, a unique start of an id, or a digest; NotFound, or InvalidRequest when ambiguous."""
        with self._mutex:
            image_id = self._find(name)
            row = self._database.image(image_id) if image_id else None
            if row is None:
                raise NotFound(f"No such image: {_shown(name)}", hint="`ambi image ls` lists what is there")
            return self._image(row)

    def _find(self, name: str) -> str | None:
        digits = name.removeprefix("sha256:")
        is_id = bool(digits) and len(digits) <= 64 and _HEX.issuperset(digits)
        if not is_id or (len(digits) < 64 and not name.startswith("sha256:")):
            found = self._find_name(name)
            if found or not is_id:
                return found
        ids = self._database.image_ids(f"sha256:{digits}")
        if len(ids) > 1:
            raise InvalidRequest(f"image id {name} is ambiguous", hint="give more of its digits")
        return ids[0] if ids else None

    def _find_name(self, name: str) -> str | None:
        wanted = reference.parse(name)
        if wanted.digest:
            plain = wanted._replace(tag="")
            found = self._database.image_of(plain.canonical)
            if found is None and (ids := self._database.image_ids(wanted.digest)):
                repository = wanted._replace(tag="", digest="").canonical
                named = any(x.rpartition(":")[0] == repository for x in self._database.names(ids[0]))
                found = ids[0] if named else None
            return found
        return self._database.image_of(wanted.canonical)

    def _image(self, row: ImageRow) -> Image:
        image = self._configs.get(row.id)
        if image is None:
            layers = self._database.layers(row.id)
            config = self.content.read_json(row.id)
            size = sum(layer.content_bytes for layer in layers)
            image = Image(row.id, (), (), config, size, row.created_ns, tuple(x.diff_id for x in layers), row.manifest)
            self._configs[row.id] = image
        names = [reference.parse(name) for name in self._database.names(row.id)]
        return image._replace(
            names=tuple(x.familiar for x in names if not x.digest), digests=tuple(x.familiar for x in names if x.digest)
        )

    def history(self, image: Image) -> Sequence[HistoryStep]:
        """The steps that made it, the newest first."""
        with self._mutex:
            sizes = iter([layer.content_bytes for layer in self._database.layers(image.id)])
        steps = []
        for step in image.config.get("history") or ():
            size = 0 if step.get("empty_layer") else next(sizes, 0)
            created_by, comment = str(step.get("created_by") or ""), str(step.get("comment") or "")
            steps.append(HistoryStep("", parse_ns(step.get("created")), created_by, size, comment, ()))
        left = sum(sizes)
        if left or not steps:  # layers that the history does not tell of
            steps.append(HistoryStep("", image.created_ns, "", left, "", ()))
        steps[-1] = steps[-1]._replace(id=image.id, names=image.names)
        return steps[::-1]

    def layers(self, image: Image, form: FormName | None = None) -> tuple[Layer, ...]:
        """The layers of `image`, the lowest first, in `form` or else in that of containers here; made when missing."""
        wanted = form or self.layer_form()[0]
        with self._mutex:
            rows = self._database.layers(image.id)
            missing = [row for row in dict.fromkeys(rows) if self.snapshots.find(row.diff_id, wanted) is None]
        if missing:
            self._make(missing, wanted)
        with self._mutex:
            found = [self.snapshots.find(row.diff_id, wanted) for row in rows]
        if None in found or not rows:
            raise NotFound(f"No such image: {image.id}", hint="it was removed meanwhile")
        return tuple(layer for layer in found if layer is not None)

    def _make(self, rows: Sequence[LayerRow], form: FormName) -> None:
        """Make a form of layers from their blobs."""
        with Worker() as worker:
            for row in rows:
                source = self.content.open(row.blob)
                try:
                    prepared = self.snapshots.prepare(form, worker, source)
                finally:
                    os.close(source)
                with self._discarding(prepared):
                    archive.check_diff_id(prepared.converted.diff_id, row.diff_id, row.blob)
                    with self._mutex, self._database.transaction():
                        if self._database.layer(row.diff_id) is not None:
                            self.snapshots.publish(prepared)

    @contextmanager
    def _discarding(self, prepared: Prepared) -> Iterator[None]:
        """Afterwards nothing is left of `prepared` in the ingest directory."""
        try:
            yield
        finally:
            discard(prepared.path)

    # What comes in

    def import_tar(
        self,
        source: BinaryIO,
        name: str,
        *,
        changes: Sequence[str] = (),
        message: str = "",
        progress: ProgressSink = ignore,
        created_ns: int | None = None,
    ) -> Image:
        """An image of one layer from the archive of a root file system, compressed or not. `name` may be empty."""
        wanted = reference.parse(name) if name else None
        if wanted is not None and wanted.digest:
            raise InvalidRequest(
                f"cannot import to {name}: a digest cannot be chosen", hint="give a name and a tag, as in team/app:1.0"
            )
        config: dict[str, object] = {}
        apply_changes(config, changes)
        form = self.layer_form()[0]
        created = time.time_ns() if created_ns is None else created_ns
        with about(f"cannot import {wanted.familiar if wanted else 'the archive'}"):
            layer = receive_layer(source, form, content=self.content, snapshots=self.snapshots, progress=progress)
        try:
            text = message or "Imported from -"
            body = manifest.imported_config(config, [layer.row.diff_id], created, text)
            return self.commit(body, None, [layer], [wanted] if wanted else [])
        finally:
            layer.discard()

    def load(self, source: BinaryIO, *, progress: ProgressSink = ignore) -> Images:
        """The images of an archive as `docker save` or an OCI tool writes it, compressed or not, with the names it has."""
        with about("cannot load the archive"):
            return archive.load(self, source, progress)

    def pull(self, name: str, credentials: Credentials | None = None, *, progress: ProgressSink = ignore) -> Pulled:
        """An image from its registry; see `images.pull`."""
        NURSERY.warm()  # while what a pull needs is loaded, and the registry is asked
        from images import pull
        from images.registry.settings import Credentials

        return pull.pull(self, reference.parse(name), credentials or Credentials(), progress)

    def push(self, name: str, credentials: Credentials | None = None, *, progress: ProgressSink = ignore) -> Pushed:
        """An image to the registry that its name tells; see `images.push`."""
        from images import push
        from images.registry.settings import Credentials

        return push.push(self, reference.parse(name), credentials or Credentials(), progress)

    def save(self, names: Sequence[str], target: BinaryIO) -> None:
        """Images as one archive that this store, docker and OCI tools load; see `images.save`."""
        from images import save

        save.save(self, names, target)

    def verify(self, *, repair: bool = False, progress: ProgressSink = ignore) -> Sequence[Finding]:
        """What of the store is damaged; see `images.verify`."""
        from images import verify

        return verify.verify(self, repair=repair, progress=progress)

    def image_layers(self, image: Image) -> Sequence[LayerRow]:
        """What is known of its layers, the lowest first."""
        with self._mutex:
            return self._database.layers(image.id)

    def bootstrap(
        self, suite: str, name: str = "", *, packages: Sequence[str] = (), progress: ProgressSink = ignore
    ) -> Image:
        """An image of a Debian release, made here with mmdebstrap from the mirrors that this host's apt uses."""
        return bootstrap.bootstrap(self, suite, name, packages, progress)

    def commit(
        self,
        config: bytes,
        stored_manifest: bytes | None,
        layers: Sequence[NewLayer],
        names: Sequence[reference.Reference],
    ) -> Image:
        """Make an image visible with all that belongs to it, or nothing of it."""
        rows = [layer.row for layer in layers]
        for layer in layers:
            layer.sync()
        with self.content.ingest() as config_blob, self.content.ingest() as manifest_blob:
            config_blob.write(config)
            manifest_blob.write(stored_manifest or manifest.manifest_of(config_blob.digest, len(config), rows))
            config_blob.sync()
            manifest_blob.sync()
            created = parse_ns(_created(config))
            image = ImageRow(config_blob.digest, manifest_blob.digest, manifest_blob.size, created)
            with self._mutex:
                old = self._database.image(image.id)
                with self._database.transaction():
                    if old is None:
                        self._database.add_image(image, rows)
                        self._publish([config_blob, manifest_blob], layers)
                    self._database.keep(image.id)
                    for name in names:
                        self._database.set_name(name.canonical, image.id)
                self.content.sync_directories()
                self._write_index()
                return self.resolve(image.id)

    def _publish(self, documents: Sequence[Ingest], layers: Sequence[NewLayer]) -> None:
        done: set[str] = set()
        for blob in (*documents, *(layer.blob for layer in layers)):
            if blob is not None and blob.digest not in done and blob.path.exists():
                self.content.publish(blob)
                done.add(blob.digest)
        for layer in layers:
            if layer.prepared is not None:
                self.snapshots.publish(layer.prepared)

    def _write_index(self) -> None:
        entries = []
        for row in self._database.images():
            entry = {"mediaType": manifest.MANIFEST, "digest": row.manifest, "size": row.manifest_size}
            names = self._database.names(row.id)
            entries += [{**entry, "annotations": {"org.opencontainers.image.ref.name": name}} for name in names] or [entry]
        self.content.write_index(entries)

    # What changes and goes

    def tag(self, image: Image, name: str) -> None:
        """Give `image` one more name, taken from another image when that has it."""
        wanted = reference.parse(name)
        if wanted.digest:
            raise InvalidRequest(
                f"cannot tag as {name}: a digest cannot be chosen", hint="give a name and a tag, as in team/app:1.0"
            )
        with self._mutex:
            self.resolve(image.id)
            with self._database.transaction():
                self._database.set_name(wanted.canonical, image.id)
            self._write_index()

    def set_names(self, image: Image, names: Sequence[reference.Reference]) -> None:
        """Give `image` names, digests too; for who knows that they are true."""
        with self._mutex:
            self.resolve(image.id)
            with self._database.transaction():
                for name in names:
                    self._database.set_name(name.canonical, image.id)
            self._write_index()

    def remove(self, name: str, *, force: bool = False, prune: bool = True, in_use: InUse) -> Removals:
        """Take a name away, and the image with its last one, as `docker rmi` does. Raises Conflict.

        `prune` is Docker's: there are no untagged parents here that it could keep.
        """
        with self._mutex:
            removed = removal.remove(self._database, self.resolve(name), name, force=force, in_use=in_use)
            self._forget(removed)
        return removed

    def remove_unused(self, *, in_use: InUse) -> Removals:
        """Remove the images whose names were taken away by force while instances used them, once none does."""
        with self._mutex:
            removed = removal.remove_unused(self._database, self.resolve, in_use)
            if removed:
                self._forget(removed)
        return removed

    def prune(self, fits: Callable[[Image], bool], *, everything: bool = False, in_use: InUse) -> tuple[Removals, int]:
        """Remove unused images for which `fits` holds: untagged ones, or with `everything` all; and the bytes freed.

        With `everything` what cut downloads have left goes as well, unless something is coming in.
        """
        with self._mutex:
            removed: Removals = []
            for image in self.list():
                if (everything or not image.names) and fits(image) and not in_use(image.id):
                    removed += removal.remove_image(self._database, image)
            freed = self.content.sweep_partial(time.time() + 1) if everything and not self._held else 0
            return removed, self._forget(removed) + freed

    def _forget(self, removed: Sequence[Removed]) -> int:
        for item in removed:
            self._configs.pop(item.id, None)
        self._write_index()
        return self.collect()

    def usage(self, in_use: InUse) -> Usage:
        """How much the images take, and share."""
        with self._mutex:
            layers = {row.id: set(self._database.layers(row.id)) for row in self._database.images()}
        sizes = {row.diff_id: row.content_bytes for rows in layers.values() for row in rows}
        owners = Counter(diff_id for rows in layers.values() for diff_id in {row.diff_id for row in rows})
        used = {row.diff_id for image_id, rows in layers.items() if in_use(image_id) for row in rows}
        shared = {
            image_id: sum(sizes[x] for x in {row.diff_id for row in rows} if owners[x] > 1)
            for image_id, rows in layers.items()
        }
        total = sum(sizes.values())
        return Usage(total, total - sum(sizes[diff_id] for diff_id in used), shared)

    def collect(self) -> int:
        """Remove blobs and layers that no image needs and nobody holds; the bytes freed."""
        with self._mutex:
            with self._database.transaction():
                self._database.drop_unused_layers(set(self._held))
            return self.snapshots.sweep() + self.content.sweep(self._database.blobs())

    def forget_partial(self, layers: Mapping[str, str]) -> None:
        """Remove what is left of complete downloads of these blobs, digest to diff ID.

        Those of an image that was here by another manifest are in no place of theirs; another pull may need them yet.
        """
        with self._mutex:
            for digest, diff_id in layers.items():
                if self.content.path(digest).exists() or diff_id not in self._held:
                    self.content.forget_partial(digest)

    def known_layer(self, diff_id: str) -> tuple[int, int] | None:
        """Its tar_bytes and content_bytes, when it is there in the form that is used here; for a holder of it."""
        form = self.layer_form()[0]
        with self._mutex:
            known = self.snapshots.find(diff_id, form) is not None
            return self._database.layer(diff_id) if known else None

    @contextmanager
    def hold(self, diff_ids: Sequence[str]) -> Iterator[None]:
        """A lease: layers that are there stay there until the end of the `with`, whatever is removed meanwhile."""
        with self._mutex:
            for diff_id in diff_ids:
                self._held[diff_id] = self._held.get(diff_id, 0) + 1
        try:
            yield
        finally:
            with self._mutex:
                for diff_id in diff_ids:
                    self._held[diff_id] -= 1
                    if not self._held[diff_id]:
                        del self._held[diff_id]


def _created(config: bytes) -> object:
    from images.content import parse_json

    return parse_json(config, "image config").get("created")


def _shown(name: str) -> str:
    """Docker shows a name with the tag that it looked for."""
    try:
        return reference.parse(name).familiar
    except InvalidRequest:
        return name
