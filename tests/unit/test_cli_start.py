"""What the command line loads before it does anything: a script calls it a hundred times."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest

from ambi.cli.main import COMMANDS, cli
from ambi.core.version import VERSION

ROOT = Path(__file__).parents[2]
# Each costs 5 to 50 ms of the 60 that `--version` and completion may take, or the 80 of `ps`.
HEAVY = {
    "argparse", "asyncio", "concurrent", "ctypes", "csv", "dataclasses", "difflib", "email", "h11", "http", "logging",
    "multiprocessing", "sqlite3", "ssl", "subprocess", "tarfile", "tempfile", "urllib.request",
}  # fmt: skip


def loaded(*lines: str) -> set[str]:
    """Names of the modules that a fresh interpreter has after `lines`, without those it has anyway."""
    code = "\n".join(["import sys", "before = set(sys.modules)", *lines, "print(*(set(sys.modules) - before))"])
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_entry_loads_no_command_and_no_client() -> None:
    modules = loaded("import ambi.cli.main")
    ours = {name for name in modules if name.startswith("ambi.")}
    assert ours == {"ambi.cli", "ambi.cli.main", "ambi.cli.app", "ambi.core", "ambi.core.errors", "ambi.core.roots"}
    assert not HEAVY & {name.split(".")[0] for name in modules} - {"email"}


@pytest.mark.parametrize("module", ["ps", "run", "exec", "logs", "lifecycle"])
def test_a_command_loads_little(module: str) -> None:
    before = loaded("import ambi.cli.main")
    modules = loaded("import ambi.cli.main", f"import ambi.cli.commands.{module}", "import ambi.client.client")
    assert not HEAVY & {name.split(".")[0] for name in modules}
    commands = {name for name in modules if name.startswith("ambi.cli.commands.")}
    assert commands == {f"ambi.cli.commands.{module}"}
    assert len(modules - before) < 45, sorted(modules - before)


def test_the_table_of_commands_is_true() -> None:
    """The help lists commands without loading them; here each is loaded, and its summary is what the table says."""
    context = click.Context(cli)
    for name, entry in COMMANDS.items():
        command = cli.get_command(context, name)
        assert command is not None and command.help
        said, listed = (text.split(".")[0].split(", plain")[0] for text in (" ".join(command.help.split()), entry.summary))
        assert said == listed, name


def test_one_version() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == VERSION


def test_docs_name_every_command_and_flag() -> None:
    text = (ROOT / "docs" / "cli.md").read_text()
    context = click.Context(cli)
    for name in COMMANDS:
        assert f"`ambi {name}" in text, name
    run = cli.get_command(context, "run")
    assert run is not None
    for option in (o for o in run.params if isinstance(o, click.Option)):
        assert any(f"`{flag}" in text for flag in option.opts), option.opts
