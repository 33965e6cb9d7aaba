"""What the container driver brings into every shim: each MiB of modules costs every start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOO_DEAR = {
    "argparse", "asyncio", "dataclasses", "hashlib", "inspect", "logging", "multiprocessing", "shutil", "ssl", "subprocess",
    "tempfile", "threading", "traceback", "unittest",
}  # fmt: skip


def test_imports_of_the_driver() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import runtime.driver; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "runtime.driver" in loaded
    assert not TOO_DEAR & set(loaded)
