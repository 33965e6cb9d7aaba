"""`ambi top`."""

from __future__ import annotations

import click

from ambi.cli import complete
from ambi.cli.app import App, DockerCommand, pass_app
from ambi.cli.names import looked_up
from ambi.cli.table import render
from ambi.client.client import path_of

MIN_WIDTH = 20  # docker's, for this table alone


@click.command("top", cls=DockerCommand, context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("instance", shell_complete=complete.running)
@click.argument("ps_options", nargs=-1, type=click.UNPROCESSED, metavar="[PS-OPTION...]")
@pass_app
def top(app: App, instance: str, ps_options: tuple[str, ...]) -> None:
    """List the processes of an instance.

    PS-OPTION is -ef (what is shown without), aux, or -o with a list of columns.
    """
    query = {"ps_args": " ".join(ps_options)} if ps_options else {}
    with looked_up(app, instance):
        found = app.client.get(path_of("containers", instance, "top"), query)
    click.echo(render([found["Titles"], *found["Processes"]], min_width=MIN_WIDTH), nl=False)
