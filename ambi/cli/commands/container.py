"""`ambi container ...`: docker's names for the commands of instances, of either isolation."""

from __future__ import annotations

import click

from ambi.cli import flags, pruning
from ambi.cli.app import App, DockerCommand, pass_app

# What `ambi NAME` does, too.
ALSO = (
    "attach", "commit", "cp", "create", "diff", "exec", "export", "inspect", "kill", "logs", "pause", "port", "rename",
    "restart", "rm", "run", "start", "stats", "stop", "top", "unpause", "update", "wait",
)  # fmt: skip


class ContainerGroup(click.Group):
    """Its own commands, and those of ALSO, each loaded when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*self.commands, *ALSO, "ls"})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        name = "ps" if cmd_name in ("ls", "list", "ps") else cmd_name
        if own is not None or name not in (*ALSO, "ps"):
            return own
        root = ctx.find_root().command
        assert isinstance(root, click.Group)
        return root.get_command(ctx, name)


@click.group("container", cls=ContainerGroup)
def container() -> None:
    """Docker's names for the commands of instances, and prune."""


@container.command("prune", cls=DockerCommand)
@flags.switch("-f", "--force", help="Do not ask.")
@flags.prune_filter_option("By label or until.")
@pass_app
def prune(app: App, force: bool, filters: tuple[str, ...]) -> None:
    """Remove all instances that do not run."""
    if not force:
        pruning.confirm("This will remove all stopped containers.")
    pruning.tell([pruning.instances(app.client, filters)])
