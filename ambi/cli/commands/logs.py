"""`ambi logs`."""

from __future__ import annotations

import click

from ambi.cli import complete, flags
from ambi.cli.app import App, DockerCommand, pass_app
from ambi.cli.names import looked_up
from ambi.client.client import path_of
from ambi.client.stream import STDOUT, Frames, write_all
from ambi.core import words
from ambi.core.errors import InvalidRequest


@click.command("logs", cls=DockerCommand)
@flags.switch("--details", help="Show the attributes that --log-opt added.")
@flags.switch("-f", "--follow", help="Go on until the instance stops.")
@flags.option("--since", metavar="TIME", help="From then on: 42m (ago), 2026-01-02T13:23:37Z or seconds since 1970.")
@flags.option("--until", metavar="TIME", help="Up to then.")
@flags.option("-n", "--tail", default="all", metavar="LINES", help="Only the last lines.  [default: all]")
@flags.switch("-t", "--timestamps", help="Show when each line was printed.")
@click.argument("instance", shell_complete=complete.instances)
@pass_app
def logs(
    app: App,
    instance: str,
    details: bool,
    follow: bool,
    since: str | None,
    until: str | None,
    tail: str,
    timestamps: bool,
) -> None:
    """Show what an instance has printed."""
    if tail != "all" and not tail.removeprefix("-").isdigit():
        raise InvalidRequest(f"invalid value for --tail: '{tail}' is no number of lines", hint="as in --tail 20")
    query = {"stdout": "1", "stderr": "1", "tail": tail}
    query.update({name: "1" for name, on in (("follow", follow), ("timestamps", timestamps), ("details", details)) if on})
    for name, text in (("since", since), ("until", until)):
        if text:
            query[name] = words.parse_time(f"--{name}", text)
    with looked_up(app, instance):
        state = app.client.get(path_of("containers", instance, "json"))
        response = app.client.stream("GET", path_of("containers", state["Id"], "logs"), query)
    frames = None if state["Config"]["Tty"] else Frames()
    for chunk in response.chunks():
        for stream, data in frames.feed(chunk) if frames else ((STDOUT, chunk),):
            write_all(stream, data)
