"""The command `ambi`: its table of commands, and what every command shares.

Commands load when they are used: `ambi --version`, `--help` and completion import none of them. Errors leave here, as one
line `error: ...`, a line `hint: ...` where there is one, and the exit status of the error's class.
"""

from __future__ import annotations

import os
import sys
from typing import NamedTuple, NoReturn

import click

from ambi.cli.app import App, ExitWith
from ambi.core.errors import AmbiError
from ambi.core.roots import DEFAULT_DATA_ROOT, DEFAULT_RUN_ROOT, DEFAULT_SOCKET, Roots


class Entry(NamedTuple):
    """A command that is not loaded yet: its section of the help, module below `ambi.cli.commands`, attribute and summary."""

    section: str
    module: str
    attribute: str
    summary: str


INSTANCES, IMAGES, NETWORKS, ENGINE = "Instances", "Images", "Networks and volumes", "Engine"
COMMANDS: dict[str, Entry] = {
    "run": Entry(INSTANCES, "run", "run", "Create and start an instance of an image, and attach to it."),
    "create": Entry(INSTANCES, "run", "create", "Create an instance of an image, without starting it."),
    "ps": Entry(INSTANCES, "ps", "ps", "List instances."),
    "exec": Entry(INSTANCES, "exec", "exec_", "Run a command in a running instance."),
    "attach": Entry(INSTANCES, "attach", "attach", "Attach to a running instance's stdio."),
    "logs": Entry(INSTANCES, "logs", "logs", "Show what an instance has printed."),
    "start": Entry(INSTANCES, "lifecycle", "start", "Start stopped instances."),
    "stop": Entry(INSTANCES, "lifecycle", "stop", "Stop running instances: ask, wait, then kill."),
    "restart": Entry(INSTANCES, "lifecycle", "restart", "Stop and start instances."),
    "kill": Entry(INSTANCES, "lifecycle", "kill", "Send a signal to running instances."),
    "pause": Entry(INSTANCES, "change", "pause", "Have everything in running instances stand still."),
    "unpause": Entry(INSTANCES, "change", "unpause", "Let paused instances go on."),
    "update": Entry(INSTANCES, "change", "update", "Change the limits and the restart policy of instances, running or not."),
    "wait": Entry(INSTANCES, "lifecycle", "wait", "Wait until instances stop, and print their exit codes."),
    "rm": Entry(INSTANCES, "lifecycle", "rm", "Remove instances."),
    "rename": Entry(INSTANCES, "lifecycle", "rename", "Rename an instance."),
    "cp": Entry(INSTANCES, "cp", "cp", "Copy files between an instance, running or not, and this machine."),
    "diff": Entry(
        INSTANCES, "trees", "diff", "Show what an instance has added (A), changed (C) and deleted (D) in its image's files."
    ),
    "export": Entry(
        INSTANCES,
        "trees",
        "export",
        "Write the whole root file system of an instance as a tar archive, without what is mounted in it.",
    ),
    "snapshot": Entry(
        INSTANCES, "snapshot", "snapshot", "Save virtual machines as they run, and have them go on from there."
    ),
    "commit": Entry(INSTANCES, "trees", "commit", "Make an image of what an instance has changed in its own image."),
    "inspect": Entry(INSTANCES, "inspect", "inspect", "Show everything about instances, images, networks or volumes."),
    "top": Entry(INSTANCES, "top", "top", "List the processes of an instance."),
    "stats": Entry(INSTANCES, "stats", "stats", "Show what instances use, live."),
    "port": Entry(INSTANCES, "port", "port", "Show where the ports of an instance are published, one or all."),
    "container": Entry(INSTANCES, "container", "container", "Docker's names for the commands of instances, and prune."),
    "network": Entry(NETWORKS, "network", "network", "Manage networks."),
    "volume": Entry(NETWORKS, "volume", "volume", "Manage volumes."),
    "image": Entry(IMAGES, "image", "image", "Manage images."),
    "images": Entry(IMAGES, "image", "list_", "List images."),
    "pull": Entry(IMAGES, "registry", "pull", "Get an image from a registry."),
    "push": Entry(IMAGES, "registry", "push", "Send an image to the registry that its name tells."),
    "save": Entry(IMAGES, "registry", "save", "Write images to an archive that ambi, docker and OCI tools load."),
    "login": Entry(IMAGES, "registry", "login", "Log in at a registry, Docker Hub without a name."),
    "logout": Entry(IMAGES, "registry", "logout", "Forget the log-in at a registry, Docker Hub without a name."),
    "load": Entry(IMAGES, "image", "load", "Load images from an archive of `docker save` or an OCI layout."),
    "import": Entry(IMAGES, "image", "import_", "Make an image of a root file system in a tar archive."),
    "tag": Entry(IMAGES, "image", "tag", "Give an image one more name."),
    "rmi": Entry(IMAGES, "image", "remove", "Remove images."),
    "history": Entry(IMAGES, "image", "history", "Show how an image was made."),
    "events": Entry(ENGINE, "events", "events", "Show what happens, as it happens."),
    "info": Entry(ENGINE, "info", "info", "Show what the engine has and can do."),
    "system": Entry(ENGINE, "system", "system", "Show what takes space, and free it."),
    "engine": Entry(ENGINE, "engine", "engine", "Run, start, stop and look at the engine."),
    "doctor": Entry(ENGINE, "doctor", "doctor", "Check what this host can do, with a fix for what it cannot."),
    "version": Entry(ENGINE, "info", "version", "Show the versions of this command and of the engine."),
    "completion": Entry(ENGINE, "completion", "completion", "Print the completion script of a shell."),
}


