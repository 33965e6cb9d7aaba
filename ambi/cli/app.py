"""What the commands of one run share: the roots that were named, and the client for them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import click

from ambi.core.errors import AmbiError
from ambi.core.roots import Roots

if TYPE_CHECKING:
    from ambi.client.client import Client


class ExitWith(Exception):
    """Ends the command with an exit status; everything has been said."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class App:
    """`ctx.obj` of every command."""

    def __init__(self, roots: Roots) -> None:
        self.roots = roots
        self._client: Client | None = None

    @property
    def client(self) -> Client:
        """Connects when first used, and then starts the engine when nobody listens."""
        if self._client is None:
            from ambi.client.client import Client

            self._client = Client(self.roots, report=_note)
        return self._client

    def quiet_client(self, *, seconds: float | None = None) -> Client:
        """A client that never starts an engine: for completion and for questions about the engine itself."""
        from ambi.client.client import Client

        return Client(self.roots, starts=False, seconds=seconds)


pass_app = click.make_pass_decorator(App)


def _note(text: str) -> None:
    click.echo(text, err=True)


def waiting(text: str) -> AbstractContextManager[object]:
    """Within it, `text` is shown while something takes longer than a second; nothing where stderr is no terminal."""
    if not sys.stderr.isatty() or os.environ.get("AMBI_NO_PROGRESS"):
        return nullcontext()
    from ambi.cli.progress import Waiting

    return Waiting(text)


def each(names: Iterable[str], action: Callable[[str], Any]) -> None:
    """Do `action` for every name, also after one has failed. Every failure is printed, and the last one's status is ours."""
    from ambi.cli.output import print_error

    status = 0
    for name in names:
        try:
            action(name)
        except AmbiError as error:
            print_error(hinted(error))
            status = error.exit_status
    if status:
        raise ExitWith(status)


def hinted(error: AmbiError) -> AmbiError:
    """`error`; one that nobody gave a hint points to what tells more: the command's help, or the state of the engine."""
    from ambi.core.errors import Unavailable

    if error.hint is None:
        context = click.get_current_context(silent=True)
        path = context.command_path if context else "ambi"
        error.hint = "ambi engine status" if isinstance(error, Unavailable) else f"{path} --help"
    return error


class DockerCommand(click.Command):
    """A command whose switches also take a value, as docker's do: `--sig-proxy=false`, `--rm=true`, `-i=false`.

    Every error that leaves it has a hint.
    """

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AmbiError as error:
            raise hinted(error)  # noqa: B904  the same object, and no context of its own

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        switches: dict[str, tuple[str, bool]] = {}
        kept = list(self._without_values(ctx, args, switches))
        rest = super().parse_args(ctx, kept)
        for name, (_, value) in switches.items():
            ctx.params[name] = value
        return rest

    def _without_values(self, ctx: click.Context, args: list[str], found: dict[str, tuple[str, bool]]) -> Iterator[str]:
        """`args` without switches that have a value; those go to `found`: parameter name to (as typed, value)."""
        options = {o: p for p in self.get_params(ctx) if isinstance(p, click.Option) for o in p.opts}
        position = 0
        while position < len(args):
            arg = args[position]
            position += 1
            if arg == "--" or (not arg.startswith("-") and not self.allow_interspersed_args):
                yield from args[position - 1 :]
                return
            flag, equals, value = arg.partition("=")
            option = options.get(flag)
            if option is not None and option.is_flag and equals:
                assert option.name is not None
                found[option.name] = (flag, _boolean(flag, value))
                continue
            yield arg
            if _takes_next(options, arg) and position < len(args):
                yield args[position]
                position += 1


def _boolean(flag: str, text: str) -> bool:
    if text in ("1", "t", "T", "TRUE", "true", "True"):  # strconv.ParseBool
        return True
    if text in ("0", "f", "F", "FALSE", "false", "False"):
        return False
    from ambi.core.errors import InvalidRequest

    raise InvalidRequest(f"invalid value for {flag}: '{text}' is neither true nor false", hint=f"{flag} or {flag}=false")


def _takes_next(options: dict[str, click.Option], arg: str) -> bool:
    """Whether the argument after `arg` is the value of its last option."""
    if arg.startswith("--"):
        option = options.get(arg)
        return option is not None and not option.is_flag and not option.count
    for place, letter in enumerate(arg[1:], 2):
        option = options.get(f"-{letter}")
        if option is None:
            return False
        if not option.is_flag:
            return place == len(arg)
    return False
