"""Looking into the root of an instance and changing it: archives, differences, export. `commit.py` makes images of them.

A running instance is looked at through its shim. For one that does not run a shim is spawned that prepares the root; the
record's lock is held, so that no start comes between. A guest that was booted for it waits a moment for the next request.
"""

from __future__ import annotations

import io
import logging
import os
import posixpath
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple

from ambi.core.deadline import Deadline
from ambi.core.errors import AmbiError, Conflict, NotFound, Unavailable, from_os_error
from ambi.core.model import Isolation
from ambi.core.plan import LAUNCH_FILE
from ambi.engine import mounts, spec
from ambi.engine.core import Core
from ambi.engine.create import write_whole
from ambi.engine.lifecycle import SHIM_END_S, check_present, layers_of, soon, wait_run_end, waiting_run
from ambi.engine.mountpoints import points_of
from ambi.engine.records import Record, Run
from ambi.shim.client import ShimConnection

log = logging.getLogger(__name__)

FILES_S = 10.0  # for the small files of a guest, which may not answer
LINGER_S = 5.0  # for a guest that was booted only to be looked into
PIPE_BYTES = 1 << 20


class PathStat(NamedTuple):
    """mode: st_mode. link: of a symbolic link where it leads to in the end, else empty."""

    name: str
    size: int
    mode: int
    mtime_ns: int
    link: str


class Change(NamedTuple):
    """kind: A added, C changed, D deleted."""

    kind: str
    path: str


def clean(path: str) -> str:
    """`path` as Docker reads it: absolute, without `..`; a slash or `/.` at the end keeps its meaning."""
    tidy = posixpath.normpath("/" + path)
    tidy = "/" + tidy.lstrip("/")
    if path.endswith("/.") or path == ".":
        return tidy.rstrip("/") + "/."
    return tidy + "/" if path.endswith("/") and tidy != "/" else tidy


def stat(core: Core, id: str, path: str) -> PathStat:
    """Of `path` itself, when it is a link. Raises NotFound in Docker's words."""
    record, wanted = core.registry.find(id), clean(path)
    with looking(core, record) as connection, _missing(id, wanted):
        answer = connection.call("tree", verb="stat", path=wanted)
    return _stat(wanted, answer)


def _stat(path: str, answer: dict[str, Any]) -> PathStat:
    name = path.rstrip("/").rpartition("/")[2] or "/"
    return PathStat(name, answer["size"], answer["mode"], answer["mtime_ns"], answer["link"])


@contextmanager
def get(core: Core, id: str, path: str) -> Iterator[tuple[PathStat, BinaryIO]]:
    """What is at `path` as an archive to be read in the `with`, which raises at its end what went wrong meanwhile."""
    record, wanted = core.registry.find(id), clean(path)
    with looking(core, record) as connection:
        with _missing(id, wanted):
            about = _stat(wanted, connection.call("tree", verb="stat", path=wanted))
        with received(connection, verb="get", path=wanted) as stream:
            yield about, stream
    core.publish(record, "archive-path")


def put(core: Core, id: str, path: str, chunks: Iterable[bytes], *, no_overwrite: bool, copy_ids: bool) -> None:
    """Unpack the plain archive `chunks` into the directory `path`. Raises NotFound, InvalidRequest, StorageFull, ..."""
    record, wanted = core.registry.find(id), clean(path)
    with looking(core, record) as connection, _missing(id, wanted):
        _put(connection, wanted, chunks, no_overwrite=no_overwrite, copy_ids=copy_ids)
    core.publish(record, "extract-to-dir")


def write_files(connection: ShimConnection, files: dict[str, str]) -> None:
    """Write `files` (absolute path to content) of a running instance: into what is mounted there, else as files of root's.

    Raises as `put` does, and DeadlineExceeded.
    """
    import tarfile

    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for path, text in files.items():
            member = tarfile.TarInfo(path.lstrip("/"))
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    by = Deadline.after(FILES_S)
    _put(connection, "/", [archive.getvalue()], no_overwrite=True, copy_ids=False, by=by)


def _put(
    connection: ShimConnection, path: str, chunks: Iterable[bytes], *, no_overwrite: bool, copy_ids: bool,
    by: Deadline | None = None,
) -> None:  # fmt: skip
    fields: dict[str, Any] = {"path": path, "no_overwrite_dir_non_dir": no_overwrite, "copy_ids": copy_ids}
    reader, writer = _pipe()
    job = _Job(lambda: connection.call("tree", fds=[reader], by=by, verb="put", **fields), lambda: os.close(reader))
    try:
        _write_all(writer, chunks)
    finally:
        os.close(writer)
        job.wait()
    job.result()


def _write_all(fd: int, chunks: Iterable[bytes]) -> None:
    """Until the reader goes, whose answer then says why."""
    try:
        for chunk in chunks:
            view = memoryview(chunk)
            while view:
                view = view[os.write(fd, view) :]
    except BrokenPipeError:
        pass