# What people who come from docker type, and does not exist yet: what to do instead.
INSTEAD = {
    "--gpus": "leave it out, or pass on a device: --device /dev/NAME",
}


class LazyGroup(click.Group):
    """The commands of COMMANDS, imported one at a time, and listed without being imported."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        import importlib

        command = getattr(importlib.import_module(f"ambi.cli.commands.{entry.module}"), entry.attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for section in (INSTANCES, IMAGES, NETWORKS, ENGINE):
            with formatter.section(section):
                formatter.write_dl([(name, e.summary) for name, e in COMMANDS.items() if e.section == section])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[click.shell_completion.CompletionItem]:
        from click.shell_completion import CompletionItem

        found = [CompletionItem(n, help=e.summary) for n, e in COMMANDS.items() if n.startswith(incomplete)]
        return found + click.Command.shell_complete(self, ctx, incomplete)


def _version(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from ambi.core.version import VERSION

        click.echo(f"ambi {VERSION}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    context_settings={"auto_envvar_prefix": "AMBI", "help_option_names": ["--help"], "max_content_width": 100},
    epilog="`ambi COMMAND --help` explains a command. Every option can be given as a variable: AMBI_SOCKET, AMBI_PS_FORMAT.",
)
@click.option("-H", "--socket", metavar="PATH", help=f"Socket of the engine.  [default: {DEFAULT_SOCKET}]")
@click.option(
    "--data-root", metavar="DIR", help=f"Where an engine that is started keeps its data.  [default: {DEFAULT_DATA_ROOT}]"
)
@click.option(
    "--run-root", metavar="DIR", help=f"Where it keeps what a boot forgets, and its socket.  [default: {DEFAULT_RUN_ROOT}]"
)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
@click.pass_context
def cli(ctx: click.Context, socket: str | None, data_root: str | None, run_root: str | None) -> None:
    """One OCI image, run as a container or as a virtual machine."""
    ctx.obj = App(roots_of(socket, data_root, run_root))


def roots_of(socket: str | None, data_root: str | None, run_root: str | None) -> Roots:
    """The places that the global options name; a socket that is not named lies in the run root."""
    run = run_root or str(DEFAULT_RUN_ROOT)
    named = (socket or os.path.join(run, DEFAULT_SOCKET.name)).removeprefix("unix://")
    return Roots.of(data_root or DEFAULT_DATA_ROOT, run, named)


def main() -> NoReturn:
    """The entry point: runs the command line and exits."""
    sys.exit(run_main(sys.argv[1:]))


def run_main(args: list[str]) -> int:
    """Run one command line; returns the exit status after having printed what went wrong."""
    try:
        result = cli.main(args, prog_name="ambi", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except ExitWith as end:
        return end.status
    except AmbiError as error:
        return report(error)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show(sys.stdout)
        return 0
    except click.ClickException as error:
        return report(usage_error(error))
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:  # the reader of our output has gone; nobody is left to be told
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except OSError as error:
        from ambi.core.errors import from_os_error

        return report(from_os_error("cannot go on", error))


def report(error: AmbiError) -> int:
    """Print `error` and return its exit status."""
    from ambi.cli.output import print_error

    print_error(error)
    return error.exit_status


def usage_error(error: click.ClickException) -> AmbiError:
    """What is wrong with the command line, as an error of ours."""
    from ambi.core.errors import InvalidRequest

    message = error.format_message().replace("\n", " ").rstrip(".")
    hint = "ambi --help"
    if isinstance(error, click.UsageError) and error.ctx is not None:
        hint = f"{error.ctx.command_path} --help"
    what, similar = _guess(error)
    message = what or message
    hint = f"did you mean {similar}?" if similar else hint
    if isinstance(error, click.NoSuchOption):
        hint = INSTEAD.get(error.option_name, hint)
    return InvalidRequest(message[:1].lower() + message[1:], hint=hint)


def _guess(error: click.ClickException) -> tuple[str, str]:
    """For an unknown command or option: what to say of it, and what was probably meant ("" when nothing is near)."""
    from ambi.cli.output import nearest

    if isinstance(error, click.NoSuchOption):
        return f"no such option: {error.option_name}", nearest(error.option_name, error.possibilities or ())
    if isinstance(error, click.UsageError) and error.ctx is not None and error.message.startswith("No such command"):
        typed = error.message.partition("'")[2].partition("'")[0]
        assert isinstance(error.ctx.command, click.Group)
        return f"no such command: {typed}", nearest(typed, error.ctx.command.list_commands(error.ctx))
    return "", ""
