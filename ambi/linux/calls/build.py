"""Builds `program.py` from `calls.c`: `python -m ambi.linux.calls.build`. Needs gcc; the result is in the repository."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from ambi.linux import embed

HERE = Path(__file__).parent
FLAGS = (
    "-Os", "-c", "-ffreestanding", "-fPIC", "-fno-stack-protector", "-fno-asynchronous-unwind-tables",
    "-fomit-frame-pointer", "-fcf-protection=none", "-mno-red-zone", "-mno-sse", "-Wall", "-Wextra", "-Werror",
)  # fmt: skip
SCRIPT = """SECTIONS {
    . = 0;
    .text : { *(.text.calls) *(.text*) }
    .data : { *(.data*) *(.bss*) *(.rodata*) }
    /DISCARD/ : { *(.comment) *(.note*) }
}
ASSERT(SIZEOF(.data) == 0, "calls.c must have no data")
"""


def build() -> bytes:
    """The machine code of `calls.c`; its first byte is the entry of `calls`."""
    with tempfile.TemporaryDirectory() as folder:
        made, linked, code = (Path(folder, name) for name in ("calls.o", "calls.elf", "calls.bin"))
        subprocess.run(["gcc", *FLAGS, "-o", made, HERE / "calls.c"], check=True)
        script = Path(folder, "calls.ld")
        script.write_text(SCRIPT)
        subprocess.run(["ld", "-e", "calls", "-T", script, "-o", linked, made], check=True)
        subprocess.run(["objcopy", "-O", "binary", "-j", ".text", linked, code], check=True)
        return code.read_bytes()


def module(code: bytes) -> str:
    """The text of `program.py`."""
    return embed.module("calls.c", "CODE", code)


if __name__ == "__main__":
    (HERE / "program.py").write_text(module(build()))
