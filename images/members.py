"""The files of an image archive, taken apart by a worker and put into the ingest directory as they come."""

from __future__ import annotations

import os
import threading
from pathlib import PurePosixPath
from typing import BinaryIO

from ambi.core.errors import AmbiError, Corrupt, Internal, from_os_error
from ambi.core.events import Progress, ProgressSink
from images.content import ContentStore, Ingest
from images.layers.frames import FrameReader
from images.layers.supervisor import Worker, pipe, write_all

_READ = 256 << 10
_STEP = 8 << 20  # bytes between two reports of progress
_MAX_MEMBERS = 20_000


class Members:
    """The files of an archive by cleaned name, with its links followed; `with` removes what was not published."""

    def __init__(self) -> None:
        self._files: dict[str, Ingest] = {}
        self._links: dict[str, str] = {}

    def __enter__(self) -> Members:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.discard()

    def add(self, name: str, file: Ingest) -> None:
        old = self._files.pop(name, None)
        if old is not None:
            old.discard()
        self._files[name] = file
        if len(self._files) + len(self._links) > _MAX_MEMBERS:
            raise Corrupt(f"image archive has more than {_MAX_MEMBERS} members")

    def link(self, name: str, target: str) -> None:
        self._links[name] = target
        if len(self._files) + len(self._links) > _MAX_MEMBERS:
            raise Corrupt(f"image archive has more than {_MAX_MEMBERS} members")

    def find(self, name: str) -> Ingest | None:
        """The file `name`, through at most eight links."""
        for _ in range(8):
            found = self._files.get(name)
            if found is not None:
                return found
            if name not in self._links:
                return None
            name = self._links[name]
        return None

    def get(self, name: str) -> Ingest:
        found = self.find(name)
        if found is None:
            raise Corrupt(f"image archive lacks {name}", hint="save the image again; the archive is not complete")
        return found

    def blob(self, descriptor: object, what: str) -> Ingest:
        """The blob of an OCI descriptor, its digest and size checked."""
        if not isinstance(descriptor, dict):
            raise Corrupt(f"image archive has a damaged descriptor of {what}")
        digest, size = descriptor.get("digest"), descriptor.get("size")
        if not isinstance(digest, str) or not digest.startswith("sha256:"):
            raise Corrupt(f"{what} of the image archive has the digest {digest!r}, which is not sha256")
        found = self.get(f"blobs/sha256/{digest[7:]}")
        if found.digest != digest:
            raise Corrupt(f"{what} {digest} of the image archive is damaged: its digest is {found.digest}")
        if size is not None and size != found.size:
            raise Corrupt(f"{what} {digest} of the image archive has {found.size} bytes, its descriptor says {size}")
        return found


class _Feed(threading.Thread):
    """Writes all of a source into a pipe, which it closes."""

    def __init__(self, source: BinaryIO, target: int, progress: ProgressSink) -> None:
        super().__init__(name="load")
        self._source = source
        self._target = target
        self._progress = progress
        self.failure: BaseException | None = None

    def run(self) -> None:
        done = told = 0
        try:
            while chunk := self._source.read(_READ):
                write_all(self._target, chunk)
                done += len(chunk)
                if done - told >= _STEP:
                    told = done
                    self._progress(Progress("", "Loading", done, 0))
        except BrokenPipeError:
            pass  # the worker has refused the archive, and its answer says why
        except BaseException as error:
            self.failure = error
        finally:
            os.close(self._target)


def split(content: ContentStore, source: BinaryIO, members: Members, progress: ProgressSink) -> None:
    """Fill `members` from an archive of any compression.

    Raises Corrupt, StorageFull, and whatever `source` raises; what has come by then is for `members` to discard.
    """
    try:
        with Worker() as worker:
            feed_end, feed = pipe()
            take, give = pipe()
            try:
                worker.start({"do": "split"}, feed_end, give)
            except BaseException:
                os.close(feed)
                os.close(take)
                raise
            finally:
                os.close(feed_end)
                os.close(give)
            feeding = _Feed(source, feed, progress)
            feeding.start()
            broken, refused = _collect(content, worker, take, members)
            feeding.join()
    except OSError as error:
        raise from_os_error("cannot load the archive", error) from error
    if feeding.failure is not None:
        raise feeding.failure
    if isinstance(broken, OSError):
        raise from_os_error("cannot load the archive", broken) from broken
    if broken is not None and (refused is None or isinstance(refused, Internal)):
        raise broken  # the worker only saw its pipe close
    if refused is not None:
        raise refused


def _collect(
    content: ContentStore, worker: Worker, take: int, members: Members
) -> tuple[AmbiError | OSError | None, AmbiError | None]:
    """What went wrong here, and what the worker refused."""
    broken: AmbiError | OSError | None = None
    try:
        _take(content, FrameReader(take), members)
    except (AmbiError, OSError) as error:
        broken = error
    finally:
        os.close(take)
    try:
        worker.result()
    except AmbiError as error:
        return broken, error
    return broken, None


def _take(content: ContentStore, frames: FrameReader, members: Members) -> None:
    while (frame := frames.frame()) is not None and not frame.get("end"):
        name, kind = clean(str(frame["name"])), frame["kind"]
        if kind == "f":
            file = content.ingest()
            try:
                frames.copy(frame["data"], file.write)
            except BaseException:
                file.discard()
                raise
            members.add(name, file)
        elif kind in ("h", "l"):
            link = str(frame["link"])
            members.link(name, clean(link if kind == "h" else str(PurePosixPath(name).parent / link)))
        elif kind != "d":
            raise Corrupt(f"image archive has {name}, which is neither a file nor a link nor a directory")


def clean(name: str) -> str:
    """`name` without `.`, and `..` applied; it is only ever a key."""
    parts: list[str] = []
    for part in name.encode("latin-1").decode("utf-8", "surrogateescape").split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)
