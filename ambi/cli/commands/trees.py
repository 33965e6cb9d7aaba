"""What an instance has changed: `ambi diff`, `ambi export`, `ambi commit`."""

from __future__ import annotations

import click

from ambi.cli import complete, flags
from ambi.cli.app import App, DockerCommand, pass_app
from ambi.cli.commands.registry import write_to
from ambi.cli.names import looked_up
from ambi.cli.values import split_name
from ambi.client.client import path_of

KINDS = "CAD"  # of the API's numbers


@click.command("diff", cls=DockerCommand)
@click.argument("instance", shell_complete=complete.instances)
@pass_app
def diff(app: App, instance: str) -> None:
    """Show what an instance has added (A), changed (C) and deleted (D) in its image's files."""
    with looked_up(app, instance):
        found = app.client.get(path_of("containers", instance, "changes")) or []
    click.echo("".join(f"{KINDS[change['Kind']]} {change['Path']}\n" for change in found), nl=False)


@click.command("export", cls=DockerCommand)
@flags.option("-o", "--output", "file", metavar="FILE", help="Write to FILE instead of stdout.")
@click.argument("instance", shell_complete=complete.instances)
@pass_app
def export(app: App, instance: str, file: str | None) -> None:
    """Write the whole root file system of an instance as a tar archive, without what is mounted in it."""
    write_to(file, "export", lambda: _exported(app, instance))


def _exported(app: App, instance: str) -> object:
    with looked_up(app, instance):
        return app.client.stream("GET", path_of("containers", instance, "export"))


@click.command("commit", cls=DockerCommand)
@flags.option("-a", "--author", metavar="TEXT", help="Author, as 'Jane Doe <jane@example.org>'.")
@flags.many("-c", "--change", metavar="INSTRUCTION", help="A Dockerfile instruction: CMD, ENTRYPOINT, ENV, USER, ...")
@flags.option("-m", "--message", metavar="TEXT", help="Comment of the image.")
@flags.switch("-p", "--pause", default=True, help="Let the instance stand still meanwhile.  [default: true]")
@click.argument("instance", shell_complete=complete.instances)
@click.argument("name", required=False, metavar="[NAME[:TAG]]")
@pass_app
def commit(
    app: App, instance: str, name: str | None, author: str | None, change: tuple[str, ...], message: str | None, pause: bool
) -> None:
    """Make an image of what an instance has changed in its own image."""
    repository, tag = split_name(name) if name else ("", "")
    query = [("container", instance), ("repo", repository), ("tag", tag), ("pause", "1" if pause else "0")]
    query += [("author", author or ""), ("comment", message or "")]
    query += [("changes", text) for text in change]
    with looked_up(app, instance):
        click.echo(app.client.post("/commit", query)["Id"])
