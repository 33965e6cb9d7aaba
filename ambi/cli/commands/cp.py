"""`ambi cp`: files to and from an instance, by docker's rules for names that exist and names that do not."""

from __future__ import annotations

import base64
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import click

from ambi.cli import flags
from ambi.cli.app import App, DockerCommand, pass_app
from ambi.cli.humanize import size as human_size
from ambi.cli.names import looked_up
from ambi.cli.progress import Bar
from ambi.client.client import path_of
from ambi.core.errors import AmbiError, InvalidRequest, NotFound, from_os_error

if TYPE_CHECKING:
    from ambi.cli.untar import Pieces
    from ambi.client.http import Response

DIRECTORY, LINK = 1 << 31, 1 << 27  # of Go's FileMode
FORMS = "ambi cp INSTANCE:SRC DEST|-, or ambi cp SRC|- INSTANCE:DEST"


class Inside(NamedTuple):
    """What there is at a path of an instance."""

    exists: bool
    directory: bool
    link: str  # of a symbolic link, where it leads


class Placed(NamedTuple):
    """Where an archive is to be unpacked, and what its topmost entry is called there; None as it is."""

    directory: str
    name: str | None


@click.command("cp", cls=DockerCommand)
@flags.switch("-a", "--archive", help="Keep user and group IDs.")
@flags.switch("-L", "--follow-link", help="Copy what the symbolic link SRC leads to.")
@flags.switch("-q", "--quiet", help="Show no progress.")
@click.argument("source", metavar="[INSTANCE:]SRC|-")
@click.argument("target", metavar="[INSTANCE:]DEST|-")
@pass_app
def cp(app: App, source: str, target: str, archive: bool, follow_link: bool, quiet: bool) -> None:
    """Copy files between an instance, running or not, and this machine.

    A directory is copied with all in it: into DEST when that exists, as DEST when it does not; SRC/. copies what is in it.
    `-` is a tar archive on stdin or stdout.
    """
    from_name, from_path = split(source)
    to_name, to_path = split(target)
    if from_name and to_name:
        raise InvalidRequest("copying between instances is not possible", hint="copy to a directory here, and from there")
    if not from_name and not to_name:
        raise InvalidRequest("neither SRC nor DEST is in an instance", hint=FORMS)
    name = from_name or to_name
    assert name is not None
    shown = None if quiet else sys.stderr.isatty()
    with _known(app, name):
        if from_name:
            copy_out(app, name, from_path, to_path, archive=archive, follow=follow_link, shown=bool(shown))
        else:
            copy_in(app, name, from_path, to_path, archive=archive, follow=follow_link, shown=bool(shown))


@contextmanager
def _known(app: App, name: str) -> Iterator[None]:
    """What is near `name` when that is what does not exist, and not a file."""
    try:
        yield
    except NotFound as error:
        if not error.message.startswith("No such container"):
            raise
        with looked_up(app, name):
            raise


def split(text: str) -> tuple[str | None, str]:
    """The instance and the path of `NAME:PATH`; what begins with a slash or a dot is a path of this machine."""
    name, colon, path = text.partition(":")
    if not colon or not name or name.startswith((".", "/")):
        return None, text
    if not path:
        raise InvalidRequest(f"'{text}' has no path behind the colon", hint=FORMS)
    return name, path


def place(source: str, *, source_is_directory: bool, target: str, exists: bool, is_directory: bool) -> Placed:
    """Docker's rules, of which `cp -a`'s are the model. Raises InvalidRequest when they forbid it."""
    if exists and is_directory:
        return Placed(target, None)
    if exists and source_is_directory:
        raise InvalidRequest(
            f"cannot copy a directory to {target}: it is no directory", hint="name a directory, or a new name"
        )
    if not exists and not source_is_directory and target.endswith(("/", "/.")):
        raise InvalidRequest(f"no such directory: {target}", hint="make it first, or leave out the slash at the end")
    directory, name = os.path.split(target.rstrip("/") or "/")
    return Placed(directory or "/", name)


def base_of(path: str) -> str:
    """What the engine calls the topmost entry of an archive of `path`."""
    return path.rstrip("/").rpartition("/")[2] or "/"


def inside(app: App, name: str, path: str) -> Inside:
    """Of the path itself, when it is a link."""
    try:
        headers = app.client.head(path_of("containers", name, "archive"), {"path": path})
    except NotFound:  # the instance or the path: the next request tells
        return Inside(False, False, "")
    try:
        about = json.loads(base64.b64decode(headers["x-docker-container-path-stat"]))
        return Inside(True, bool(about["mode"] & DIRECTORY), about["linkTarget"] if about["mode"] & LINK else "")
    except (KeyError, ValueError, TypeError) as error:
        raise InvalidRequest("the engine did not say what there is at the path", hint="ambi version") from error


