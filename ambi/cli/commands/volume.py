"""`ambi volume ...`."""

from __future__ import annotations

from typing import Any

import click

from ambi.cli import complete, flags, mounts, pruning
from ambi.cli.app import App, DockerCommand, each, pass_app
from ambi.cli.commands.inspect import show
from ambi.cli.filters import filter_query
from ambi.cli.names import looked_up, on, volume_names
from ambi.cli.table import Columns
from ambi.cli.values import key_values
from ambi.client.client import path_of
from ambi.core.errors import InvalidRequest

LIST = Columns(
    {
        "Name": "VOLUME NAME",
        "Driver": "DRIVER",
        "Scope": "SCOPE",
        "Mountpoint": "MOUNTPOINT",
        "Labels": "LABELS",
        "Links": "LINKS",
        "Size": "SIZE",
    },
    ("Driver", "Name"),
    methods={"Label": lambda key: key},
)


@click.group("volume")
def volume() -> None:
    """Manage volumes."""


@volume.command("create", cls=DockerCommand)
@flags.option("-d", "--driver", default="local", metavar="DRIVER", help="There is one, `local`.")
@flags.many(
    "-o", "--opt", metavar="KEY=VALUE", help="type=none|tmpfs with o= and device=, or type=disk with size= for a VM."
)
@flags.many("--label", metavar="KEY[=VALUE]", help="Label the volume.")
@flags.option("--name", "named", metavar="NAME", help="Docker's old way to give the name.")
@click.argument("name", required=False, metavar="[VOLUME]")
@pass_app
def create(app: App, name: str | None, driver: str, opt: tuple[str, ...], label: tuple[str, ...], named: str | None) -> None:
    """Create a volume, and print its name.  [default: a random one]"""
    if name and named:
        raise InvalidRequest("--name and VOLUME exclude each other", hint="leave --name out")
    body = {
        "Name": name or named or "",
        "Driver": driver,
        "DriverOpts": key_values("--opt", (), opt),
        "Labels": key_values("--label", (), label),
    }
    click.echo(app.client.post("/volumes/create", None, body)["Name"])


@volume.command("ls", cls=DockerCommand)
@flags.filter_option("By name, driver, label or dangling.")
@flags.format_option()
@flags.switch("-q", "--quiet", help="Names only.")
@pass_app
def list_(app: App, filters: tuple[str, ...], template: str | None, quiet: bool) -> None:
    """List volumes."""
    found = app.client.get("/volumes", filter_query(filters))["Volumes"] or []
    if quiet and not template:
        click.echo("".join(f"{row['Name']}\n" for row in found), nl=False)
        return
    LIST.show([_row(row) for row in found], template)


def _row(found: dict[str, Any]) -> dict[str, object]:
    labels = found.get("Labels") or {}
    return {
        "Name": found["Name"],
        "Driver": found["Driver"],
        "Scope": found["Scope"],
        "Mountpoint": found["Mountpoint"],
        "Labels": ",".join(f"{key}={value}" for key, value in sorted(labels.items())),
        "Label": lambda key: labels.get(key, ""),
        "Links": "N/A",
        "Size": "N/A",
    }


@volume.command("inspect", cls=DockerCommand)
@flags.option("-f", "--format", "template", metavar="FORMAT", help="`json` or a Go template such as '{{.Mountpoint}}'.")
@click.argument("names", nargs=-1, required=True, metavar="VOLUME...", shell_complete=complete.volumes)
@pass_app
def inspect(app: App, names: tuple[str, ...], template: str | None) -> None:
    """Show everything about volumes."""
    show(names, template, on(app, volume_names)(lambda name: app.client.get(path_of("volumes", name))))


@volume.command("rm", cls=DockerCommand)
@flags.switch("-f", "--force", help="One that does not exist is no error.")
@click.argument("names", nargs=-1, required=True, metavar="VOLUME...", shell_complete=complete.volumes)
@pass_app
def remove(app: App, names: tuple[str, ...], force: bool) -> None:
    """Remove volumes that no instance uses, with what is in them."""

    @on(app, volume_names)
    def act(name: str) -> None:
        app.client.delete(path_of("volumes", name), {"force": "1"} if force else None)
        click.echo(name)

    each(names, act)


@volume.command("attach", cls=DockerCommand)
@click.argument("instance", metavar="INSTANCE", shell_complete=complete.running)
@click.argument("what", metavar="SOURCE:TARGET[:ro]")
@pass_app
def attach(app: App, instance: str, what: str) -> None:
    """Mount a volume or a path of the host in a running instance.

    It has it until it is detached or stops. SOURCE and what may follow TARGET are those of `run -v`.
    """
    anonymous: dict[str, object] = {}
    volumes = mounts.binds((what,), anonymous)
    if anonymous:
        raise InvalidRequest(
            f"'{what}' does not say where it goes", hint=f"as in ambi volume attach {instance} {what}:/data"
        )
    with looked_up(app, instance):
        app.client.post(path_of("ambi", "instances", instance, "mounts"), None, {"Volume": volumes[0]})


@volume.command("detach", cls=DockerCommand)
@flags.switch("-f", "--force", help="Also while it is in use: who uses it has it until he lets go; a disk is gone at once.")
@click.argument("instance", metavar="INSTANCE", shell_complete=complete.running)
@click.argument("target", metavar="TARGET")
@pass_app
def detach(app: App, instance: str, target: str, force: bool) -> None:
    """Take away what was attached at TARGET of a running instance."""
    with looked_up(app, instance):
        app.client.delete(
            path_of("ambi", "instances", instance, "mounts"), {"target": target} | ({"force": "1"} if force else {})
        )


@volume.command("prune", cls=DockerCommand)
@flags.switch("-a", "--all", "everything", help="Named volumes, too.")
@flags.switch("-f", "--force", help="Do not ask.")
@flags.prune_filter_option("By label.")
@pass_app
def prune(app: App, everything: bool, force: bool, filters: tuple[str, ...]) -> None:
    """Remove anonymous volumes that no instance uses."""
    if not force:
        which = "all" if everything else "anonymous"
        pruning.confirm(f"This will remove {which} local volumes not used by at least one container.")
    pruning.tell([pruning.volumes(app.client, filters, everything=everything)])
