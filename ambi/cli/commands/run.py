"""`ambi run` and `ambi create`."""

from __future__ import annotations

from typing import Any

import click

from ambi.cli import attached, flags
from ambi.cli.app import App, DockerCommand, ExitWith, pass_app, waiting
from ambi.cli.names import image_names, looked_up
from ambi.cli.output import nearest, note, warn
from ambi.cli.request import body_of, check_cidfile, write_cidfile
from ambi.client.client import command_error, path_of
from ambi.core.errors import AmbiError, InvalidRequest, NotFound

_SETTINGS = {"allow_interspersed_args": False}


@click.command("create", cls=DockerCommand, context_settings=_SETTINGS)
@flags.create_options
@pass_app
def create(app: App, /, image: str, command: tuple[str, ...], **given: Any) -> None:
    """Create an instance of an image, without starting it."""
    body = body_of(given, image, command, detach=False)
    click.echo(_create(app, body, given))


@click.command("run", cls=DockerCommand, context_settings=_SETTINGS)
@flags.run_options
@pass_app
def run(
    app: App,
    /,
    image: str,
    command: tuple[str, ...],
    detach: bool,
    detach_keys: str | None,
    sig_proxy: bool,
    **given: Any,
) -> None:
    """Create and start an instance of an image, and attach to it.

    The exit status is that of the command; 125 when the engine fails, 126 and 127 when the command cannot be executed or
    does not exist.
    """
    keys = attached.detach_keys(detach_keys)
    body = body_of(given, image, command, detach=detach)
    if not detach:
        attached.check_terminal(tty=body["Tty"], stdin=body["AttachStdin"])
    if body["Tty"]:
        body["HostConfig"]["ConsoleSize"] = attached.console_size()
    instance_id = _create(app, body, given)
    if detach:
        _start(app, instance_id, body)
        click.echo(instance_id)
        return
    raise ExitWith(_run_attached(app, instance_id, body, detach_keys, keys, sig_proxy=sig_proxy))


def _create(app: App, body: dict[str, Any], given: dict[str, Any]) -> str:
    """Create the instance; returns its id, with warnings printed and --cidfile written."""
    if given["cidfile"]:
        check_cidfile(given["cidfile"])
    query = {"name": given["name"]} if given["name"] else {}
    when = pull_policy(given["pull"])
    if when == "always":
        _pull(app, body["Image"], given["quiet"])
    with _image_hint(), looked_up(app, body["Image"], image_names):
        try:
            created = app.client.post("/containers/create", query, body)
        except NotFound as error:
            if when != "missing" or "No such image" not in error.message:
                raise
            _pull_missing(app, body["Image"], given["quiet"])
            created = app.client.post("/containers/create", query, body)
    for text in created.get("Warnings") or ():
        warn(text)
    if given["cidfile"]:
        write_cidfile(given["cidfile"], created["Id"])
    return str(created["Id"])


def pull_policy(text: str | None) -> str:
    """When an image is pulled before an instance is made of it."""
    if (text or "missing") not in ("always", "missing", "never"):
        raise InvalidRequest(f"--pull {text}: there is no such policy", hint="--pull always, missing or never")
    return text or "missing"


def _pull_missing(app: App, image: str, quiet: bool) -> None:
    """When that fails, an image of a similar name that is here is what was meant, more often than not."""
    note(f"Unable to find image '{image}' locally")
    try:
        _pull(app, image, quiet)
    except AmbiError as error:
        if near := nearest(image, image_names(app)):
            error.hint = f"did you mean {near}?"
        raise


def _pull(app: App, image: str, quiet: bool) -> None:
    """What is told of it goes to stderr: stdout is the command's."""
    from ambi.cli.commands.registry import fetch

    for text in fetch(app, image):
        if not quiet:
            click.echo(text, err=True)


def _tell_of_emulation(app: App) -> None:
    """One line when VMs are emulated here: they are so slow that it would be taken for a fault."""
    status = app.client.get("/info").get("Runtimes", {}).get("vm", {}).get("status") or {}
    accelerator = str(status.get("accelerator", ""))
    if accelerator.startswith("tcg"):
        note(accelerator.removeprefix("tcg (").removesuffix(")"))


class _image_hint:
    """An image that is not there can be made: says how, where no other image has a similar name."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, NotFound) and "image" in error.message.lower() and "did you mean" not in (error.hint or ""):
            error.hint = "make one: ambi image bootstrap debian:bookworm, ambi import FILE NAME or ambi load -i FILE"


def _start(app: App, instance_id: str, body: dict[str, Any]) -> None:
    try:
        with waiting(f"starting {instance_id[:12]} ..."):
            app.client.post(path_of("containers", instance_id, "start"))
    except AmbiError as error:
        raise command_error(error) from error
    if body["HostConfig"].get("Runtime") == "vm":
        _tell_of_emulation(app)


def _run_attached(
    app: App, instance_id: str, body: dict[str, Any], key_names: str | None, keys: bytes, *, sig_proxy: bool
) -> int:
    """Attach, start and stay until the end; returns the exit status."""
    streams = {name.lower() for name in ("Stdin", "Stdout", "Stderr") if body[f"Attach{name}"]}
    client, removes = app.client, body["HostConfig"]["AutoRemove"]
    with attached.SignalProxy(client, instance_id, wanted=sig_proxy) as proxy:
        hijacked = attached.attach(client, instance_id, streams, key_names)
        wait = attached.ExitWait(client, instance_id, "removed" if removes else "next-exit")
        try:
            _start(app, instance_id, body)
        except AmbiError:
            hijacked.sock.close()
            if removes:
                _wait_for_removal(wait)
            raise
        proxy.go()
        detached = attached.pump(
            client,
            hijacked,
            path_of("containers", instance_id, "resize"),
            tty=body["Tty"],
            stdin="stdin" in streams,
            keys=keys,
            watch=wait,
        )
        if detached:
            wait.close()
            return 0
        return wait.status()


def _wait_for_removal(wait: attached.ExitWait) -> None:
    """The instance of a start that failed is removed by the engine; a name is free when the command has ended."""
    try:
        wait.ready(attached.REMOVAL_SECONDS)
    except (AmbiError, OSError):  # what matters is why the start failed
        wait.close()
