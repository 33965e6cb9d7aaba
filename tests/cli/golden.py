"""Golden files: what a command prints, kept in tests/cli/golden_files/NAME.txt. AMBI_UPDATE_GOLDEN=1 writes them anew."""

from __future__ import annotations

import difflib
import os
import re
import subprocess
from pathlib import Path

from tests.harness import AMBI

FOLDER = Path(__file__).parent / "golden_files"


def run(*args: str, socket: Path | str = "/proc/none/ambi.sock", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run our command line, 80 columns wide and without colour."""
    base = {"PATH": os.environ["PATH"], "HOME": "/root", "COLUMNS": "80", "LC_ALL": "C.UTF-8", "TZ": "UTC", "TERM": "xterm"}
    return subprocess.run(
        [str(AMBI), *args],
        check=False,
        env={**base, "AMBI_SOCKET": str(socket), "AMBI_DATA_ROOT": "/proc/none", **environment},
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=60,
    )


def transcript(*args: str, **options: str | Path) -> str:
    """The command line, its output, its errors and its exit status, as one text."""
    done = run(*args, **options)  # type: ignore[arg-type]
    errors = "".join(f"! {line}\n" for line in done.stderr.splitlines())
    return f"$ ambi {' '.join(args)}\n{done.stdout}{errors}[{done.returncode}]\n"


def check(name: str, text: str, *, hide: dict[str, str] | None = None) -> None:
    """Compare `text` with the golden file; `hide` maps patterns of what changes from run to run to what is kept for it."""
    for pattern, word in (hide or {}).items():
        text = re.sub(pattern, word, text)
    path = FOLDER / f"{name}.txt"
    if os.environ.get("AMBI_UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    kept = path.read_text() if path.exists() else ""
    difference = difflib.unified_diff(kept.splitlines(), text.splitlines(), str(path), "printed", lineterm="")
    assert kept == text, "\n".join(difference) + "\n(AMBI_UPDATE_GOLDEN=1 accepts what was printed)"
