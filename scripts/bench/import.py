"""Import of a root file system: our store against `docker import` of Debian's dockerd, pairs in turn, in one run.

Usage: .venv/bin/python scripts/bench/import.py [--tar FILE] [--rounds N] [--engine] [--json FILE]

Without --tar a Debian minbase is made with mmdebstrap first. Each round imports a tar of other content (one file is added),
so that nobody finds the layer already there, and removes the image again, outside the measured time. Ours includes the
fsync of everything; docker's does not. By default the store is called in a process of its own, its start-up counted; with
--engine the docker CLI imports into both engines.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from scripts.bench.common import debian  # noqa: E402
from tests.harness import EngineUnderTest  # noqa: E402
from tests.peers import Dockerd  # noqa: E402

OURS = """
import sys
from pathlib import Path
from images.store import Store
store = Store.open(Path(sys.argv[1]))
with open(sys.argv[2], "rb") as file:
    store.import_tar(file, "bench")
"""
REMOVE = """
import sys
from pathlib import Path
from images.store import Store
Store.open(Path(sys.argv[1])).remove("bench", in_use=lambda _: [])
"""


def freshen(archive: Path, number: int) -> None:
    """Give the archive a new file, so that its digest is new."""
    with tarfile.open(archive, "a") as tar:
        entry = tarfile.TarInfo(f"bench-{number}")
        data = f"{number} {time.time_ns()}".encode()
        entry.size = len(data)
        tar.addfile(entry, io.BytesIO(data))


def timed(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def python(program: str, *args: Path) -> None:
    subprocess.run([sys.executable, "-c", program, *args], check=True, cwd=ROOT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tar", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engine", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="bench-import-", dir="/tmp"))
    try:
        archive = base / "root.tar"
        if options.tar:
            shutil.copyfile(options.tar, archive)
        else:
            debian(archive)
        rows = measure(archive, base, options.rounds, engine=options.engine)
        report(rows, archive.stat().st_size)
        if options.json:
            options.json.write_text(json.dumps(rows))
    finally:
        shutil.rmtree(base, ignore_errors=True)


def import_by_engine(engine: EngineUnderTest, archive: Path) -> float:
    took = timed(lambda: engine.docker("import", str(archive), "bench", check=True, timeout=600))
    engine.docker("rmi", "bench", check=True)
    return took


def import_by_store(root: Path, archive: Path) -> float:
    took = timed(lambda: python(OURS, root, archive))
    python(REMOVE, root)
    return took


def measure(archive: Path, base: Path, rounds: int, *, engine: bool) -> dict[str, list[float]]:
    rows: dict[str, list[float]] = {"ours": [], "docker": []}
    ours = EngineUnderTest(base / "e") if engine else None
    if ours is not None:
        ours.start(vm=False)
    try:
        with Dockerd() as peer:
            for number in range(rounds + 1):
                freshen(archive, number)
                docker = timed(lambda: peer.docker("import", str(archive), "bench", check=True, timeout=600))
                peer.docker("rmi", "bench", check=True)
                mine = import_by_engine(ours, archive) if ours is not None else import_by_store(base / "images", archive)
                if number:  # the first round only warms
                    rows["docker"].append(docker)
                    rows["ours"].append(mine)
    finally:
        if ours is not None:
            ours.destroy()
    return rows


def report(rows: dict[str, list[float]], size: int) -> None:
    print(f"import of {size / 1e6:.0f} MB, {len(rows['ours'])} rounds, seconds: median (min)")
    for name, values in rows.items():
        print(f"  {name:8} {statistics.median(values):.2f} ({min(values):.2f})")
    pairs = [mine / docker for mine, docker in zip(rows["ours"], rows["docker"], strict=True)]
    print(f"  ours / docker, median of pairs: {statistics.median(pairs):.2f} (target: at most 1)")


if __name__ == "__main__":
    main()
