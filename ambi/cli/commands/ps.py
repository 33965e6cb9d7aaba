"""`ambi ps`."""

from __future__ import annotations

from typing import Any

import click

from ambi.cli import flags, humanize
from ambi.cli.app import App, DockerCommand, pass_app
from ambi.cli.filters import filter_query
from ambi.cli.table import Columns

COMMAND_WIDTH = 20
COLUMNS = Columns(
    {
        "ID": "CONTAINER ID",
        "Image": "IMAGE",
        "Command": "COMMAND",
        "CreatedAt": "CREATED AT",
        "RunningFor": "CREATED",
        "Status": "STATUS",
        "State": "STATE",
        "Isolation": "ISOLATION",
        "Ports": "PORTS",
        "Names": "NAMES",
        "Labels": "LABELS",
        "Mounts": "MOUNTS",
        "Networks": "NETWORKS",
    },
    ("ID", "Image", "Command", "RunningFor", "Status", "Ports", "Names", "Isolation"),
    methods={"Label": lambda key: key},
)


@click.command("ps", cls=DockerCommand)
@flags.switch("-a", "--all", "everything", help="Also those that do not run.")
@flags.filter_option("By id, name, status, label, ancestor, exited, before or since.")
@flags.format_option()
@flags.option("-n", "--last", type=int, metavar="NUMBER", help="The last ones created, in any state.")
@flags.switch("-l", "--latest", help="The last one created, in any state.")
@flags.switch("--no-trunc", help="Do not shorten anything.")
@flags.switch("-q", "--quiet", help="IDs only.")
@pass_app
def ps(
    app: App,
    everything: bool,
    filters: tuple[str, ...],
    template: str | None,
    last: int | None,
    latest: bool,
    no_trunc: bool,
    quiet: bool,
) -> None:
    """List instances."""
    query = filter_query(filters)
    last = 1 if latest else last
    if last is not None and last > 0:
        query["limit"] = str(last)
    if everything or (last is not None and last > 0):
        query["all"] = "1"
    rows = app.client.get("/containers/json", query)
    if quiet and not template:
        for row in rows:
            click.echo(row["Id"] if no_trunc else row["Id"][:12])
        return
    COLUMNS.show([_row(row, whole=no_trunc) for row in rows], template)


def _row(row: dict[str, Any], *, whole: bool) -> dict[str, object]:
    """Placeholder to text for one instance of `/containers/json`."""
    command = row["Command"] if whole else humanize.shorten(row["Command"], COMMAND_WIDTH)
    image, labels = row["Image"], row.get("Labels") or {}
    if image.startswith("sha256:") and not whole:
        image = image[7:19]
    return {
        "ID": row["Id"] if whole else row["Id"][:12],
        "Image": image or "<no image>",
        "Command": humanize.quoted(command),
        "CreatedAt": humanize.local_time(row["Created"]),
        "RunningFor": humanize.ago(row["Created"]),
        "Status": row["Status"],
        "State": row["State"],
        "Isolation": row.get("Isolation", ""),
        "Ports": ", ".join(sorted(_port(port) for port in row.get("Ports") or ())),
        "Names": ",".join(name.removeprefix("/") for name in row.get("Names") or ()),
        "Labels": ",".join(f"{key}={value}" for key, value in sorted(labels.items())),
        "Label": lambda key: labels.get(key, ""),
        "Mounts": ",".join(mount.get("Name") or mount.get("Source", "") for mount in row.get("Mounts") or ()),
        "Networks": ",".join(sorted((row.get("NetworkSettings") or {}).get("Networks") or {})),
    }


def _port(port: dict[str, Any]) -> str:
    inside = f"{port['PrivatePort']}/{port['Type']}"
    if not port.get("PublicPort"):
        return inside
    ip = str(port.get("IP", ""))
    return f"{f'[{ip}]' if ':' in ip else ip}:{port['PublicPort']}->{inside}"