def changes(core: Core, id: str) -> list[Change]:
    """What the instance has changed in its image, by path."""
    record = core.registry.find(id)
    with looking(core, record) as connection, received(connection, verb="diff") as stream:
        records = stream.read().split(b"\0")
    found = [Change(chr(line[0]), line[1:].decode("utf-8", "replace")) for line in records if line]
    return sorted(found, key=lambda change: change.path)


@contextmanager
def export(core: Core, id: str) -> Iterator[BinaryIO]:
    """The whole root as an archive; as with `get`."""
    record = core.registry.find(id)
    with looking(core, record) as connection, received(connection, verb="export") as stream:
        yield stream
    core.publish(record, "export")


@contextmanager
def received(connection: ShimConnection, **fields: Any) -> Iterator[BinaryIO]:
    """The stream of a request of `tree`, whose error is raised at the end of the `with`."""
    reader, writer = _pipe()
    job = _Job(lambda: connection.call("tree", fds=[writer], **fields), lambda: os.close(writer))
    with open(reader, "rb", buffering=PIPE_BYTES) as stream:
        try:
            yield stream
        except BaseException:
            stream.close()
            job.wait()
            raise
    job.wait()
    job.result()


def _pipe() -> tuple[int, int]:
    from fcntl import F_SETPIPE_SZ, fcntl

    reader, writer = os.pipe()
    try:
        fcntl(reader, F_SETPIPE_SZ, PIPE_BYTES)
    except OSError:  # more than the user's share of pipe buffers
        pass
    return reader, writer


class _Job:
    """A call in a thread of its own; `done` is called after it."""

    def __init__(self, call: Callable[[], object], done: Callable[[], object]) -> None:
        self._error: AmbiError | None = None
        self._call, self._done = call, done
        self._thread = threading.Thread(target=self._run, name="tree", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._call()
        except AmbiError as error:
            self._error = error
        finally:
            self._done()

    def wait(self) -> None:
        self._thread.join()

    def result(self) -> None:
        if self._error is not None:
            raise self._error


@contextmanager
def _missing(id: str, path: str) -> Iterator[None]:
    try:
        yield
    except NotFound as error:
        raise NotFound(f"Could not find the file {path} in container {id}", hint=f"ambi exec {id} ls -la /") from error


@contextmanager
def looking(core: Core, record: Record) -> Iterator[ShimConnection]:
    """A connection to a shim that knows the root of `record`, running or not. Raises Conflict (it is being removed)."""
    check_present(record)
    run = _running(core, record)
    if run is not None and _lives(run):
        yield run.connection
        return
    with record.lock:
        check_present(record)
        run = _running(core, record)
        if run is not None and not _lives(run):  # it has just ended, and we are about to hear of it
            run.gone.wait(SHIM_END_S)
            run = None
        if run is not None:
            yield run.connection
            return
        run = _prepare(core, record)
        try:
            yield run.connection
        finally:
            _let_go(core, record, run)


def _running(core: Core, record: Record) -> Run | None:
    with core.mutex:
        run = record.run
        return run if run is not None and run.started and run.exit is None and record.state.running else None


def _lives(run: Run) -> bool:
    """Whether the shim has something running, as it knows itself."""
    try:
        return run.connection.call("state", by=soon()).get("status") in ("running", "paused")
    except Unavailable:
        return False


def _prepare(core: Core, record: Record) -> Run:
    """A shim that runs nothing, with a plan. With the record's lock held."""
    wait_run_end(core, record)
    data, row = core.roots.instance_data(record.id), record.row
    prepared = spec.prepare(record.id, row.isolation, row.spec, data, points=points_of(row.mounts))
    mounts.make_sources(prepared.points)
    run = waiting_run(core, record)
    if run is None or not run.looks:  # one that waits for the next request has its plan
        plan = spec.plan(record.id, row.isolation, row.spec, layers_of(core, record), core.roots, prepared)
        try:
            write_whole(data / LAUNCH_FILE, plan.to_json())
        except OSError as error:
            raise from_os_error(f"cannot look into container {record.id}", error) from error
    run = run or core.shims.spawn(record)
    run.looks += 1
    run.failed = True  # a shim that is killed is swept after
    return run


def _let_go(core: Core, record: Record, run: Run) -> None:
    if record.row.isolation is Isolation.VM:
        seen = run.looks
        timer = threading.Timer(LINGER_S, _leave_later, (core, record, run, seen))
        timer.daemon = True
        timer.start()
    else:
        _leave(core, record, run)


def _leave_later(core: Core, record: Record, run: Run, seen: int) -> None:
    with record.lock:
        if record.run is run and not run.started and run.looks == seen:
            _leave(core, record, run)


def _leave(core: Core, record: Record, run: Run) -> None:
    """Have the shim let go of the root; it stays when clients wait for the start. With the record's lock held."""
    try:
        ends = bool(run.connection.call("tree", verb="leave", by=soon()).get("ends"))
        run.looks, run.failed = (run.looks, True) if ends else (0, False)
    except Unavailable:
        ends = True
    except AmbiError as error:
        log.warning("%s: its root is not let go: %s", record.id[:12], error)
        core.shims.end(record, run)
        return
    if ends and not run.gone.wait(SHIM_END_S):
        raise Conflict(f"container {record.id}: what was prepared to look into it is not cleaned up yet")
