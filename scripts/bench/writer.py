"""The streaming layer writer against GNU tar and mkfs.erofs, in turn, in one run; and where its time goes.

Usage: .venv/bin/python scripts/bench/writer.py [--tar FILE] [--rounds N] [--disk DIRECTORY] [--json FILE]

Both make a layer file of one plain tar, a Debian minbase by default, on the same file system (--disk), without fsync: ours
in one pass, as a worker does that is alone (the tar is read and hashed in a second thread), the peers by unpacking to a
directory first. Phases are of our pass's first thread. The goal is a third of the peers' time.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from images.layers.ahead import Ahead  # noqa: E402
from images.layers.convert import Converted, convert  # noqa: E402
from images.layers.erofs import ErofsWriter  # noqa: E402
from images.layers.worker import READ_BYTES  # noqa: E402
from scripts.bench.common import debian  # noqa: E402

CHUNK = READ_BYTES
LIMIT = 64 << 30
MIB = 1 << 20


def chunks(path: Path) -> Iterator[bytes]:
    with open(path, "rb", buffering=0) as file:
        while data := file.read(CHUNK):
            yield data


class Timed(ErofsWriter):
    """A sink that measures itself: `spent` by phase, in seconds."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self.spent = {"write bodies": 0.0, "directories and metadata": 0.0}
        self._inside = False

    def _within(self, phase: str, action: Callable[..., Any], *arguments: Any) -> Any:
        if self._inside:
            return action(*arguments)
        self._inside, begin = True, time.perf_counter()
        try:
            return action(*arguments)
        finally:
            self.spent[phase] += time.perf_counter() - begin
            self._inside = False

    def flush(self) -> None:
        self._within("write bodies", super().flush)

    def finish(self, root: Any, uuid: bytes) -> int:
        size: int = self._within("directories and metadata", super().finish, root, uuid)
        return size


def ours(tar: Path, target: Path) -> tuple[float, Converted, dict[str, float]]:
    fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    ahead = Ahead()
    ahead.start(lambda: None)
    gc.disable()
    try:
        sink = Timed(fd)
        begin, cpu = time.perf_counter(), time.thread_time()
        found = convert(chunks(tar), sink, LIMIT, ahead.run)
        took = time.perf_counter() - begin
        sink.spent["wait for the other thread"] = took - (time.thread_time() - cpu)
        return took, found, sink.spent
    finally:
        gc.enable()
        os.close(fd)


def peers(tar: Path, target: Path, scratch: Path) -> tuple[float, float]:
    """Seconds of tar, and of mkfs.erofs."""
    tree = scratch / "tree"
    tree.mkdir()
    begin = time.perf_counter()
    subprocess.run(["tar", "--xattrs", "--xattrs-include=*", "--numeric-owner", "-xpf", tar, "-C", tree], check=True)
    unpacked = time.perf_counter()
    target.unlink(missing_ok=True)
    subprocess.run(["mkfs.erofs", "--quiet", target, tree], check=True, stdout=subprocess.DEVNULL)
    done = time.perf_counter()
    shutil.rmtree(tree)
    return unpacked - begin, done - unpacked


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tar", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--disk", type=Path, default=Path("/tmp"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.disk) as name:
        base = Path(name)
        tar = options.tar or debian(base / "debian.tar")
        runs = []
        for _ in range(options.rounds):
            took, found, spent = ours(tar, base / "ours.erofs")
            unpack, make = peers(tar, base / "peers.erofs", base)
            runs.append((took, spent, unpack, make))
    report(runs, found, options.json)
    return 0


def report(runs: list[tuple[float, dict[str, float], float, float]], found: Converted, target: Path | None) -> None:
    took = statistics.median(run[0] for run in runs)
    phases = {phase: statistics.median(run[1][phase] for run in runs) for phase in runs[0][1]}
    phases["read headers, build the tree"] = took - sum(phases.values())
    unpack, make = (statistics.median(run[at] for run in runs) for at in (2, 3))
    ratio = statistics.median(run[0] / (run[2] + run[3]) for run in runs)
    print(f"{found.tar_bytes / MIB:.0f} MiB, {found.entries} entries; medians of {len(runs)} pairs")
    print(f"ours          {took:.3f} s  {found.tar_bytes / MIB / took:7.0f} MiB/s {found.entries / took:8.0f} entries/s")
    for phase, seconds in phases.items():
        print(f"  {phase:40} {seconds:.3f} s")
    both = unpack + make
    print(f"tar, mkfs     {both:.3f} s  {found.tar_bytes / MIB / both:7.0f} MiB/s {found.entries / both:8.0f} entries/s")
    print(f"  tar {unpack:.3f} s, mkfs.erofs {make:.3f} s")
    print(f"ratio {ratio:.2f} (goal 0.33)")
    if target:
        figures = {"ours": took, "phases": phases, "tar": unpack, "mkfs": make, "ratio": ratio, "entries": found.entries}
        target.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    sys.exit(main())
