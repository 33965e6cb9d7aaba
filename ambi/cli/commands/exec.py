"""`ambi exec`."""

from __future__ import annotations

from typing import Any

import click

from ambi.cli import attached, complete, flags
from ambi.cli.app import App, DockerCommand, ExitWith, pass_app
from ambi.cli.names import looked_up
from ambi.cli.output import hint
from ambi.cli.values import env_list
from ambi.client.client import command_error, path_of
from ambi.core.errors import AmbiError, CommandNotExecutable, CommandNotFound


@click.command("exec", cls=DockerCommand, context_settings={"allow_interspersed_args": False})
@flags.switch("-d", "--detach", help="Run in the background.")
@flags.option("--detach-keys", metavar="KEYS", help="Keys that detach from a terminal.  [default: ctrl-p,ctrl-q]")
@flags.many("-e", "--env", metavar="NAME[=VALUE]", help="Set a variable, or pass on the one of this shell.")
@flags.many("--env-file", metavar="FILE", help="Set the variables in FILE, a NAME=VALUE a line.")
@flags.switch("-i", "--interactive", help="Keep stdin open.")
@flags.switch("--privileged", help="All capabilities.")
@flags.switch("-t", "--tty", help="Give the process a terminal.")
@flags.option("-u", "--user", metavar="USER[:GROUP]", help="Names or numbers, looked up inside.")
@flags.option("-w", "--workdir", metavar="DIR", help="Working directory inside.")
@click.argument("instance", shell_complete=complete.running)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="COMMAND [ARG...]")
@pass_app
def exec_(app: App, /, instance: str, command: tuple[str, ...], **given: Any) -> None:
    """Run a command in a running instance.

    The exit status is that of the command; 126 and 127 when it cannot be executed or does not exist.
    """
    keys = attached.detach_keys(given["detach_keys"])
    tty, stdin = given["tty"], given["interactive"] and not given["detach"]
    if not given["detach"]:
        attached.check_terminal(tty=tty, stdin=stdin)
    with looked_up(app, instance):
        created = app.client.post(path_of("containers", instance, "exec"), None, _body(command, given))
    try:
        raise ExitWith(_start(app, created["Id"], given, keys))
    except AmbiError as error:
        raise command_error(error) from error


def _body(command: tuple[str, ...], given: dict[str, Any]) -> dict[str, Any]:
    """Docker's ExecConfig."""
    shown = not given["detach"]
    body: dict[str, Any] = {
        "User": given["user"] or "",
        "Privileged": given["privileged"],
        "Tty": given["tty"],
        "AttachStdin": given["interactive"] and shown,
        "AttachStderr": shown,
        "AttachStdout": shown,
        "Detach": given["detach"],
        "DetachKeys": given["detach_keys"] or "",
        "Env": env_list(given["env_file"], given["env"]) or None,
        "WorkingDir": given["workdir"] or "",
        "Cmd": list(command),
    }
    if given["tty"] and shown:
        body["ConsoleSize"] = attached.console_size()
    return body


def _start(app: App, exec_id: str, given: dict[str, Any], keys: bytes) -> int:
    """Run the exec; returns its exit status, 0 for one in the background or detached from."""
    path, tty = path_of("exec", exec_id, "start"), given["tty"]
    body: dict[str, Any] = {"Detach": given["detach"], "Tty": tty}
    if given["detach"]:
        app.client.post(path, None, body)
        return 0
    if tty:
        body["ConsoleSize"] = attached.console_size()
    hijacked = app.client.hijack(path, None, body)
    resize = path_of("exec", exec_id, "resize")
    if attached.pump(app.client, hijacked, resize, tty=tty, stdin=given["interactive"], keys=keys, watch=None):
        return 0
    found = app.client.get(path_of("exec", exec_id, "json"))
    status = int(found["ExitCode"] or 0)
    if not found["Pid"] and status in (CommandNotFound.exit_status, CommandNotExecutable.exit_status):
        hint(_why_not(status, given))
    return status


def _why_not(status: int, given: dict[str, Any]) -> str:
    """The hint for a program that never ran; the message itself has come through the stream, as docker's does."""
    if status == CommandNotFound.exit_status:
        return "name the program's whole path, or look inside: ambi exec -it INSTANCE sh"
    options = " and ".join(flag for flag, name in (("--user", "user"), ("--workdir", "workdir")) if given[name])
    return f"see that what {options} name is there inside" if options else str(CommandNotExecutable.usual_hint)
