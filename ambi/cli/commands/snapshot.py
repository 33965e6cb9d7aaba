"""`ambi snapshot ...`."""

from __future__ import annotations

from typing import Any

import click

from ambi.cli import complete, flags, humanize
from ambi.cli.app import App, DockerCommand, each, pass_app, waiting
from ambi.cli.names import looked_up
from ambi.cli.table import Columns
from ambi.client.client import path_of

LIST = Columns(
    {
        "Instance": "INSTANCE",
        "Name": "SNAPSHOT",
        "CreatedSince": "CREATED",
        "CreatedAt": "CREATED AT",
        "Size": "SIZE",
        "Memory": "MEMORY",
        "Parent": "PARENT",
        "StoodStill": "STOOD STILL",
        "Problem": "PROBLEM",
    },
    ("Instance", "Name", "CreatedSince", "Size", "Memory", "Parent", "Problem"),
)
_vm = click.argument("instance", metavar="VM", shell_complete=complete.instances)


@click.group("snapshot")
def snapshot() -> None:
    """Save virtual machines as they run, and have them go on from there."""


@snapshot.command("save", cls=DockerCommand)
@flags.switch("--stop", help="End the virtual machine with it: it does nothing that the snapshot does not know.")
@flags.switch("-q", "--quiet", help="Do not tell how long it takes.")
@click.argument("instance", metavar="VM", shell_complete=complete.running)
@click.argument("name", required=False, metavar="[NAME]")
@pass_app
def save(app: App, instance: str, name: str | None, stop: bool, quiet: bool) -> None:
    """Save a running virtual machine with its disks, and print the snapshot's name.  [default: the first free sN]"""
    with looked_up(app, instance):
        made = _waiting(
            app, quiet, f"saving {instance} ...", path_of("containers", instance, "checkpoints"),
            body={"CheckpointID": name or "", "Exit": stop},
        )  # fmt: skip
    click.echo(made["Name"])


def _waiting(app: App, quiet: bool, text: str, path: str, query: Any = None, body: Any = None) -> Any:
    if quiet:
        return app.client.post(path, query, body)
    with waiting(text):
        return app.client.post(path, query, body)


@snapshot.command("ls", cls=DockerCommand)
@flags.format_option()
@flags.switch("-q", "--quiet", help="Names only.")
@click.argument("instance", required=False, metavar="[VM]", shell_complete=complete.instances)
@pass_app
def list_(app: App, instance: str | None, template: str | None, quiet: bool) -> None:
    """List the snapshots of a virtual machine, or of all."""
    if instance is None:
        found = app.client.get("/ambi/snapshots")
    else:
        with looked_up(app, instance):
            rows = app.client.get(path_of("containers", instance, "checkpoints"))
        found = [{"InstanceName": instance, **row} for row in rows]
    if quiet and not template:
        click.echo("".join(f"{row['Name']}\n" for row in found), nl=False)
        return
    LIST.show([_row(row) for row in found], template)


def _row(found: dict[str, Any]) -> dict[str, object]:
    created = float(found["Created"])
    return {
        "Instance": found["InstanceName"],
        "Name": found["Name"],
        "CreatedSince": humanize.ago(created),
        "CreatedAt": humanize.local_time(created) if created else "N/A",
        "Size": humanize.size(found["Size"]),
        "Memory": humanize.binary_size(found["MemorySize"]),
        "Parent": found["Parent"],
        "StoodStill": f"{found['StoodStill'] / 1e6:.0f}ms",
        "Problem": found["Problem"],
    }


@snapshot.command("restore", cls=DockerCommand)
@flags.switch("-f", "--force", help="Kill it first when it runs; what it has done since the snapshot is lost.")
@flags.switch("-q", "--quiet", help="Do not tell how long it takes.")
@_vm
@click.argument("name", metavar="NAME", shell_complete=complete.snapshots)
@pass_app
def restore(app: App, instance: str, name: str, force: bool, quiet: bool) -> None:
    """Bring a virtual machine back to where it stood, with its disks, and let it go on."""
    query = {"checkpoint": name, **({"force": "1"} if force else {})}
    with looked_up(app, instance):
        _waiting(app, quiet, f"restoring {instance} ...", path_of("containers", instance, "start"), query)
    click.echo(instance)


@snapshot.command("rm", cls=DockerCommand)
@_vm
@click.argument("names", nargs=-1, required=True, metavar="NAME...", shell_complete=complete.snapshots)
@pass_app
def remove(app: App, instance: str, names: tuple[str, ...]) -> None:
    """Remove snapshots. One that later ones are a difference to stays until those are gone."""

    def act(name: str) -> None:
        with looked_up(app, instance):
            app.client.delete(path_of("containers", instance, "checkpoints", name))
        click.echo(name)

    each(names, act)
