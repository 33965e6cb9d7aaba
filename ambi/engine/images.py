"""The image store as the engine offers it: the same verbs, with events, and with what instances use."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, BinaryIO

from ambi.core.errors import AmbiError, NotFound
from ambi.core.events import ProgressSink, ignore
from ambi.engine.core import Core

if TYPE_CHECKING:
    from images.copy import Copied
    from images.model import Usage
    from images.pull import Pulled
    from images.push import Pushed
    from images.registry.client import Document
    from images.registry.settings import Credentials
    from images.store import HistoryStep, Image, Removed
    from images.verify import Finding

log = logging.getLogger(__name__)

Ids = list[str]
Names = list[str]


class ImageService:
    """See docs/design/0002-contracts.md, "Image store". Safe to use from any thread."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._store = core.store

    def list(self) -> Sequence[Image]:
        return self._store.list()

    def resolve(self, name: str) -> Image:
        """Raises NotFound with Docker's `No such image: X`."""
        return self._store.resolve(name)

    def import_tar(
        self,
        source: BinaryIO,
        name: str | None,
        *,
        changes: Sequence[str] = (),
        message: str = "",
        progress: ProgressSink = ignore,
    ) -> Image:
        image = self._store.import_tar(source, name or "", changes=changes, message=message, progress=progress)
        self._event("import", image.id, name or image.id)
        if name:
            self._event("tag", image.id, _shown(image, name))
        return image

    def load(self, source: BinaryIO, *, progress: ProgressSink = ignore) -> Sequence[Image]:
        images = self._store.load(source, progress=progress)
        for image in images:
            self._event("load", image.id, image.names[0] if image.names else image.id)
        return images

    def bootstrap(self, suite: str, name: str, *, packages: Sequence[str] = (), progress: ProgressSink = ignore) -> Image:
        image = self._store.bootstrap(suite, name, packages=packages, progress=progress)
        name = name or image.names[0]
        self._event("import", image.id, name)
        self._event("tag", image.id, _shown(image, name))
        return image

    def to_pull(self, name: str, tag: str, credentials: Credentials) -> Names:
        """What a pull of `name` and `tag` means: one image, or without any tag every one of the repository."""
        from images import pull, reference

        wanted = reference.parse(reference.joined(name, tag))
        if tag or wanted.digest or ":" in name.rpartition("/")[2]:
            return [wanted.familiar]
        return [f"{wanted.repository}:{found}" for found in pull.tags(wanted, credentials)]

    def pull(self, name: str, credentials: Credentials, *, progress: ProgressSink = ignore) -> Pulled:
        """`name`: a reference. Raises NotFound in Docker's words, Unavailable, Corrupt, ..."""
        pulled = self._store.pull(name, credentials, progress=progress)
        self._event("pull", name, name)
        return pulled

    def names_of(self, repository: str) -> Names:
        """The names here of `repository`, for a push of all of them. Raises NotFound."""
        from images import reference

        wanted = reference.parse(repository)
        prefix = f"{wanted.repository}:"
        found = [name for image in self._store.list() for name in image.names if name.startswith(prefix)]
        if not found:
            raise NotFound(f"An image does not exist locally with the tag: {repository}", hint="`ambi image ls` lists them")
        return sorted(found)

    def push(self, name: str, credentials: Credentials, *, progress: ProgressSink = ignore) -> Pushed:
        pushed = self._store.push(name, credentials, progress=progress)
        self._event("push", name, name)
        return pushed

    def save(self, names: Sequence[str], target: BinaryIO) -> None:
        """Raises NotFound before anything is written."""
        self._store.save(names, target)
        for name in names:
            self._event("save", self._store.resolve(name).id, name)

    def copy(
        self,
        source: str,
        target: str,
        *,
        credentials: Mapping[str, Credentials],
        upload: BinaryIO | None = None,
        download: BinaryIO | None = None,
        whole_index: bool = False,
        progress: ProgressSink = ignore,
    ) -> Copied:
        """One image between registries, archives and the store; see `images.copy`."""
        from images import copy

        copied = copy.copy(
            self._store,
            source,
            target,
            credentials=credentials,
            upload=upload,
            download=download,
            whole_index=whole_index,
            progress=progress,
        )
        if copied.image is not None:
            self._event("tag", copied.image.id, target)
        return copied

    def bill_of_materials(self, name: str, form: str) -> bytes:
        """JSON in the form `spdx` or `cyclonedx`. Raises NotFound, InvalidRequest, Unsupported."""
        from images.sbom.document import bill_of_materials

        return bill_of_materials(self._store, self.resolve(name), form)

    def describe(self, name: str, credentials: Credentials) -> Document:
        """The manifest or index that a registry has under `name`."""
        from images import pull, reference

        return pull.describe(reference.parse(name), credentials)

    def verify(self, *, repair: bool, progress: ProgressSink = ignore) -> Sequence[Finding]:
        return self._store.verify(repair=repair, progress=progress)

    def log_in(self, domain: str, credentials: Credentials) -> None:
        """Raises Forbidden when the registry does not take them."""
        from images import pull

        pull.log_in(domain, credentials)

    def tag(self, image: Image, name: str) -> None:
        self._store.tag(image, name)
        self._event("tag", image.id, name)

    def history(self, image: Image) -> Sequence[HistoryStep]:
        return self._store.history(image)

    def remove(self, name: str, *, force: bool = False, prune: bool = True) -> Sequence[Removed]:
        """Raises Conflict while an instance uses it; with `force` its names go now, and it goes with its last instance."""
        removed = self._store.remove(name, force=force, prune=prune, in_use=self.in_use)
        self._tell(removed)
        return removed

    def remove_unused(self) -> None:
        """After the removal of an instance: remove its image, where that was removed by force before."""
        try:
            removed = self._store.remove_unused(in_use=self.in_use)
        except Exception:  # the instance is gone all the same
            log.exception("cannot remove images that nothing uses any more; the next removal of an instance tries again")
            return
        self._tell(removed)

    def prune(self, fits: Callable[[Image], bool], *, everything: bool = False) -> tuple[Sequence[Removed], int]:
        """Remove what no instance uses and `fits`: untagged images, or with `everything` all. Also the bytes freed."""
        removed, freed_bytes = self._store.prune(fits, everything=everything, in_use=self.in_use)
        self._tell(removed)
        return removed, freed_bytes

    def usage(self) -> Usage:
        """Bytes of all layers, of those that no instance needs, and what images share."""
        return self._store.usage(self.in_use)

    def _tell(self, removed: Sequence[Removed]) -> None:
        image_id = next((item.id for item in removed if item.id), "")
        for item in removed:
            if item.name:
                self._event("untag", item.id or image_id or item.name, item.name)
            else:
                self._event("delete", item.id, item.id)
        if any(item.id and not item.name for item in removed):
            self._core.shims.forget_layers()

    def in_use(self, image_id: str) -> Ids:
        """Ids of the instances made of the image."""
        found: Ids = [record.id for record in self._core.registry if record.row.image_id == image_id]
        return found or (["one that is being made"] if self._core.claims[image_id] > 0 else [])

    def count(self) -> int:
        return len(self._store.list())

    def layer_form(self) -> tuple[str, str]:
        try:
            return self._store.layer_form()
        except AmbiError as error:
            return "dir", error.message

    def _event(self, action: str, actor: str, name: str) -> None:
        self._core.bus.publish("image", action, actor, {"name": name})


def _shown(image: Image, name: str) -> str:
    """The name under which the store lists what was just named `name`."""
    return next((known for known in image.names if known == name or known.rpartition(":")[0] == name), name)
