"""What the benchmarks share: a real root file system, space on the disk, an engine in the host's network namespace."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.harness import EngineUnderTest


def debian(archive: Path) -> Path:
    """A Debian minbase as a tar at `archive`, made with mmdebstrap."""
    subprocess.run(["mmdebstrap", "--variant=minbase", "--quiet", "bookworm", archive], check=True, stdin=subprocess.DEVNULL)
    return archive


def taken(root: Path) -> float:
    """Megabytes on the disk below `root`, each inode once; what is mounted there does not count."""
    inodes, device = {}, os.lstat(root).st_dev
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if os.lstat(os.path.join(folder, name)).st_dev == device]
        for path in (folder, *(os.path.join(folder, name) for name in files)):
            status = os.lstat(path)
            inodes[status.st_ino] = status.st_blocks * 512
    return sum(inodes.values()) / 1e6


def share_network(engine: EngineUnderTest) -> None:
    """Have the engine, which is not started yet, run where the caller's registries are."""
    os.close(engine.netns)
    engine.netns = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
