"""Images from and to registries and archives: pull, push, copy, save, login, logout."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import click

from ambi.cli import complete, credentials, flags
from ambi.cli.app import App, DockerCommand, pass_app
from ambi.cli.names import image_names, looked_up
from ambi.cli.output import one_line, warn
from ambi.cli.progress import Bar, entries
from ambi.cli.values import split_name
from ambi.client.client import path_of
from ambi.core.errors import InvalidRequest, from_os_error


@click.command("pull", cls=DockerCommand)
@flags.switch("-a", "--all-tags", help="Every tag of the repository.")
@flags.option("--platform", metavar="OS/ARCH", help="linux/amd64, the only one that runs here.")
@flags.switch("-q", "--quiet", help="Print the name alone.")
@click.argument("name", metavar="NAME[:TAG|@DIGEST]")
@pass_app
def pull(app: App, name: str, all_tags: bool, platform: str | None, quiet: bool) -> None:
    """Get an image from a registry."""
    said = fetch(app, name, all_tags=all_tags, platform=platform or "")
    click.echo(name if quiet else "\n".join(said))


def fetch(app: App, name: str, *, all_tags: bool = False, platform: str = "") -> list[str]:
    """Pull, with progress on stderr; returns what is to be told at its end."""
    repository, tag = _split(name)
    if all_tags and tag:
        raise InvalidRequest("a tag cannot be used with --all-tags", hint=f"ambi pull -a {repository}")
    query = {"fromImage": repository, "platform": platform}
    if not all_tags:
        query["tag"] = tag or "latest"
    with Bar() as bar:
        response = app.client.stream("POST", "/images/create", query, x_registry_auth=credentials.header(name))
        return _follow(response, bar, "Pulling")


def _split(name: str) -> tuple[str, str]:
    repository, at, digest = name.partition("@")
    return (repository, digest) if at else split_name(name)


@click.command("push", cls=DockerCommand)
@flags.switch("-a", "--all-tags", help="Every tag of the repository that is here.")
@flags.switch("-q", "--quiet", help="Print the name alone.")
@click.argument("name", metavar="NAME[:TAG]", shell_complete=complete.images)
@pass_app
def push(app: App, name: str, all_tags: bool, quiet: bool) -> None:
    """Send an image to the registry that its name tells."""
    repository, tag = split_name(name)
    if all_tags and tag:
        raise InvalidRequest("a tag cannot be used with --all-tags", hint=f"ambi push -a {repository}")
    query = {} if all_tags else {"tag": tag or "latest"}
    with looked_up(app, name, image_names), Bar() as bar:
        path = path_of("images", repository, "push")
        response = app.client.stream("POST", path, query, x_registry_auth=credentials.header(name))
        said = _follow(response, bar, "Pushing")
    if quiet:
        click.echo(name)
        return
    for text in said:
        click.echo(text)


def _follow(response: Any, bar: Bar, verb: str) -> list[str]:
    """Show the sum of all layers as one step; returns the last words. Raises the error that the work ended with."""
    layers: dict[str, tuple[int, int]] = {}
    done, said = set(), []
    for entry in entries(response):
        unit, status = str(entry.get("id") or ""), one_line(str(entry.get("status") or ""))
        if not unit and status:
            said.append(status)
        elif status in ("Pull complete", "Already exists", "Pushed", "Copied", "Layer already exists") or status.startswith(
            "Mounted"
        ):
            done.add(unit)
        elif unit and not status.startswith("Pulling from"):
            detail = entry.get("progressDetail") or {}
            current, total = int(detail.get("current") or 0), int(detail.get("total") or 0)
            layers[unit] = (current, total) if total else layers.get(unit, (0, 0))
        count = len(done | set(layers))
        bar.tell(
            f"{verb} {len(done)} of {count} layers", sum(x for x, _ in layers.values()), sum(x for _, x in layers.values())
        )
    return said


@click.command("copy", cls=DockerCommand)
@flags.switch("-a", "--all", "everything", help="Every platform of an index, and the index; between registries.")
@flags.switch("-q", "--quiet", help="Print nothing.")
@click.argument("source", shell_complete=complete.images)
@click.argument("target")
@pass_app
def copy(app: App, source: str, target: str, everything: bool, quiet: bool) -> None:
    """Copy an image between registries, archives and the store.

    SOURCE and TARGET are docker://HOST/NAME for a registry, docker-archive:FILE[:NAME] or oci-archive:FILE[:NAME] for an
    archive (FILE is - for a pipe), or the name of an image here. Nothing is unpacked.
    """
    (start, read), (goal, write) = _of_archive(source), _of_archive(target)
    query = {"from": start, "to": goal, **({"all": "1"} if everything else {})}
    if write and read:
        raise InvalidRequest("one archive is not copied to another", hint=f"load it first: ambi image copy {source} NAME")
    names = [text.removeprefix("docker://") for text in (source, target) if text.startswith("docker://")]
    fields = {"x_registry_config": credentials.headers(names)} if names else {}
    if write:
        write_to(None if write == "-" else write, "image copy", lambda: app.client.stream("POST", _COPY, query, **fields))
        return
    with _readable(read) as file, Bar() as bar:
        if file is not None:
            response = app.client.upload(_COPY, query, file, lambda sent: bar.tell("Sending", sent), **fields)
        else:
            response = app.client.stream("POST", _COPY, query, **fields)
        said = _follow(response, bar, "Copying")
    if not quiet:
        click.echo("\n".join(said))


_COPY = "/ambi/images/copy"


def _of_archive(text: str) -> tuple[str, str]:
    """What the engine is told of a place, and the file when it is an archive: `docker-archive:FILE[:NAME]`."""
    transport, _, rest = text.partition(":")
    if transport not in ("docker-archive", "oci-archive"):
        return text, ""
    file, _, name = rest.partition(":")
    if not file:
        raise InvalidRequest(f"'{text}' names no file", hint=f"{transport}:FILE")
    return f"{transport}:{name}", file


@contextmanager
def _readable(file: str) -> Iterator[BinaryIO | None]:
    """The archive to send, or None when there is none."""
    if file in ("", "-"):
        yield sys.stdin.buffer if file else None
        return
    try:
        source = open(file, "rb")  # noqa: SIM115
    except OSError as error:
        raise from_os_error("cannot read the archive", error) from error
    with source:
        yield source


@click.command("save", cls=DockerCommand)
@flags.option("-o", "--output", "file", metavar="FILE", help="Write to FILE instead of stdout.")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...", shell_complete=complete.images)
@pass_app
def save(app: App, images: tuple[str, ...], file: str | None) -> None:
    """Write images to an archive that ambi, docker and OCI tools load."""

    def saved() -> Any:
        with looked_up(app, images[0], image_names):
            return app.client.stream("GET", "/images/get", [("names", name) for name in images])

    write_to(file, "save", saved)


def write_to(file: str | None, verb: str, ask: Callable[[], Any]) -> None:
    """What `ask` answers, to `file`, which appears whole or not at all, or to stdout when it is None."""
    if file is None and sys.stdout.isatty():
        raise InvalidRequest(f"cowardly refusing to {verb} to a terminal", hint=f"ambi {verb} -o FILE NAME, or redirect")
    response = ask()
    if file is None:
        _copy(response, sys.stdout.buffer)
        sys.stdout.buffer.flush()
        return
    try:
        fd, beside = tempfile.mkstemp(dir=os.path.dirname(os.path.abspath(file)), prefix=f".{os.path.basename(file)}.")
    except OSError as error:
        raise from_os_error(f"cannot write {file}", error) from error
    try:
        with os.fdopen(fd, "wb") as target:
            _copy(response, target)
        os.chmod(beside, 0o666 & ~_umask())
        os.replace(beside, file)
    except BaseException as error:
        os.unlink(beside)
        if isinstance(error, OSError):
            raise from_os_error(f"cannot write {file}", error) from error
        raise


def _copy(response: Any, target: BinaryIO) -> None:
    sent = 0
    with Bar() as bar:
        for data in response.chunks():
            target.write(data)
            sent += len(data)
            bar.tell("Saving", sent)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@click.command("login", cls=DockerCommand)
@flags.option("-u", "--username", metavar="NAME", help="The user's name.")
@flags.option("-p", "--password", metavar="TEXT", help="The password or token; seen by everybody who lists processes.")
@flags.switch("--password-stdin", help="Read the password from stdin.")
@click.argument("server", required=False, default="", metavar="[HOST[:PORT]]")
@pass_app
def login(app: App, server: str, username: str | None, password: str | None, password_stdin: bool) -> None:
    """Log in at a registry, Docker Hub without a name."""
    key = credentials.key_of(server.removeprefix("https://").removeprefix("http://").rstrip("/"))
    if password_stdin:
        if password or not username:
            raise InvalidRequest(
                "--password-stdin goes with --username and without --password", hint="ambi login -u NAME --password-stdin"
            )
        password = sys.stdin.readline().rstrip("\r\n")
    elif password:
        warn("a password on the command line is insecure: use --password-stdin")
    if (not username or not password) and not sys.stdin.isatty():
        raise InvalidRequest("stdin is no terminal to ask at", hint="ambi login -u NAME --password-stdin")
    username = username or click.prompt("Username", err=True)
    password = password or click.prompt("Password", hide_input=True, err=True)
    body = {"username": username, "password": password, "serveraddress": key}
    answer = app.client.post("/auth", None, body)
    if warning := credentials.store(key, str(username), str(password)):
        warn(warning)
    click.echo(str((answer or {}).get("Status") or "Login Succeeded"))


@click.command("logout", cls=DockerCommand)
@click.argument("server", required=False, default="", metavar="[HOST[:PORT]]")
@pass_app
def logout(app: App, server: str) -> None:
    """Forget the log-in at a registry, Docker Hub without a name."""
    key = credentials.key_of(server.removeprefix("https://").removeprefix("http://").rstrip("/"))
    shown = server or "docker.io"
    click.echo(f"Removing login credentials for {shown}" if credentials.erase(key) else f"Not logged in to {shown}")
