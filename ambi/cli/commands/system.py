"""`ambi system df`: what takes space."""

from __future__ import annotations

from typing import Any

import click

from ambi.cli import flags, humanize
from ambi.cli.app import App, DockerCommand, pass_app
from ambi.cli.table import Columns

USAGE = Columns(
    {"Type": "TYPE", "TotalCount": "TOTAL", "Active": "ACTIVE", "Size": "SIZE", "Reclaimable": "RECLAIMABLE"},
    ("Type", "TotalCount", "Active", "Size", "Reclaimable"),
)


@click.group("system")
def system() -> None:
    """Show what takes space."""


@system.command("df", cls=DockerCommand)
@flags.format_option()
@pass_app
def df(app: App, template: str | None) -> None:
    """Show how much images, instances and volumes take, and what of it can be freed.

    A layer that several images share is counted once, and is reclaimable when no instance needs it.
    """
    found = app.client.get("/system/df")
    USAGE.show([_images(found), _instances(found), _volumes(found)], template)


def _images(found: dict[str, Any]) -> dict[str, object]:
    used = [image for image in found["Images"] if image["Containers"] > 0]
    return _row("Images", len(found["Images"]), len(used), found["LayersSize"], found["LayersReclaimable"])


def _instances(found: dict[str, Any]) -> dict[str, object]:
    every = found["Containers"] or ()
    active = [it for it in every if it["State"] in ("running", "paused", "restarting")]
    size = sum(it.get("SizeRw") or 0 for it in every)
    return _row("Instances", len(every), len(active), size, size - sum(it.get("SizeRw") or 0 for it in active))


def _volumes(found: dict[str, Any]) -> dict[str, object]:
    usage = [it.get("UsageData") or {} for it in found["Volumes"] or ()]
    sizes = [(max(0, it.get("Size", 0)), it.get("RefCount", 0) > 0) for it in usage]
    free = sum(size for size, used in sizes if not used)
    return _row("Volumes", len(sizes), sum(used for _, used in sizes), sum(size for size, _ in sizes), free)


def _row(kind: str, total: int, active: int, size: int, free: int) -> dict[str, object]:
    share = f" ({100 * free // size}%)" if size else ""
    return {
        "Type": kind,
        "TotalCount": str(total),
        "Active": str(active),
        "Size": humanize.size(size),
        "Reclaimable": humanize.size(free) + share,
    }
