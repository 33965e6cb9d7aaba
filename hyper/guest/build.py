"""The guest agent: compiled here, because a static program of a few files needs no more than a C compiler."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from ambi.core.errors import Internal, Unsupported
from ambi.linux import tree

SOURCES = Path(__file__).parent / "agent"
TREE = Path(tree.__file__).parent  # what looks into a root, by itself a program for containers
FLAGS = (
    *("-std=gnu11", "-D_GNU_SOURCE", "-O2", "-static", "-fstack-protector-strong", "-ffunction-sections"),
    *("-Wall", "-Wextra", "-Werror", "-Wl,--gc-sections", "-s"),
)


def _sources(pattern: str) -> list[Path]:
    return sorted(SOURCES.glob(pattern)) + sorted(path for path in TREE.glob(pattern) if path.name != "start.c")


def build_id() -> str:
    """Of what the agent is made of: its sources and how they are compiled."""
    digest = hashlib.sha256(repr(FLAGS).encode())
    for path in _sources("*.[ch]"):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def build_agent(out: Path) -> Path:
    """`out`/agent-BUILD_ID, compiled unless it is there. Nothing is left of a compilation that failed.

    Raises:
        Unsupported: there is no C compiler, or no static C library.
        Internal: the compiler refuses our sources.
    """
    ident = build_id()
    agent = out / f"agent-{ident}"
    if agent.exists():
        return agent
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        raise Unsupported("cannot build the guest agent: no C compiler is installed", hint="apt-get install gcc libc6-dev")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".agent-") as scratch:
        made = Path(scratch) / "agent"
        sources = [str(path) for path in _sources("*.c")]
        command = [compiler, *FLAGS, f"-I{TREE}", f'-DBUILD_ID="{ident}"', "-o", str(made), *sources]
        run = subprocess.run(command, check=False, capture_output=True, text=True)
        if run.returncode:
            raise _refused(run.stderr)
        os.rename(made, agent)
    return agent


def _refused(text: str) -> Unsupported | Internal:
    line = next((line for line in text.splitlines() if "error" in line or "cannot find" in line), text.strip()[-200:])
    if "No such file or directory" in line or "cannot find -l" in line:
        return Unsupported(f"cannot build the guest agent: {line}", hint="apt-get install libc6-dev linux-libc-dev")
    return Internal(f"cannot build the guest agent: {line}")