def copy_out(app: App, name: str, source: str, target: str, *, archive: bool, follow: bool, shown: bool) -> None:
    """From the instance to this machine."""
    asked = source
    if follow and (link := inside(app, name, source).link):
        asked = link
    if target != "-":
        check_target(target)
    response = app.client.stream("GET", path_of("containers", name, "archive"), {"path": asked})
    if target == "-":
        if sys.stdout.isatty():
            raise InvalidRequest("an archive is not for a terminal", hint="redirect it: ambi cp INSTANCE:SRC - | tar -x")
        for piece in response.chunks():
            sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
        return
    from ambi.cli.untar import Untar

    about = json.loads(base64.b64decode(response.headers["x-docker-container-path-stat"]))
    exists, is_directory = os.path.lexists(target), os.path.isdir(target)
    source_is_directory = bool(about["mode"] & DIRECTORY)
    placed = place(source, source_is_directory=source_is_directory, target=target, exists=exists, is_directory=is_directory)
    if placed.name is None and asked != source:
        placed = Placed(placed.directory, base_of(source))  # the link's own name, not that of what it leads to
    try:
        unpacker = Untar(placed.directory or ".", own=archive and os.geteuid() == 0)
        total = unpacker.unpack(_reader(response, shown), base_of(asked), placed.name)
    except OSError as error:
        raise from_os_error(f"cannot copy to {target}", error) from error
    _tell(shown, total, target)


def check_target(target: str) -> None:
    """Before anything is asked for. Raises InvalidRequest."""
    parent = os.path.dirname(os.path.abspath(target.rstrip("/") or "/"))
    if not os.path.isdir(parent):
        raise InvalidRequest(f'invalid output path: directory "{parent}" does not exist', hint=f"mkdir -p {parent}")
    if os.path.lexists(target) and not (os.path.isfile(target) or os.path.isdir(target) or os.path.islink(target)):
        raise InvalidRequest(f"invalid output path: {target} is no file and no directory", hint="name a file or a directory")


def _reader(response: Response, shown: bool) -> Pieces:
    from ambi.cli.untar import Pieces

    return Pieces(response.chunks(), _bar("Copying from the instance", shown))


def _bar(text: str, shown: bool) -> Callable[[int], None]:
    if not shown:
        return lambda _: None
    bar = Bar()
    return lambda done: bar.tell(text, done)


def _tell(shown: bool, total: int, target: str) -> None:
    if shown:
        click.echo(f"Successfully copied {human_size(total)} to {target}", err=True)


def copy_in(app: App, name: str, source: str, target: str, *, archive: bool, follow: bool, shown: bool) -> None:
    """From this machine to the instance."""
    found = inside(app, name, target)
    if found.link:
        target = found.link
        found = inside(app, name, target)
    if source == "-":
        if not found.directory:
            raise InvalidRequest(
                f'destination "{name}:{target}" must be a directory', hint=f"ambi exec {name} mkdir -p {target}"
            )
        _upload(app, name, target, sys.stdin.buffer, archive=archive, shown=shown)
        return
    if not os.path.lexists(source):
        raise NotFound(f"no such file or directory: {source}", hint=f"ls -ld {source}")
    if follow and os.path.islink(source.rstrip("/")):
        name_here, source = base_of(source), os.path.realpath(source)
    else:
        name_here = os.path.basename(os.path.abspath(source)) if source.rstrip("/") in ("", ".", "..") else base_of(source)
    is_directory = os.path.isdir(source) and (not os.path.islink(source) or source.endswith(("/", "/.")))
    if not is_directory and source.endswith("/"):
        raise InvalidRequest(f"{source} is not a directory", hint=f"ls -ld {source.rstrip('/')}")
    placed = place(
        source, source_is_directory=is_directory, target=target, exists=found.exists, is_directory=found.directory
    )
    contents = source.endswith("/.") or source == "."
    top = placed.name or ("." if contents else name_here)
    reader, writer = os.pipe()
    problem: list[AmbiError] = []
    thread = threading.Thread(target=_archive, args=(writer, source, top, problem), daemon=True)
    thread.start()
    with open(reader, "rb") as stream:
        _upload(app, name, placed.directory, _Checked(stream, problem), archive=archive, shown=shown)
    thread.join()
    if problem:
        raise problem[0]


class _Checked:
    """An archive that is being made: one that cannot be finished does not end like one that is."""

    def __init__(self, stream: BinaryIO, problem: list[AmbiError]) -> None:
        self._stream, self._problem = stream, problem

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        if not data and self._problem:
            raise OSError(self._problem[0].message)
        return data


def _archive(fd: int, source: str, top: str, problem: list[AmbiError]) -> None:
    from ambi.cli.untar import write_archive

    try:
        with open(fd, "wb") as target:
            try:
                write_archive(target, source, top)
            except OSError as error:
                if not isinstance(error, BrokenPipeError):
                    problem.append(from_os_error(f"cannot read {source}", error))
    except BrokenPipeError:  # the engine has answered before it had read all
        pass


def _upload(app: App, name: str, directory: str, stream: BinaryIO | _Checked, *, archive: bool, shown: bool) -> None:
    query = {"path": directory, "noOverwriteDirNonDir": "true"}
    if archive:
        query["copyUIDGID"] = "true"
    total = [0]
    told = _bar("Copying to the instance", shown)

    def uploaded(done: int) -> None:
        total[0] = done
        told(done)

    path = path_of("containers", name, "archive")
    app.client.upload(path, query, stream, uploaded, method="PUT").read()  # type: ignore[arg-type]
    _tell(shown, total[0], f"{name}:{directory}")
