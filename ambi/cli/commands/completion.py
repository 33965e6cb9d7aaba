"""`ambi completion`."""

from __future__ import annotations

import click


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell.

    \b
    bash:  ambi completion bash > /etc/bash_completion.d/ambi
    zsh:   ambi completion zsh > /usr/local/share/zsh/site-functions/_ambi
    fish:  ambi completion fish > ~/.config/fish/completions/ambi.fish
    """
    from click.shell_completion import get_completion_class

    from ambi.cli.main import cli

    kind = get_completion_class(shell)
    assert kind is not None
    complete = kind(cli, {}, "ambi", "_AMBI_COMPLETE")
    click.echo(complete.source_template % complete.source_vars())  # its `source` runs bash to ask for its version
