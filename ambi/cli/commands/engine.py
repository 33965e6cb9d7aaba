"""`ambi engine`: start, stop, status, run."""

from __future__ import annotations

import json
import os
import time

import click

from ambi.cli import flags
from ambi.cli.app import App, DockerCommand, ExitWith, pass_app
from ambi.cli.output import print_error
from ambi.client import starter
from ambi.core.errors import AmbiError, DeadlineExceeded, Unavailable
from ambi.core.roots import DEFAULT_SOCKET, Roots

STOP_SECONDS = 30.0
POLL_SECONDS = 0.05


@click.group("engine", invoke_without_command=True)
@flags.option("--data-root", metavar="DIR", help="Where it keeps its data, as the option of `ambi`.")
@flags.option("--run-root", metavar="DIR", help="Where it keeps what a boot forgets, as the option of `ambi`.")
@flags.option("--socket", metavar="PATH", help="Where it listens, as the option of `ambi`.")
@click.pass_context
def engine(ctx: click.Context, /, **named: str | None) -> None:
    """Run, start, stop and look at the engine.

    Without a command it runs in the foreground. Other commands start it when they need it. Stopping it stops no instance.
    """
    if any(named.values()):
        ctx.obj = App(_roots(ctx.find_object(App) or App(Roots()), **named))
    if ctx.invoked_subcommand is None:
        ctx.invoke(run)


def _roots(app: App, data_root: str | None, run_root: str | None, socket: str | None) -> Roots:
    """The places of `app` with those that were named after `engine`; a run root that is named brings its socket along."""
    if run_root and not socket:
        socket = os.path.join(run_root, DEFAULT_SOCKET.name)
    socket = (socket or str(app.roots.socket)).removeprefix("unix://")
    return Roots.of(data_root or app.roots.data, run_root or app.roots.run, socket)


@engine.command("start", cls=DockerCommand)
@pass_app
def start(app: App) -> None:
    """Start the engine in the background, when it does not run yet."""
    if starter.listens(app.roots):
        click.echo(f"the engine runs already, at {app.roots.socket}")
        return
    starter.start(app.roots, lambda text: click.echo(text, err=True))
    click.echo(f"the engine runs, at {app.roots.socket}")


@engine.command("stop", cls=DockerCommand)
@pass_app
def stop(app: App) -> None:
    """Stop the engine. Instances run on, and the next command starts it again."""
    client = app.quiet_client()
    try:
        pid = int(client.get("/ambi/engine")["pid"])
        client.post("/ambi/engine/stop")
    except Unavailable as error:
        if starter.listens(app.roots):
            raise
        click.echo(f"the engine does not run: {error.message}")
        return
    finally:
        client.close()
    end = time.monotonic() + STOP_SECONDS
    while _alive(pid):
        if time.monotonic() > end:
            hint = f"see {app.roots.data}/engine.log"
            raise DeadlineExceeded(f"the engine (pid {pid}) has not ended after {STOP_SECONDS:.0f} s", hint=hint)
        time.sleep(POLL_SECONDS)
    click.echo("the engine has ended")


def _alive(pid: int) -> bool:
    """Whether process `pid` is there and no zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return not file.read().rpartition(b") ")[2].startswith((b"Z", b"X"))
    except OSError:
        return False


@engine.command("status", cls=DockerCommand)
@flags.option(
    "--format", "form", type=click.Choice(["table", "json"]), default="table", help="How to print.  [default: table]"
)
@pass_app
def status(app: App, form: str) -> None:
    """Show whether the engine runs, since when and where. The exit status is 3 when it does not run."""
    try:
        found = app.quiet_client().get("/ambi/engine")
    except AmbiError as error:
        print_error(error)
        raise ExitWith(3) from error
    if form == "json":
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    click.echo("".join(f"{name.replace('_', ' ') + ':':<20} {value}\n" for name, value in found.items()), nl=False)


@engine.command("run", cls=DockerCommand)
@pass_app
def run(app: App) -> None:
    """Run the engine in the foreground, until it is interrupted."""
    argv = starter.engine_argv(app.roots)
    os.execv(argv[0], argv)
