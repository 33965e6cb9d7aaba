"""`ambi system`: what takes space, and having it back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from ambi.cli import flags, humanize, pruning
from ambi.cli.app import App, DockerCommand, pass_app
from ambi.cli.table import Columns
from ambi.core.errors import InvalidRequest

USAGE = Columns(
    {"Type": "TYPE", "TotalCount": "TOTAL", "Active": "ACTIVE", "Size": "SIZE", "Reclaimable": "RECLAIMABLE"},
    ("Type", "TotalCount", "Active", "Size", "Reclaimable"),
)


@click.group("system")
def system() -> None:
    """Show what takes space, and free it."""


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


@system.command("prune", cls=DockerCommand)
@flags.switch("-a", "--all", "everything", help="Every image that no instance uses, not only those without a name.")
@flags.switch("--volumes", "with_volumes", help="Anonymous volumes that no instance uses, too.")
@flags.switch("-f", "--force", help="Do not ask.")
@flags.prune_filter_option("By label or until.")
@pass_app
def prune(app: App, everything: bool, with_volumes: bool, force: bool, filters: tuple[str, ...]) -> None:
    """Remove stopped instances, networks that none is on, and images that none uses."""
    if with_volumes and any(text.partition("=")[0].strip().lower() == "until" for text in filters):
        raise InvalidRequest('the "until" filter is not supported with --volumes', hint="ambi volume prune")
    if not force:
        pruning.confirm(_warning(everything, with_volumes, filters))
    pruning.tell(_prunes(app, everything, with_volumes, filters))


def _prunes(app: App, everything: bool, with_volumes: bool, filters: tuple[str, ...]) -> Iterator[pruning.Removed]:
    """In docker's order: what instances hold is free for the next."""
    yield pruning.instances(app.client, filters)
    yield pruning.networks(app.client, filters)
    if with_volumes:
        yield pruning.volumes(app.client, filters, everything=False)
    yield pruning.images(app.client, filters, everything=everything)


def _warning(everything: bool, with_volumes: bool, filters: tuple[str, ...]) -> str:
    """Docker's, without the build cache: there is none."""
    kinds = ["all stopped containers", "all networks not used by at least one container"]
    if with_volumes:
        kinds.append("all anonymous volumes not used by at least one container")
    kinds.append("all images without at least one container associated to them" if everything else "all dangling images")
    lines = ["This will remove:", *(f"  - {kind}" for kind in kinds), ""]
    if filters:
        lines += ["  Items to be pruned will be filtered with:", *(f"  - {text}" for text in sorted(filters)), ""]
    return "\n".join(lines)
