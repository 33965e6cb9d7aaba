"""Names that the user typed: what was probably meant when there is none like it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ambi.cli.app import App
from ambi.cli.output import nearest
from ambi.core.errors import AmbiError, CommandNotFound, NotFound

Names = Callable[[App], list[str]]


def instance_names(app: App) -> list[str]:
    rows = app.client.get("/containers/json", {"all": "1"})
    return [name.removeprefix("/") for row in rows for name in row.get("Names") or ()]


def image_names(app: App) -> list[str]:
    rows = app.client.get("/images/json")
    names = [name for row in rows for name in row.get("RepoTags") or ()]
    return names + [name.removesuffix(":latest") for name in names if name.endswith(":latest")]


def network_names(app: App) -> list[str]:
    return [str(row["Name"]) for row in app.client.get("/networks")]


def volume_names(app: App) -> list[str]:
    return [str(row["Name"]) for row in app.client.get("/volumes")["Volumes"] or []]


@contextmanager
def looked_up(app: App, name: str, names: Names = instance_names) -> Iterator[None]:
    """Within it, an error that `name` does not exist gets a hint: the name that is nearest, or how to list them."""
    try:
        yield
    except NotFound as error:
        if isinstance(error, CommandNotFound):
            raise
        raise _with_hint(app, error, name, names) from error


def _with_hint(app: App, error: NotFound, name: str, names: Names) -> NotFound:
    try:
        near = nearest(name, names(app))
    except AmbiError:
        near = ""
    listings: dict[Names, str] = {
        image_names: "ambi images",
        network_names: "ambi network ls",
        volume_names: "ambi volume ls",
    }
    listing = listings.get(names, "ambi ps --all")
    return NotFound(error.message, hint=f"did you mean {near}?" if near else error.hint or f"{listing} lists what there is")


def on(app: App, names: Names = instance_names) -> Callable[[Callable[[str], Any]], Callable[[str], Any]]:
    """Wraps an action on a name, for `each`, in `looked_up`."""

    def wrap(action: Callable[[str], Any]) -> Callable[[str], Any]:
        def act(name: str) -> Any:
            with looked_up(app, name, names):
                return action(name)

        return act

    return wrap
