"""Builds `program.py` from `tini.c`: `python -m runtime.tini.build`. Needs gcc; the result is part of the repository.

The program is small and changes hardly ever; carrying it makes the package work on machines without a compiler. A test
builds it again and runs both.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from ambi.linux import embed

HERE = Path(__file__).parent
FLAGS = (
    "-Os", "-static", "-nostdlib", "-ffreestanding", "-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-fno-pie",
    "-no-pie", "-fcf-protection=none", "-Wall", "-Wextra", "-Werror", "-Wl,--build-id=none", "-Wl,-z,noseparate-code",
    "-Wl,-z,noexecstack", "-Wl,-n", "-s",
)  # fmt: skip


def build() -> bytes:
    """The ELF file that gcc makes of `tini.c`."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "ambi-init")
        subprocess.run(["gcc", *FLAGS, "-o", output, HERE / "tini.c"], check=True)
        subprocess.run(["strip", "-R", ".comment", "-R", ".note.gnu.property", output], check=True)
        return output.read_bytes()


def module(program: bytes) -> str:
    """The text of `program.py`."""
    return embed.module("tini.c", "PROGRAM", program)


if __name__ == "__main__":
    (HERE / "program.py").write_text(module(build()))
