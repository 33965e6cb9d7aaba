"""`ambi inspect`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from ambi.cli import complete, flags
from ambi.cli.app import App, DockerCommand, ExitWith, pass_app
from ambi.cli.names import image_names, instance_names, network_names, volume_names
from ambi.cli.output import nearest, print_error
from ambi.cli.template import Template
from ambi.client.client import path_of
from ambi.core.errors import AmbiError, NotFound

KINDS = {"container": "containers", "image": "images", "network": "networks", "volume": "volumes"}


@click.command("inspect", cls=DockerCommand)
@flags.option("-f", "--format", "template", metavar="FORMAT", help="`json` or a Go template such as '{{.State.Status}}'.")
@flags.option("--type", "kind", type=click.Choice(sorted(KINDS)), help="Look among these only.")
@click.argument("names", nargs=-1, required=True, metavar="NAME...", shell_complete=complete.either)
@pass_app
def inspect(app: App, names: tuple[str, ...], template: str | None, kind: str | None) -> None:
    """Show everything about instances, images, networks or volumes."""
    show(names, template, lambda name: _find(app, name, kind))


def show(names: tuple[str, ...], template: str | None, find: Callable[[str], Any]) -> None:
    """Print what `find` returns for each name, also after one was not found, as --format asks."""
    import json

    compiled = Template(template) if template and template != "json" else None
    found, status = [], 0
    for name in names:
        try:
            value = find(name)
            found.append(value if compiled is None else compiled.render(value))
        except AmbiError as error:
            print_error(error)
            status = error.exit_status
    if compiled is not None:
        click.echo("".join(f"{text}\n" for text in found), nl=False)
    elif template == "json":
        click.echo("".join(json.dumps(value, separators=(",", ":"), ensure_ascii=False) + "\n" for value in found), nl=False)
    else:
        click.echo(json.dumps(found, indent=4, ensure_ascii=False))
    if status:
        raise ExitWith(status)


def _find(app: App, name: str, kind: str | None) -> Any:
    for word in [kind] if kind else KINDS:
        try:
            path = path_of(KINDS[word], name, *(() if word in ("network", "volume") else ("json",)))
            return app.client.get(path, {"machine": "1"} if word == "container" else None)
        except NotFound:
            continue
    what = kind or "container, image, network or volume"
    lists = {"container": instance_names, "image": image_names, "network": network_names, "volume": volume_names}
    near = nearest(name, [n for word, names in lists.items() if kind in (None, word) for n in names(app)])
    hint = (
        f"did you mean {near}?"
        if near
        else "`ambi ps --all`, `ambi images`, `ambi network ls` and `ambi volume ls` list what there is"
    )
    raise NotFound(f"No such {what}: {name}", hint=hint)
