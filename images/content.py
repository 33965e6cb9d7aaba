"""Blobs by digest, as an OCI image layout: `oci-layout`, `index.json`, `blobs/sha256/HEX`.

What is written appears in `ingest/` first, and by rename in `blobs/` once it is complete and synced; what comes from a
registry in `partial/HEX`, so that a download that was cut goes on where it ended. Nobody else uses the store (`store.Store`
holds its lock), so whatever lies in `ingest/` when it is opened was left by a crash.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

from ambi.core.errors import Corrupt, NotFound
from ambi.core.model import Digest

_PARTIAL_S = 7 * 86400.0  # how long half a download is worth keeping
_HEX = frozenset("0123456789abcdef")
_SMALL = 16 << 20  # JSON documents are read whole, up to here


def digest_of(data: bytes) -> Digest:
    return Digest("sha256:" + hashlib.sha256(data).hexdigest())


def is_digest(text: str) -> bool:
    """Whether `text` is `sha256:` and 64 lower-case hexadecimal digits."""
    return len(text) == 71 and text.startswith("sha256:") and _HEX.issuperset(text[7:])


class Ingest:
    """A blob being written. Left without `ContentStore.publish`, its file is removed at the end of the `with`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._hash = hashlib.sha256()
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def write(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        view = memoryview(data)
        self.size += len(view)
        while view:
            view = view[os.write(self.fd, view) :]

    @property
    def digest(self) -> Digest:
        return Digest("sha256:" + self._hash.hexdigest())

    def sync(self) -> None:
        os.fsync(self.fd)

    def read(self) -> bytes:
        """The whole of a small one."""
        if self.size > _SMALL:
            raise Corrupt(f"document {self.digest} of {self.size} bytes is larger than {_SMALL}")
        return os.pread(self.fd, self.size, 0)

    def discard(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Ingest:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.discard()


class Partial(Ingest):
    """A blob on its way from elsewhere, by the digest that it must have. What is there of it outlives a crash.

    have: bytes that an earlier attempt left. They are read and written again through `write`, which then only hashes them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._hash = hashlib.sha256()
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.have = os.fstat(self.fd).st_size

    def write(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        view = memoryview(data)
        known = max(0, min(len(view), self.have - self.size))
        self.size += len(view)
        view = view[known:]
        while view:
            view = view[os.pwrite(self.fd, view, self.size - len(view)) :]

    def discard(self) -> None:
        """Close it; what is there is kept for the next attempt."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def spoil(self) -> None:
        """Its bytes are wrong: remove it."""
        self.discard()
        self.path.unlink(missing_ok=True)


class ContentStore:
    """See the module. `publish`, `remove` and `sweep` are for the holder of the store's mutex."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._blobs = root / "blobs" / "sha256"
        self._ingest = root / "ingest"
        self._blobs.mkdir(parents=True, exist_ok=True)
        self._partial = root / "partial"
        self._partial.mkdir(mode=0o700, exist_ok=True)
        self.sweep_partial(time.time() - _PARTIAL_S)
        shutil.rmtree(self._ingest, ignore_errors=True)
        self._ingest.mkdir(mode=0o700, exist_ok=True)
        _replace(root / "oci-layout", b'{"imageLayoutVersion": "1.0.0"}')

    def path(self, digest: str) -> Path:
        return self._blobs / digest.removeprefix("sha256:")

    def open(self, digest: str) -> int:
        """A descriptor to read; NotFound names the blob."""
        try:
            return os.open(self.path(digest), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NotFound(f"blob {digest} is missing from the image store", hint="load the image again") from None

    def read_json(self, digest: str) -> dict[str, Any]:
        """A document whose digest is checked again; Corrupt otherwise."""
        fd = self.open(digest)
        with os.fdopen(fd, "rb") as file:
            data = file.read(_SMALL + 1)
        if digest_of(data) != digest:
            raise Corrupt(f"blob {digest} is damaged", hint=f"remove {self.path(digest)} and load the image again")
        return parse_json(data, f"blob {digest}")

    def ingest(self) -> Ingest:
        return Ingest(self.staging())

    def partial(self, digest: str) -> Partial:
        """A blob to be got from elsewhere; one at a time for one digest."""
        return Partial(self._partial / digest.removeprefix("sha256:"))

    def forget_partial(self, digest: str) -> None:
        (self._partial / digest.removeprefix("sha256:")).unlink(missing_ok=True)

    def sweep_partial(self, before: float) -> int:
        """Remove parts of blobs that nobody has written to since `before` (seconds since 1970); the bytes freed."""
        freed = 0
        for entry in os.scandir(self._partial):
            status = entry.stat(follow_symlinks=False)
            if status.st_mtime < before:
                freed += status.st_blocks * 512
                os.unlink(entry.path)
        return freed

    def staging(self) -> Path:
        """A fresh path in the ingest directory, for a file or directory; the caller removes it."""
        return self._ingest / uuid.uuid4().hex

    def publish(self, blob: Ingest) -> None:
        """Make a synced blob visible under its digest."""
        os.rename(blob.path, self.path(blob.digest))

    def write_index(self, manifests: list[dict[str, Any]]) -> None:
        body = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": manifests}
        _replace(self.root / "index.json", json.dumps(body, indent=1).encode())

    def sweep(self, keep: set[str]) -> int:
        """Remove every blob that is not in `keep`; the bytes freed."""
        freed = 0
        for entry in os.scandir(self._blobs):
            if f"sha256:{entry.name}" not in keep:
                freed += entry.stat(follow_symlinks=False).st_blocks * 512
                os.unlink(entry.path)
        return freed

    def sync_directories(self) -> None:
        for path in (self._blobs, self.root / "layers"):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


def _replace(path: Path, data: bytes) -> None:
    new = path.with_name(path.name + ".new")
    new.write_bytes(data)
    os.replace(new, path)


def parse_json(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object; Corrupt names `what`."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"{what} is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise Corrupt(f"{what} is not a JSON object")
    return body
