"""`ambi attach`."""

from __future__ import annotations

import click

from ambi.cli import attached, complete, flags
from ambi.cli.app import App, DockerCommand, ExitWith, pass_app
from ambi.cli.names import looked_up
from ambi.client.client import path_of
from ambi.core.errors import Conflict


@click.command("attach", cls=DockerCommand)
@flags.option("--detach-keys", metavar="KEYS", help="Keys that detach from a terminal.  [default: ctrl-p,ctrl-q]")
@flags.switch("--no-stdin", help="Do not attach stdin.")
@flags.switch("--sig-proxy", default=True, help="Pass signals on; --sig-proxy=false does not.  [default: true]")
@click.argument("instance", shell_complete=complete.running)
@pass_app
def attach(app: App, instance: str, detach_keys: str | None, no_stdin: bool, sig_proxy: bool) -> None:
    """Attach to a running instance's stdio."""
    keys = attached.detach_keys(detach_keys)
    with looked_up(app, instance):
        state = app.client.get(path_of("containers", instance, "json"))
    if not state["State"]["Running"]:
        raise Conflict(f"cannot attach to '{instance}': it is not running", hint=f"ambi start --attach {instance}")
    tty, stdin = bool(state["Config"]["Tty"]), bool(state["Config"]["OpenStdin"]) and not no_stdin
    attached.check_terminal(tty=tty, stdin=stdin)
    streams = {"stdout", "stderr"} | ({"stdin"} if stdin else set())
    with attached.SignalProxy(app.client, state["Id"], wanted=sig_proxy and not tty) as proxy:
        wait = attached.ExitWait(app.client, state["Id"], "not-running")
        hijacked = attached.attach(app.client, state["Id"], streams, detach_keys)
        proxy.go()
        path = path_of("containers", state["Id"], "resize")
        if tty:
            _repaint(app, path)
        detached = attached.pump(app.client, hijacked, path, tty=tty, stdin=stdin, keys=keys, watch=wait)
        if detached:
            wait.close()
            return
        raise ExitWith(wait.status())


def _repaint(app: App, path: str) -> None:
    """A size that differs for a moment makes full-screen programs draw themselves again."""
    rows, columns = attached.console_size()
    if rows and columns:
        app.client.post(path, {"h": str(rows + 1), "w": str(columns)})
