"""Builds `program.py` from the C files: `python -m ambi.linux.tree.build`. Needs gcc; the result is part of the repository.

The agent of a guest is compiled of the same sources, but for `start.c`. Carrying the program makes containers work on
machines without a compiler. A test builds it again.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from ambi.linux import embed

HERE = Path(__file__).parent
FLAGS = (
    "-std=gnu11", "-Os", "-static", "-nostdlib", "-ffreestanding", "-fno-builtin", "-fno-tree-loop-distribute-patterns",
    "-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-fno-pie", "-no-pie", "-fcf-protection=none",
    "-ffunction-sections", "-Wall", "-Wextra", "-Werror", "-Wl,--gc-sections", "-Wl,--build-id=none",
    "-Wl,-z,noseparate-code", "-Wl,-z,noexecstack", "-s",
)  # fmt: skip


def build() -> bytes:
    """The ELF file that gcc makes of the sources."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "ambi-tree")
        subprocess.run(["gcc", *FLAGS, "-o", output, *sorted(HERE.glob("*.c"))], check=True)
        subprocess.run(["strip", "-R", ".comment", "-R", ".note.gnu.property", output], check=True)
        return output.read_bytes()


def module(program: bytes) -> str:
    """The text of `program.py`."""
    return embed.module("the C files", "PROGRAM", program)


if __name__ == "__main__":
    (HERE / "program.py").write_text(module(build()))
