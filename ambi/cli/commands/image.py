"""`ambi image ...`, and docker's short names for its commands."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import click

from ambi.cli import complete, flags, humanize, pruning
from ambi.cli.app import App, DockerCommand, ExitWith, each, pass_app
from ambi.cli.commands.inspect import show
from ambi.cli.commands.registry import copy, pull, push, save
from ambi.cli.filters import filter_query
from ambi.cli.names import image_names, looked_up, on
from ambi.cli.output import one_line
from ambi.cli.progress import Bar, follow
from ambi.cli.table import Columns
from ambi.cli.values import split_name
from ambi.client.client import path_of
from ambi.core.errors import AmbiError, Corrupt, InvalidRequest, Unsupported, from_os_error

NONE = "<none>"
CREATED_BY_WIDTH = 45
LIST = Columns(
    {
        "Repository": "REPOSITORY",
        "Tag": "TAG",
        "Digest": "DIGEST",
        "ID": "IMAGE ID",
        "CreatedSince": "CREATED",
        "CreatedAt": "CREATED AT",
        "Size": "SIZE",
    },
    ("Repository", "Tag", "ID", "CreatedSince", "Size"),
)
HISTORY = Columns(
    {
        "ID": "IMAGE",
        "CreatedSince": "CREATED",
        "CreatedAt": "CREATED AT",
        "CreatedBy": "CREATED BY",
        "Size": "SIZE",
        "Comment": "COMMENT",
    },
    ("ID", "CreatedSince", "CreatedBy", "Size", "Comment"),
)


@click.group("image")
def image() -> None:
    """Manage images."""


for command in (copy, pull, push, save):
    image.add_command(command)


@image.command("ls", cls=DockerCommand)
@flags.switch("-a", "--all", "everything", help="Docker's; no image is hidden here.")
@flags.switch("--digests", help="Show digests.")
@flags.filter_option("By reference, dangling, label, before, since or until.")
@flags.format_option()
@flags.switch("--no-trunc", help="Do not shorten anything.")
@flags.switch("-q", "--quiet", help="IDs only.")
@click.argument("repository", required=False, metavar="[REPOSITORY[:TAG]]", shell_complete=complete.images)
@pass_app
def list_(
    app: App,
    repository: str | None,
    everything: bool,
    digests: bool,
    filters: tuple[str, ...],
    template: str | None,
    no_trunc: bool,
    quiet: bool,
) -> None:
    """List images."""
    query = filter_query(filters, **({"reference": repository} if repository else {}))
    if everything:
        query["all"] = "1"
    found = app.client.get("/images/json", query)
    rows = [row for entry in found for row in _rows(entry, whole=no_trunc, digests=digests)]
    if quiet and not template:
        click.echo("".join(f"{row['ID']}\n" for row in rows), nl=False)
        return
    with_digest = ("Repository", "Tag", "Digest", "ID", "CreatedSince", "Size")
    LIST.show(rows, template, shown=with_digest if digests else None)


def _rows(entry: dict[str, Any], *, whole: bool, digests: bool) -> Iterator[dict[str, object]]:
    """A row for each name of an image of `/images/json`, one with `<none>` for an image without."""
    names = [name for name in entry.get("RepoTags") or () if name != f"{NONE}:{NONE}"]
    by_repository = dict(text.split("@", 1) for text in entry.get("RepoDigests") or () if "@" in text)
    for name in names or [f"{NONE}:{NONE}"]:
        repository, _, tag = name.rpartition(":")
        yield {
            "Repository": repository,
            "Tag": tag,
            "Digest": by_repository.get(repository, NONE),
            "ID": entry["Id"] if whole else entry["Id"].removeprefix("sha256:")[:12],
            "CreatedSince": humanize.ago(entry["Created"]),
            "CreatedAt": humanize.local_time(entry["Created"]),
            "Size": humanize.size(entry["Size"]),
        }


@image.command("import", cls=DockerCommand)
@flags.many(
    "-c", "--change", metavar="INSTRUCTION", help="A Dockerfile instruction: CMD, ENTRYPOINT, ENV, USER, WORKDIR, ..."
)
@flags.option("-m", "--message", metavar="TEXT", help="Comment of the image.")
@click.argument("file", metavar="FILE|-")
@click.argument("name", required=False, metavar="[NAME[:TAG]]")
@pass_app
def import_(app: App, file: str, name: str | None, change: tuple[str, ...], message: str | None) -> None:
    """Make an image of a root file system in a tar archive, plain, gzip or zstd."""
    query = {"fromSrc": "-"}
    if name:
        repository, tag = split_name(name)
        query["repo"] = repository
        query["tag"] = tag
    if message:
        query["message"] = message
    _send_archive(app, "/images/create", query, file, changes=change)


@image.command("load", cls=DockerCommand)
@flags.option("-i", "--input", "file", metavar="FILE", help="Read from FILE instead of stdin.")
@flags.switch("-q", "--quiet", help="Show no progress.")
@click.argument("archive", required=False, metavar="[FILE]")
@pass_app
def load(app: App, file: str | None, archive: str | None, quiet: bool) -> None:
    """Load images from an archive of `docker save` or an OCI layout."""
    if file and archive:
        raise InvalidRequest("--input and FILE exclude each other", hint="leave one of them out")
    source = file or archive or "-"
    if source == "-" and sys.stdin.isatty():
        raise InvalidRequest("there is nothing to load: stdin is a terminal", hint="ambi load -i FILE, or ambi load < FILE")
    _send_archive(app, "/images/load", {"quiet": "1"} if quiet else {}, source)


def _send_archive(app: App, path: str, query: dict[str, str], file: str, changes: tuple[str, ...] = ()) -> None:
    """Upload `file` and print the results of the work."""
    more = [("changes", change) for change in changes]
    with _opened(file) as (source, total), _named(file), Bar() as bar:
        response = app.client.upload(
            path, [*query.items(), *more], source, lambda sent: bar.tell(f"Sending {_shown(file)}", sent, total)
        )
        results = list(follow(response, bar))
    for entry in results:
        click.echo(str(entry.get("stream") or entry.get("status") or "").rstrip("\n"))


@contextmanager
def _named(file: str) -> Iterator[None]:
    """Within it, what the engine says of an archive, which it knows as a stream, is said of `file`."""
    try:
        yield
    except AmbiError as error:
        if file != "-" and isinstance(error, (Corrupt, InvalidRequest, Unsupported)) and "archive" in error.message:
            error.message = f"{error.message}: {file}"
            error.hint = error.hint and error.hint.replace("FILE", file)
        raise


def _shown(file: str) -> str:
    return "stdin" if file == "-" else os.path.basename(file)


@contextmanager
def _opened(file: str) -> Iterator[tuple[BinaryIO, int]]:
    """The archive, and its size in bytes (0 when it is not known)."""
    if file == "-":
        yield sys.stdin.buffer, 0
        return
    try:
        source = open(file, "rb")  # noqa: SIM115
        status = os.fstat(source.fileno())
    except OSError as error:
        raise from_os_error("cannot read the archive", error) from error
    with source:
        yield source, status.st_size if stat.S_ISREG(status.st_mode) else 0


@image.command("bootstrap", cls=DockerCommand)
@flags.many("--package", "packages", metavar="NAME", help="One more package in the image.")
@click.argument("suite", metavar="[debian:|ubuntu:]SUITE")
@click.argument("name", required=False, metavar="[NAME[:TAG]]")
@pass_app
def bootstrap(app: App, suite: str, name: str | None, packages: tuple[str, ...]) -> None:
    """Make an image of a Debian or Ubuntu release, as debian:bookworm, from its packages."""
    if suite.rpartition(":")[0] not in ("", "debian", "ubuntu"):
        raise InvalidRequest(
            f"cannot bootstrap '{suite}': only Debian's and Ubuntu's releases can be",
            hint="ambi image bootstrap debian:bookworm",
        )
    query = {"suite": suite, "name": name or ""}
    if packages:
        query["packages"] = ",".join(packages)
    with Bar() as bar:
        results = list(follow(app.client.stream("POST", "/ambi/images/bootstrap", query), bar))
    for entry in results:
        click.echo(str(entry.get("status") or "").rstrip("\n"))


@image.command("tag", cls=DockerCommand)
@click.argument("image", metavar="IMAGE", shell_complete=complete.images)
@click.argument("name", metavar="NAME[:TAG]")
@pass_app
def tag(app: App, image: str, name: str) -> None:
    """Give an image one more name."""
    repository, version = split_name(name)
    with looked_up(app, image, image_names):
        app.client.post(path_of("images", image, "tag"), {"repo": repository, "tag": version or "latest"})


@image.command("rm", cls=DockerCommand)
@flags.switch("-f", "--force", help="Also when several names or stopped instances use it.")
@flags.switch("--no-prune", help="Keep what only this image needed.")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...", shell_complete=complete.images)
@pass_app
def remove(app: App, images: tuple[str, ...], force: bool, no_prune: bool) -> None:
    """Remove images."""
    query = {name: "1" for name, wanted in (("force", force), ("noprune", no_prune)) if wanted}

    @on(app, image_names)
    def drop(name: str) -> None:
        for entry in app.client.delete(path_of("images", name), query) or ():
            word, what = next(iter(entry.items()))
            click.echo(f"{word}: {what}")

    each(images, drop)


@image.command("prune", cls=DockerCommand)
@flags.switch("-a", "--all", "everything", help="Also those that have a name, when no instance uses them.")
@flags.switch("-f", "--force", help="Do not ask.")
@flags.prune_filter_option("By label or until.")
@pass_app
def prune(app: App, everything: bool, filters: tuple[str, ...], force: bool) -> None:
    """Remove images without a name that no instance uses."""
    if not force:
        which = "images without at least one container associated to them" if everything else "dangling images"
        pruning.confirm(f"This will remove all {which}.")
    pruning.tell([pruning.images(app.client, filters, everything=everything)])


@image.command("verify", cls=DockerCommand)
@flags.switch("--repair", help="Make damaged layers again, and get damaged blobs again from their registry.")
@pass_app
def verify(app: App, repair: bool) -> None:
    """Check every blob and every layer of the store, byte by byte.

    The exit status is 1 when something is damaged and stays so.
    """
    damaged = 0
    with Bar() as bar:
        found = list(follow(app.client.stream("POST", "/ambi/images/verify", {"repair": "1"} if repair else None), bar))
    for it in (entry["finding"] for entry in found):
        click.echo(one_line(f"{it['kind']} {it['name']}: {it['problem']} (needed by {', '.join(it['images'])})"))
        damaged += not it["repaired"]
        click.echo(one_line(f"  {it['repaired'] or 'hint: ' + it['hint']}"))
    if not found:
        click.echo("everything is as it should be")
    if damaged:
        raise ExitWith(1)


class _Inspect(DockerCommand):
    """`--sbom` may stand alone; click would take the image for its value."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, ["--sbom=spdx" if arg == "--sbom" else arg for arg in args])


