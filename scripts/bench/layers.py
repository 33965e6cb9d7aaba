"""Start of a container from an image of many layers against one of a single layer, in turn, in one run.

Usage: .venv/bin/python scripts/bench/layers.py [--layers N] [--rounds N]

Timed is from POST /start to the end of POST /wait of a container that runs `true` without a network, over the engine's
socket; the container is made before. The goal is a ratio of at most 1.2.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.harness import EngineUnderTest  # noqa: E402
from tests.layerkit import member, tar_bytes  # noqa: E402
from tests.rawclient import RawClient  # noqa: E402
from tests.rootfs import busybox_tar  # noqa: E402


def archive(base: Path, count: int, name: str) -> bytes:
    """A docker archive: busybox below `count` - 1 layers of a file each."""
    layers = [busybox_tar(base / "busybox.tar").read_bytes()]
    layers += [tar_bytes(member(f"file{number}", b"%d" % number)) for number in range(1, count)]
    diff_ids = ["sha256:" + hashlib.sha256(layer).hexdigest() for layer in layers]
    config = {
        "architecture": "amd64", "os": "linux", "config": {"Cmd": ["true"]},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    }  # fmt: skip
    files = {f"{number}.tar": layer for number, layer in enumerate(layers)} | {"c.json": json.dumps(config).encode()}
    listed = [{"Config": "c.json", "RepoTags": [name], "Layers": [f"{number}.tar" for number in range(count)]}]
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as tar:
        for path, data in {**files, "manifest.json": json.dumps(listed).encode()}.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return target.getvalue()


def once(client: RawClient, image: str) -> float:
    """Seconds."""
    body = {"Image": image, "HostConfig": {"NetworkMode": "none"}}
    status, made = client.call("POST", "/containers/create", body)
    assert status == 201, made
    begin = time.perf_counter()
    assert client.call("POST", f"/containers/{made['Id']}/start")[0] == 204
    assert client.call("POST", f"/containers/{made['Id']}/wait")[1]["StatusCode"] == 0
    spent = time.perf_counter() - begin
    assert client.call("DELETE", f"/containers/{made['Id']}?force=1")[0] == 204
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="bench-layers-", dir="/tmp"))
    engine = EngineUnderTest(base)
    try:
        engine.start(vm=False)
        for count in (1, options.layers):
            engine.docker("load", input=archive(base, count, f"layers:{count}"), check=True)
        with contextlib.closing(RawClient(engine.socket)) as client:
            first = {count: once(client, f"layers:{count}") for count in (1, options.layers)}
            pairs = [[once(client, f"layers:{count}") for count in (1, options.layers)] for _ in range(options.rounds)]
    finally:
        engine.destroy()
        shutil.rmtree(base, ignore_errors=True)
    one, many = ([pair[side] * 1000 for pair in pairs] for side in (0, 1))
    ratio = statistics.median(b / a for a, b in pairs)
    shown = [
        f"{count} layers {statistics.median(x):.1f} ms ({min(x):.1f})" for count, x in ((1, one), (options.layers, many))
    ]
    print(f"{', '.join(shown)}; ratio {ratio:.2f}, of the fastest {min(many) / min(one):.2f} (goal 1.2)")
    print("the first start, which mounts the layers: " + ", ".join(f"{n}: {s * 1000:.0f} ms" for n, s in first.items()))


if __name__ == "__main__":
    main()
