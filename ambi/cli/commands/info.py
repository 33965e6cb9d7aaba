"""`ambi info` and `ambi version`."""

from __future__ import annotations

import json
import platform
from typing import Any

import click

from ambi.cli import flags, humanize
from ambi.cli.app import App, DockerCommand, ExitWith, pass_app
from ambi.cli.output import print_error
from ambi.cli.template import Template
from ambi.client.client import API_VERSION
from ambi.core.errors import AmbiError
from ambi.core.version import VERSION

_ONE_FORMAT = "`json` or a Go template such as '{{.ServerVersion}}'."


def _as_asked(value: dict[str, Any], template: str) -> str:
    if template == "json":
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return Template(template).render(value)


@click.command("info", cls=DockerCommand)
@flags.format_option(_ONE_FORMAT)
@pass_app
def info(app: App, template: str | None) -> None:
    """Show what the engine has and can do."""
    it = app.client.get("/info")
    if template:
        click.echo(_as_asked(it, template))
        return
    layers = dict(it.get("DriverStatus") or ())
    rows = [
        ("Instances", f"{it['Containers']} ({it['ContainersRunning']} running, {it['ContainersStopped']} stopped)"),
        ("Images", it["Images"]),
        ("Isolations", ", ".join(sorted(it["Runtimes"]))),
        (
            "Layers",
            f"{layers.get('Layers', '')} ({layers['Because']})" if layers.get("Because") else layers.get("Layers", ""),
        ),
        ("Cgroups", f"version {it['CgroupVersion']}"),
        ("Engine", it["ServerVersion"]),
        ("Kernel", it["KernelVersion"]),
        ("System", it["OperatingSystem"]),
        ("CPUs", it["NCPU"]),
        ("Memory", humanize.binary_size(it["MemTotal"])),
        ("Host", it["Name"]),
        ("Data root", it["DockerRootDir"]),
    ]
    click.echo("".join(f"{name + ':':<12} {value}\n" for name, value in rows), nl=False)


@click.command("version", cls=DockerCommand)
@flags.format_option("`json` or a Go template such as '{{.Server.Version}}'.")
@pass_app
def version(app: App, template: str | None) -> None:
    """Show the versions of this command and of the engine.

    An engine that does not run is not started for it.
    """
    client = {"Version": VERSION, "ApiVersion": API_VERSION, "PythonVersion": platform.python_version()}
    server, trouble = None, None
    try:
        server = app.quiet_client().get("/version")
    except AmbiError as error:
        trouble = error
    if template:
        click.echo(_as_asked({"Client": client, "Server": server}, template))
    else:
        click.echo(
            _block("Client", client, (("Version", "Version"), ("API version", "ApiVersion"), ("Python", "PythonVersion")))
        )
        if server:
            names = (
                ("Version", "Version"),
                ("API version", "ApiVersion"),
                ("Oldest API", "MinAPIVersion"),
                ("Kernel", "KernelVersion"),
            )
            click.echo(_block("Engine", server, names))
    if trouble:
        print_error(trouble)
        raise ExitWith(1)  # as docker's


def _block(title: str, values: dict[str, Any], names: tuple[tuple[str, str], ...]) -> str:
    return "\n".join([f"{title}:", *(f" {label + ':':<13} {values.get(key, '')}" for label, key in names)])
