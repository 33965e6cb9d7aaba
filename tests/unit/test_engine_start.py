"""What an engine loads when it starts: not what only a network, a pull or a document needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

LATER = {"urllib3", "pyroute2", "dnslib", "spdx_tools", "cyclonedx", "asyncio", "h11"}


def test_heavy_modules_are_loaded_at_their_first_use() -> None:
    code = "import sys, ambi.engine.daemon, ambi.engine.engine, ambi.api.server; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert not LATER & set(done.stdout.split())
