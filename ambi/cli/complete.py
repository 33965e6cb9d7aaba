"""Completion of names, from a running engine. It never starts one, and a failure completes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import click

from ambi.core.errors import AmbiError

SECONDS = 2.0  # a completion that takes longer is worse than none


def _ask(ctx: click.Context, path: str, query: dict[str, str]) -> list[dict[str, Any]]:
    from ambi.cli.app import App
    from ambi.cli.main import roots_of

    app = ctx.find_object(App) or App(roots_of(**ctx.find_root().params))
    try:
        found = app.quiet_client(seconds=SECONDS).get(path, query)
    except (AmbiError, OSError):
        return []
    rows = found.get("Volumes") if isinstance(found, dict) else found
    return rows if isinstance(rows, list) else []


def _names(rows: Iterable[dict[str, Any]], incomplete: str) -> list[str]:
    """Names that go on with `incomplete`; short ids when none does."""
    ids, names = [], []
    for row in rows:
        names += [name.removeprefix("/") for name in row.get("Names") or ()]
        ids.append(str(row.get("Id"))[:12])
    matching = [name for name in names if name.startswith(incomplete)]
    return sorted(matching) or sorted(i for i in ids if incomplete and i.startswith(incomplete))


def instances(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    return _names(_ask(ctx, "/containers/json", {"all": "1"}), incomplete)


def running(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    return _names(_ask(ctx, "/containers/json", {}), incomplete)


def images(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    names = set()
    for row in _ask(ctx, "/images/json", {}):
        for name in row.get("RepoTags") or ():
            names.add(name)
            names.add(name.removesuffix(":latest"))
    return sorted(name for name in names if name.startswith(incomplete) and name != "<none>:<none>")


def volumes(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    return sorted(n for n in (str(row.get("Name")) for row in _ask(ctx, "/volumes", {})) if n.startswith(incomplete))


def networks(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    return sorted(n for n in (str(row.get("Name")) for row in _ask(ctx, "/networks", {})) if n.startswith(incomplete))


def snapshots(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Of the instance that was named before."""
    from ambi.client.client import path_of

    instance = ctx.params.get("instance")
    rows = _ask(ctx, path_of("containers", instance, "checkpoints"), {}) if instance else []
    return sorted(name for name in (str(row.get("Name")) for row in rows) if name.startswith(incomplete))


def either(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    return instances(ctx, parameter, incomplete) + images(ctx, parameter, incomplete)
