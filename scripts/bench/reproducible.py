"""Whether a bootstrapped image is the same when it is made twice from one state of the archive: two stores, two runs.

Usage: .venv/bin/python scripts/bench/reproducible.py [SUITE] [PACKAGE...]

Ends with 1, and names both images, when they differ.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from images.store import Store  # noqa: E402


def made(base: Path, suite: str, packages: list[str]) -> str:
    """The id of the image, which follows from every byte of its layer and from its config."""
    store = Store.open(base)
    try:
        begin = time.perf_counter()
        image = store.bootstrap(suite, packages=packages)
        print(f"{image.id} {image.size_bytes / 1e6:.0f} MB in {time.perf_counter() - begin:.0f} s")
        return image.id
    finally:
        store.close()


def main() -> int:
    suite, *packages = sys.argv[1:] or ["debian:bookworm"]
    with tempfile.TemporaryDirectory(prefix="reproducible-", dir="/tmp") as base:
        ids = {made(Path(base, str(number)), suite, packages) for number in range(2)}
    print("the same" if len(ids) == 1 else "they differ")
    return len(ids) - 1


if __name__ == "__main__":
    sys.exit(main())
