"""Archives of layers into the store: a blob, a layer in the form that this host mounts, and what is known of both."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from ambi.core.errors import Corrupt, StorageFull, Unsupported, from_os_error
from ambi.core.events import Progress, ProgressSink
from ambi.linux.libc import syscall
from images.content import ContentStore, Ingest
from images.database import LayerRow
from images.layers.convert import Converted
from images.layers.supervisor import Worker, pipe, write_all
from images.manifest import layer_media_type
from images.snapshots import EROFS, FormName, Prepared, Snapshots, discard

_READ = 256 << 10
_STEP = 8 << 20  # bytes between two reports of progress
_NR_SYNC_FILE_RANGE, _SYNC_FILE_RANGE_WRITE = 277, 2  # linux/fs.h


@contextmanager
def about(what: str) -> Iterator[None]:
    """Errors of an archive say what they stopped (`cannot import box:latest`), and how to look at the archive."""
    try:
        yield
    except (Corrupt, StorageFull, Unsupported) as error:
        hint = error.hint or "look at the archive: tar -tvf FILE"
        raise type(error)(f"{what}: {error.message}", hint=hint) from error


class NewLayer(NamedTuple):
    """A layer whose blob and snapshot wait in the ingest directory. prepared, blob: None when the store has it."""

    row: LayerRow
    blob: Ingest | None
    prepared: Prepared | None

    def sync(self) -> None:
        """Have the disk hold both: for whoever makes them visible. Raises StorageFull and what else a disk says."""
        self._each(os.fsync)

    def write_back(self) -> None:
        """Have the disk begin with both, so that `sync` has less to wait for; this may take a while, too."""
        self._each(_write_back)

    def _each(self, act: Callable[[int], object]) -> None:
        try:
            if self.blob is not None and self.blob.fd >= 0:
                act(self.blob.fd)
            if self.prepared is not None and self.prepared.form == "erofs":
                fd = os.open(self.prepared.path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    act(fd)
                finally:
                    os.close(fd)
        except OSError as error:
            raise from_os_error("cannot store the layer", error) from error

    def discard(self) -> None:
        if self.blob is not None:
            self.blob.discard()
        if self.prepared is not None:
            discard(self.prepared.path)


def _write_back(fd: int) -> None:
    syscall(_NR_SYNC_FILE_RANGE, fd, 0, 0, _SYNC_FILE_RANGE_WRITE, what="sync_file_range")


def layer_row(blob: Ingest, converted: Converted) -> LayerRow:
    media_type = layer_media_type(converted.compression)
    return LayerRow(converted.diff_id, converted.tar_bytes, converted.content_bytes, blob.digest, media_type, blob.size)


class Source(Protocol):
    """Where the bytes of an archive come from; b"" at the end."""

    def read(self, size: int, /) -> bytes: ...


def receive_layer(
    source: Source,
    form: FormName,
    *,
    content: ContentStore,
    snapshots: Snapshots,
    progress: ProgressSink,
    blob: Ingest | None = None,
    alone: bool = True,
) -> NewLayer:
    """Read one archive to its end. For EROFS it is written, hashed and converted at the same time. Nothing is synced.

    blob: where it is written, taken over; None for a new one. alone: no other is being read, so that the worker may use more
    than one processor.

    Raises Corrupt, StorageFull and whatever `source` raises; nothing is left then.
    """
    blob = blob or content.ingest()
    try:
        with Worker(ahead=alone) as worker:
            if form == "erofs":
                prepared = _stream(source, worker, blob, snapshots, progress)
            else:
                _copy(source, blob, progress)
                os.lseek(blob.fd, 0, os.SEEK_SET)
                prepared = snapshots.prepare(form, worker, blob.fd)
        return NewLayer(layer_row(blob, prepared.converted), blob, prepared)
    except OSError as error:
        blob.discard()
        raise from_os_error("cannot store the archive", error) from error
    except BaseException:
        blob.discard()
        raise


def _stream(source: Source, worker: Worker, blob: Ingest, snapshots: Snapshots, progress: ProgressSink) -> Prepared:
    path = snapshots.staging()
    read_end, write_end = pipe()
    target = -1
    try:
        try:
            target = EROFS.start(worker, read_end, path, snapshots.limit_bytes())
            os.close(read_end)
            read_end = -1
            with _written_back(blob.fd, target) as more:
                _copy(source, blob, progress, write_end, more)
        finally:
            os.close(write_end)
            if read_end >= 0:
                os.close(read_end)
        return Prepared("erofs", path, worker.converted())
    except BaseException:
        discard(path)
        raise
    finally:
        if target >= 0:
            os.close(target)


@contextmanager
def _written_back(*fds: int) -> Iterator[Callable[[], None]]:
    """Gives what is to be called now and then, to have the disk begin with these files while they grow.

    In another thread, for it may take a while. Raises OSError of the disk's at the end.
    """
    last: Future[None] | None = None

    def begin() -> None:
        for fd in fds:
            _write_back(fd)

    def more() -> None:
        nonlocal last
        if last is None or (last.done() and last.exception() is None):
            last = disk.submit(begin)

    with ThreadPoolExecutor(1, "disk") as disk:
        yield more
    if last is not None:
        last.result()


def _nothing() -> None:
    """Nobody waits for the disk here."""


def _copy(
    source: Source, blob: Ingest, progress: ProgressSink, tee: int | None = None, more: Callable[[], None] = _nothing
) -> None:
    """All of `source` into `blob`, and into the pipe `tee` until its reader goes (its answer then says why).

    more: called after each step.
    """
    told = 0
    while chunk := source.read(_READ):
        blob.write(chunk)
        if tee is not None:
            try:
                write_all(tee, chunk)
            except BrokenPipeError:
                return
        if blob.size - told >= _STEP:
            told = blob.size
            more()
            progress(Progress("", "Importing", told, 0))
    if not blob.size:
        raise Corrupt("the archive is empty")
