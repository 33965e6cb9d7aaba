"""What our monitor brings into every process that starts a VM."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOO_DEAR = {
    "argparse", "asyncio", "dataclasses", "inspect", "logging", "multiprocessing", "shutil", "ssl", "subprocess", "tempfile",
    "traceback", "unittest", "urllib", "pathlib", "pyroute2",
}  # fmt: skip


def test_imports_of_the_monitor() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import hyper.vmm.main; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "hyper.vmm.machine" in loaded
    assert not TOO_DEAR & set(loaded)
