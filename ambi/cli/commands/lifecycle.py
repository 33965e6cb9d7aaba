"""`ambi start`, `stop`, `restart`, `kill`, `wait`, `rm`, `rename`."""

from __future__ import annotations

from collections.abc import Callable

import click

from ambi.cli import attached, complete, flags
from ambi.cli.app import App, DockerCommand, ExitWith, each, pass_app, waiting
from ambi.cli.names import looked_up, on
from ambi.client.client import command_error, path_of
from ambi.core.errors import AmbiError, InvalidRequest, NotFound, NotModified

several = click.argument("instances", nargs=-1, required=True, metavar="INSTANCE...", shell_complete=complete.instances)
several_running = click.argument(
    "instances", nargs=-1, required=True, metavar="INSTANCE...", shell_complete=complete.running
)
_SIGNAL = flags.option("-s", "--signal", metavar="SIGNAL", help="What to send first.  [default: the instance's stop signal]")
_TIMEOUT = flags.option(
    "-t", "--timeout", "--time", type=click.IntRange(-1), metavar="SECONDS",
    help="How long to wait before it is killed; -1: for ever.  [default: the instance's, or 10]",
)  # fmt: skip


@click.command("start", cls=DockerCommand)
@flags.switch("-a", "--attach", "attach_", help="Attach to its output, and pass signals on.")
@flags.switch("-i", "--interactive", help="Attach its stdin.")
@flags.option("--detach-keys", metavar="KEYS", help="Keys that detach from a terminal.  [default: ctrl-p,ctrl-q]")
@several
@pass_app
def start(app: App, instances: tuple[str, ...], attach_: bool, interactive: bool, detach_keys: str | None) -> None:
    """Start stopped instances."""
    if attach_ or interactive:
        if len(instances) > 1:
            raise InvalidRequest("only one instance can be attached to", hint="leave --attach and --interactive out")
        with looked_up(app, instances[0]):
            raise ExitWith(_start_attached(app, instances[0], detach_keys, stdin=interactive))

    @on(app)
    def begin(name: str) -> None:
        _start(app, name)
        click.echo(name)

    each(instances, begin)


def _start(app: App, name: str) -> None:
    try:
        with waiting(f"starting {name} ..."):
            app.client.post(path_of("containers", name, "start"))
    except NotModified:
        pass  # it runs already, as asked
    except AmbiError as error:
        raise command_error(error) from error


def _start_attached(app: App, name: str, key_names: str | None, *, stdin: bool) -> int:
    keys = attached.detach_keys(key_names)
    state = app.client.get(path_of("containers", name, "json"))
    if state["State"]["Running"]:
        raise InvalidRequest(f"'{name}' is running already", hint=f"ambi attach {name}")
    tty, stdin = bool(state["Config"]["Tty"]), stdin and bool(state["Config"]["OpenStdin"])
    attached.check_terminal(tty=tty, stdin=stdin)
    streams = {"stdout", "stderr"} | ({"stdin"} if stdin else set())
    client, removes = app.client, bool(state["HostConfig"].get("AutoRemove"))
    with attached.SignalProxy(client, state["Id"], wanted=not tty) as proxy:
        hijacked = attached.attach(client, state["Id"], streams, key_names)
        wait = attached.ExitWait(client, state["Id"], "removed" if removes else "next-exit")
        _start(app, state["Id"])
        proxy.go()
        path = path_of("containers", state["Id"], "resize")
        if attached.pump(client, hijacked, path, tty=tty, stdin=stdin, keys=keys, watch=wait):
            wait.close()
            return 0
        return wait.status()


@click.command("stop", cls=DockerCommand)
@_SIGNAL
@_TIMEOUT
@several_running
@pass_app
def stop(app: App, instances: tuple[str, ...], signal: str | None, timeout: int | None) -> None:
    """Stop running instances: ask, wait, then kill."""
    each(instances, _asking(app, "stop", signal, timeout))


@click.command("restart", cls=DockerCommand)
@_SIGNAL
@_TIMEOUT
@several
@pass_app
def restart(app: App, instances: tuple[str, ...], signal: str | None, timeout: int | None) -> None:
    """Stop and start instances."""
    each(instances, _asking(app, "restart", signal, timeout))


@click.command("kill", cls=DockerCommand)
@flags.option("-s", "--signal", metavar="SIGNAL", help="Name or number.  [default: KILL]")
@several_running
@pass_app
def kill(app: App, instances: tuple[str, ...], signal: str | None) -> None:
    """Send a signal to running instances."""
    each(instances, _asking(app, "kill", signal, None))


def _asking(app: App, verb: str, signal: str | None, timeout: int | None) -> Callable[[str], None]:
    """An action that POSTs `verb` and prints the name."""
    query = {"signal": signal} if signal else {}
    if timeout is not None:
        query["t"] = str(timeout)

    @on(app)
    def ask(name: str) -> None:
        try:
            with waiting(f"{verb}: waiting for {name} ..."):
                app.client.post(path_of("containers", name, verb), query)
        except NotModified:
            pass  # it has stopped already, as asked
        click.echo(name)

    return ask


@click.command("wait", cls=DockerCommand)
@several
@pass_app
def wait(app: App, instances: tuple[str, ...]) -> None:
    """Wait until instances stop, and print their exit codes."""

    @on(app)
    def ended(name: str) -> None:
        click.echo(attached.ExitWait(app.client, name, "not-running").status())

    each(instances, ended)


@click.command("rm", cls=DockerCommand)
@flags.switch("-f", "--force", help="Kill it first when it runs; one that does not exist is no error.")
@flags.switch("-v", "--volumes", help="Remove its anonymous volumes, too.")
@several
@pass_app
def rm(app: App, instances: tuple[str, ...], force: bool, volumes: bool) -> None:
    """Remove instances."""
    query = {name: "1" for name, wanted in (("force", force), ("v", volumes)) if wanted}

    @on(app)
    def remove(name: str) -> None:
        try:
            with waiting(f"removing {name} ..."):
                app.client.delete(path_of("containers", name), query)
        except NotFound:
            if not force:
                raise
            return
        click.echo(name)

    each(instances, remove)


@click.command("rename", cls=DockerCommand)
@click.argument("instance", shell_complete=complete.instances)
@click.argument("new_name", metavar="NEW-NAME")
@pass_app
def rename(app: App, instance: str, new_name: str) -> None:
    """Rename an instance."""
    with looked_up(app, instance):
        app.client.post(path_of("containers", instance, "rename"), {"name": new_name})
