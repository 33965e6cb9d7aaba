"""`ambi port`."""

from __future__ import annotations

import click

from ambi.cli import complete
from ambi.cli.app import App, DockerCommand, pass_app
from ambi.cli.names import looked_up
from ambi.client.client import path_of
from ambi.core.errors import NotFound


@click.command("port", cls=DockerCommand)
@click.argument("instance", metavar="INSTANCE", shell_complete=complete.running)
@click.argument("wanted", required=False, metavar="[PORT[/PROTO]]")
@pass_app
def port(app: App, instance: str, wanted: str | None) -> None:
    """Show where the ports of an instance are published, one or all."""
    with looked_up(app, instance):
        ports = app.client.get(path_of("containers", instance, "json"))["NetworkSettings"]["Ports"]
    if wanted is None:
        lines = [f"{inside} -> {_shown(b)}" for inside, bound in sorted(ports.items()) for b in bound or ()]
    else:
        inside = wanted if "/" in wanted else f"{wanted}/tcp"
        lines = [_shown(binding) for binding in ports.get(inside) or ()]
        if not lines:
            raise NotFound(f"no public port '{inside}' published for {instance}", hint=f"ambi port {instance}")
    click.echo("".join(f"{line}\n" for line in lines), nl=False)


def _shown(binding: dict[str, str]) -> str:
    host = binding["HostIp"]
    return f"[{host}]:{binding['HostPort']}" if ":" in host else f"{host}:{binding['HostPort']}"
