"""`ambi doctor`."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from ambi.cli import flags
from ambi.cli.app import App, DockerCommand, ExitWith, pass_app
from ambi.cli.output import CYAN, RED, YELLOW, one_line, paint

_GREEN = "32"
_COLOURS = {"ok": _GREEN, "warning": YELLOW, "problem": RED}


@click.command("doctor", cls=DockerCommand)
@flags.option(
    "--format", "form", type=click.Choice(["table", "json"]), default="table", help="How to print.  [default: table]"
)
@pass_app
def doctor(app: App, form: str) -> None:
    """Check what this host can do, with a fix for what it cannot.

    The exit status is 1 when there is a problem.
    """
    checks: list[dict[str, Any]] = app.client.get("/ambi/doctor")
    if form == "json":
        click.echo(json.dumps(checks, indent=2, ensure_ascii=False))
    else:
        click.echo(render(checks), nl=False)
    if any(check["status"] == "problem" for check in checks):
        raise ExitWith(1)


def render(checks: list[dict[str, Any]]) -> str:
    """A line a check, and the fix below those that have one."""
    width = max((len(check["name"]) for check in checks), default=0)
    lines = []
    for check in checks:
        status = paint(f"{check['status']:<8}", _COLOURS.get(check["status"], YELLOW), sys.stdout)
        lines.append(f"{status} {check['name']:<{width}}  {one_line(check['detail'])}")
        if check.get("hint"):
            lines.append(f"{'':<8} {'':<{width}}  {paint('fix', CYAN, sys.stdout)}: {one_line(check['hint'])}")
    return "".join(f"{line}\n" for line in lines)
