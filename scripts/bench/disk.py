"""Disk that five images of one base take: our store's against dockerd's overlay2, each with a data root of its own.

Usage: .venv/bin/python scripts/bench/disk.py [--disk DIRECTORY]

The base is a Debian minbase; each image has a layer of 5 MB more. All are pushed to a registry of the run's own and pulled
by both, so that both keep what a pull leaves. Counted are allocated blocks, each file once.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from scripts.bench.common import debian, share_network, taken  # noqa: E402
from tests.harness import EngineUnderTest  # noqa: E402
from tests.peers import Dockerd  # noqa: E402
from tests.registrykit import docker_registry  # noqa: E402

IMAGES = 5
MIB = 1 << 20


def docker(socket: Path, *args: str, data: bytes | None = None) -> None:
    subprocess.run(["docker", "-H", f"unix://{socket}", *args], input=data, check=True, stdout=subprocess.DEVNULL)


def push_images(socket: Path, registry: str, base: Path) -> list[str]:
    """Names of IMAGES images of one base, in the registry."""
    docker(socket, "import", str(debian(base / "debian.tar")), "base")
    names = []
    for number in range(IMAGES):
        name = f"{registry}/disk/image{number}:1"
        docker(socket, "create", "--network", "none", "--name", f"c{number}", "base", "true")
        (base / "more").write_bytes(os.urandom(5 * MIB))
        docker(socket, "cp", str(base / "more"), f"c{number}:/more")
        docker(socket, "commit", f"c{number}", name)
        docker(socket, "push", "--quiet", name)
        docker(socket, "rm", "-f", f"c{number}")
        names.append(name)
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--disk", type=Path, default=Path("/tmp"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ambi-", dir=options.disk) as name:
        base = Path(name)
        with docker_registry(base / "registry") as registry:
            with Dockerd(_made(base / "source")) as source:
                names = push_images(source.socket, registry, base)
            with Dockerd(_made(base / "peer")) as peer:
                for image in names:
                    docker(peer.socket, "pull", "--quiet", image)
                theirs = taken(peer.base / "data" / "overlay2")
            layers, blobs = ours(_made(base / "ours"), names)
    print(f"{IMAGES} images of one base; dockerd's overlay2 {theirs:.0f} MB")
    print(f"ours {(layers + blobs):.0f} MB ({(layers + blobs) / theirs:.2f} of it)")
    print(f"  layer files {layers:.0f} MB ({layers / theirs:.2f}), compressed blobs {blobs:.0f} MB")
    return 0


def ours(base: Path, names: list[str]) -> tuple[float, float]:
    """Megabytes of layer files, and of blobs."""
    engine = EngineUnderTest(base)
    share_network(engine)
    engine.start(vm=False)
    try:
        for image in names:
            docker(engine.socket, "pull", "--quiet", image)
        return taken(engine.data / "images" / "layers"), taken(engine.data / "images" / "blobs")
    finally:
        engine.destroy()


def _made(path: Path) -> Path:
    path.mkdir()
    return path


if __name__ == "__main__":
    sys.exit(main())