@image.command("inspect", cls=_Inspect)
@flags.option("-f", "--format", "template", metavar="FORMAT", help="`json` or a Go template such as '{{.Id}}'.")
@flags.option("--sbom", metavar="[=spdx|cyclonedx]", help="What packages the one image has, as SPDX or CycloneDX JSON.")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...", shell_complete=complete.images)
@pass_app
def inspect(app: App, images: tuple[str, ...], template: str | None, sbom: str | None) -> None:
    """Show everything about images."""
    if sbom is not None:
        if len(images) > 1 or template is not None:
            raise InvalidRequest("--sbom is of one image, without --format", hint=f"ambi image inspect --sbom {images[0]}")
        with looked_up(app, images[0], image_names):
            response = app.client.stream("GET", "/ambi/images/sbom", {"name": images[0], "format": sbom})
        for data in response.chunks():
            sys.stdout.buffer.write(data)
        sys.stdout.buffer.write(b"\n")
        return
    show(images, template, on(app, image_names)(lambda name: app.client.get(path_of("images", name, "json"))))


@image.command("history", cls=DockerCommand)
@flags.format_option()
@flags.switch("-H", "--human", default=True, help="Sizes and times for people; --human=false for programs.  [default: true]")
@flags.switch("--no-trunc", help="Do not shorten anything.")
@flags.switch("-q", "--quiet", help="IDs only.")
@click.argument("image", metavar="IMAGE", shell_complete=complete.images)
@pass_app
def history(app: App, image: str, template: str | None, human: bool, no_trunc: bool, quiet: bool) -> None:
    """Show how an image was made."""
    with looked_up(app, image, image_names):
        found = app.client.get(path_of("images", image, "history"))
    rows = [_step(entry, human=human, whole=no_trunc) for entry in found]
    if quiet and not template:
        click.echo("".join(f"{row['ID']}\n" for row in rows), nl=False)
        return
    plain = ("ID", "CreatedAt", "CreatedBy", "Size", "Comment")
    HISTORY.show(rows, template, shown=None if human else plain)


def _step(entry: dict[str, Any], *, human: bool, whole: bool) -> dict[str, object]:
    created_by = str(entry["CreatedBy"]).replace("\t", " ")
    at = humanize.rfc3339(entry["Created"])
    return {
        "ID": entry["Id"] if whole else entry["Id"].removeprefix("sha256:")[:12],
        "CreatedSince": humanize.ago(entry["Created"]) if human else at,
        "CreatedAt": at,
        "CreatedBy": created_by if whole else humanize.shorten(created_by, CREATED_BY_WIDTH),
        "Size": humanize.size(entry["Size"]) if human else entry["Size"],
        "Comment": entry["Comment"],
    }
