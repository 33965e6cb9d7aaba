"""`ambi pause`, `unpause`, `update`."""

from __future__ import annotations

from typing import Any

import click

from ambi.cli import complete, flags
from ambi.cli.app import App, DockerCommand, each, pass_app
from ambi.cli.names import on
from ambi.cli.output import warn
from ambi.client.client import path_of
from ambi.core.errors import InvalidRequest

several = click.argument("instances", nargs=-1, required=True, metavar="INSTANCE...", shell_complete=complete.running)


@click.command("pause", cls=DockerCommand)
@several
@pass_app
def pause(app: App, instances: tuple[str, ...]) -> None:
    """Have everything in running instances stand still."""
    _each(app, "pause", instances)


@click.command("unpause", cls=DockerCommand)
@several
@pass_app
def unpause(app: App, instances: tuple[str, ...]) -> None:
    """Let paused instances go on."""
    _each(app, "unpause", instances)


def _each(app: App, verb: str, instances: tuple[str, ...]) -> None:
    @on(app)
    def ask(name: str) -> None:
        app.client.post(path_of("containers", name, verb))
        click.echo(name)

    each(instances, ask)


@click.command("update", cls=DockerCommand)
@flags.limit_options
@click.argument("instances", nargs=-1, required=True, metavar="INSTANCE...", shell_complete=complete.instances)
@pass_app
def update(app: App, /, instances: tuple[str, ...], **given: Any) -> None:
    """Change the limits and the restart policy of instances, running or not."""
    from ambi.cli.request import changes_of

    body = changes_of(given)
    if not body:
        raise InvalidRequest("no change is asked for", hint="ambi update --help")

    @on(app)
    def change(name: str) -> None:
        for text in app.client.post(path_of("containers", name, "update"), None, body).get("Warnings") or ():
            warn(text)
        click.echo(name)

    each(instances, change)
