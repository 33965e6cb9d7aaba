"""What the prune commands share: docker's question before, and docker's report of what is gone.

A prune is one POST each. Its answer names what was removed and how many bytes that freed; networks free none.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import click

from ambi.cli import humanize
from ambi.cli.app import ExitWith
from ambi.cli.filters import filter_query
from ambi.client.client import Client
from ambi.core.errors import InvalidRequest

SURE = "Are you sure you want to continue?"


class Removed(NamedTuple):
    """What one prune has removed: the lines that tell it, and the bytes freed."""

    lines: tuple[str, ...] = ()
    freed_bytes: int = 0


def confirm(warning: str) -> None:
    """Ask on stdout and read a line of stdin, which need not be a terminal: `yes | ambi system prune` works.

    Raises ExitWith(0) for any answer but `y`, as docker does, and InvalidRequest where nobody answers.
    """
    click.echo(f"WARNING! {warning}\n{SURE} [y/N] ", nl=False)
    sys.stdout.flush()
    answer = sys.stdin.readline()
    if not answer:
        click.echo()
        path = click.get_current_context().command_path
        raise InvalidRequest("stdin ended before an answer; nothing was removed", hint=f"{path} --force does not ask")
    if answer.strip().lower() != "y":
        raise ExitWith(0)


def instances(client: Client, filters: Sequence[str]) -> Removed:
    answer = client.post("/containers/prune", filter_query(filters))
    return _removed("Deleted Containers:", answer["ContainersDeleted"] or (), answer["SpaceReclaimed"])


def networks(client: Client, filters: Sequence[str]) -> Removed:
    answer = client.post("/networks/prune", filter_query(filters))
    return _removed("Deleted Networks:", answer["NetworksDeleted"] or (), 0)


def volumes(client: Client, filters: Sequence[str], *, everything: bool) -> Removed:
    """Anonymous ones, or also named ones."""
    answer = client.post("/volumes/prune", filter_query((*filters, "all=true") if everything else filters))
    return _removed("Deleted Volumes:", answer["VolumesDeleted"] or (), answer["SpaceReclaimed"])


def images(client: Client, filters: Sequence[str], *, everything: bool) -> Removed:
    """Those without a name, or every one that no instance uses."""
    answer = client.post("/images/prune", filter_query(filters, dangling="false" if everything else "true"))
    entries = answer.get("ImagesDeleted") or ()
    lines = [f"{word.lower()}: {what}" for entry in entries for word, what in entry.items()]
    return _removed("Deleted Images:", lines, answer.get("SpaceReclaimed") or 0)


def _removed(title: str, names: Sequence[str], freed_bytes: int) -> Removed:
    return Removed((title, *names, "") if names else (), freed_bytes)


def tell(removed: Iterable[Removed], *, total: bool = True) -> None:
    """Print what is gone, part by part as it goes, and the sum of what that freed."""
    freed_bytes = 0
    for part in removed:
        click.echo("".join(f"{line}\n" for line in part.lines), nl=False)
        freed_bytes += part.freed_bytes
    if total:
        click.echo(f"Total reclaimed space: {humanize.size(freed_bytes, digits=4)}")
