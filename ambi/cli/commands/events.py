"""`ambi events`."""

from __future__ import annotations

import json
import time
from typing import Any

import click

from ambi.cli import flags, humanize
from ambi.cli.app import App, DockerCommand, pass_app
from ambi.cli.filters import filter_query
from ambi.cli.template import Template
from ambi.core import words


@click.command("events", cls=DockerCommand)
@flags.filter_option("By type, event, container, image or label.")
@flags.format_option("`json` or a Go template such as '{{.Type}} {{.Action}}'.")
@flags.option("--since", metavar="TIME", help="From then on: 42m (ago), 2026-01-02T13:23:37Z or seconds since 1970.")
@flags.option("--until", metavar="TIME", help="End then.")
@pass_app
def events(app: App, filters: tuple[str, ...], template: str | None, since: str | None, until: str | None) -> None:
    """Show what happens, as it happens."""
    compiled = Template(template) if template and template != "json" else None
    query = filter_query(filters)
    for name, text in (("since", since), ("until", until)):
        if text:
            query[name] = words.parse_time(f"--{name}", text)
    for line in app.client.stream("GET", "/events", query).lines():
        event = json.loads(line)
        if compiled is not None:
            click.echo(compiled.render(event))
        elif template == "json":
            click.echo(json.dumps(event, separators=(",", ":"), ensure_ascii=False))
        else:
            click.echo(_line(event))


def _line(event: dict[str, Any]) -> str:
    """`2026-11-24T11:40:36.123456789Z container start ID (image=..., name=...)`, as docker prints it."""
    seconds, nanoseconds = divmod(event["timeNano"], 1_000_000_000)
    local = time.localtime(seconds)
    at = f"{time.strftime('%Y-%m-%dT%H:%M:%S', local)}.{nanoseconds:09}{humanize.zone_of(local)}"
    attributes = ", ".join(f"{key}={value}" for key, value in sorted((event["Actor"]["Attributes"] or {}).items()))
    tail = f" ({attributes})" if attributes else ""
    return f"{at} {event['Type']} {event['Action']} {event['Actor']['ID']}{tail}"
