"""Pull, push, save and load: our engine against Debian's dockerd (and podman for pulls), pairs in turn, in one run.

Usage: .venv/bin/python scripts/bench/pull.py [--megabytes N] [--rounds N] [--layers N] [--zstd] [--pulls] [--disk DIR]
       [--json FILE]

The image is this host's /usr, as much of it as --megabytes says, in --layers layers, served by Debian's docker-registry on
loopback. Each pull goes to a freshly made ext4 with an engine started on it; its start is not counted. The ext4 is on a loop
device, of a file in --disk: with /dev/shm it is in memory.
`again` is a pull of an image of which all layers but one are there. Ours includes fsync of everything, docker's does not.
With --pulls nothing else is measured. With --zstd podman is the only peer: dockerd 20.10 reads no zstd of several frames.
Processor time of a pull is that of the engine's processes; it means something on a busy machine, too.
Memory is the highest sum of PSS of an engine's processes during its pulls, sampled. Disk is what the image takes
once it is loaded again.
All of it happens in a network namespace of its own.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import hashlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ambi.linux import process  # noqa: E402
from ambi.linux.net import loopback_up  # noqa: E402
from images.pull import Repository  # noqa: E402
from images.reference import parse  # noqa: E402
from images.registry.settings import Credentials, Settings  # noqa: E402
from scripts.bench.common import share_network, taken  # noqa: E402
from tests.harness import EngineUnderTest  # noqa: E402
from tests.peers import Dockerd  # noqa: E402
from tests.registrykit import docker_registry  # noqa: E402

Rows = dict[str, list[float]]


def make_layers(base: Path, megabytes: int, count: int, *, zstd: bool) -> list[tuple[Path, str]]:
    """Archives of parts of /usr with their diff IDs."""
    files, wanted = _files(), megabytes * 1_000_000 // count
    made = []
    for number in range(count):
        plain = base / f"layer-{number}.tar"
        size = 0
        with tarfile.open(plain, "w") as tar:
            for path in files:
                tar.add(path, recursive=False)
                size += path.lstat().st_size
                if size > wanted:
                    break
        diff_id = "sha256:" + hashlib.sha256(plain.read_bytes()).hexdigest()
        packed = plain.with_suffix(".tar.zst" if zstd else ".tar.gz")
        if zstd:
            subprocess.run(["zstd", "-q", "-3", plain, "-o", packed], check=True)
        else:
            with open(plain, "rb") as source, gzip.open(packed, "wb", 6) as target:
                shutil.copyfileobj(source, target, 1 << 20)
        plain.unlink()
        made.append((packed, diff_id))
    return made


def _files() -> Iterator[Path]:
    for folder in ("/usr/share", "/usr/lib/python3", "/usr/lib/python3.11", "/usr/lib/gcc", "/usr/bin", "/usr/lib"):
        for directory, _, names in os.walk(folder):
            for name in sorted(names):
                path = Path(directory, name)
                if path.is_file() and not path.is_symlink():
                    yield path


def push_layers(address: str, layers: list[tuple[Path, str]], name: str, *, zstd: bool) -> None:
    repository = Repository(parse(f"{address}/{name}"), Settings(), Credentials(), action="pull,push")
    kind = f"application/vnd.oci.image.layer.v1.tar+{'zstd' if zstd else 'gzip'}"
    config = json.dumps({
        "architecture": "amd64", "os": "linux", "config": {"Cmd": ["true"]},
        "rootfs": {"type": "layers", "diff_ids": [diff_id for _, diff_id in layers]},
    }).encode()  # fmt: skip
    entries = []
    for path, _ in layers:
        digest = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
        entries.append({"mediaType": kind, "digest": digest, "size": path.stat().st_size})
        if not repository.has_blob(digest):
            with open(path, "rb") as file:
                repository.upload(digest, path.stat().st_size, file)
    config_digest = "sha256:" + hashlib.sha256(config).hexdigest()
    repository.upload(config_digest, len(config), io.BytesIO(config))
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config_digest, "size": len(config)},
        "layers": entries,
    }
    repository.put_manifest("1", json.dumps(manifest).encode(), manifest["mediaType"])  # type: ignore[arg-type]


@contextmanager
def fresh_disk(base: Path, gigabytes: int = 6) -> Iterator[Path]:
    """A new, empty ext4, mounted."""
    image, point = base / "disk.img", base / "disk"
    with open(image, "wb") as file:
        file.truncate(gigabytes << 30)
    point.mkdir(exist_ok=True)
    subprocess.run(["mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, point], check=True)
    os.sync()  # what an engine before this one has left unwritten is not ours to wait for
    try:
        yield point
    finally:
        subprocess.run(["umount", "-l", point], check=True)
        image.unlink()


class PeakMemory:
    """The highest sum of PSS, in MiB, of the processes that `pids` gives, sampled while the `with` lasts."""

    def __init__(self, pids: Callable[[], list[int]]) -> None:
        self._pids, self._stop = pids, threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.mebibytes = 0.0

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            total = 0
            for pid in self._pids():
                try:
                    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
                except OSError:
                    continue
                total += next((int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")), 0)
            self.mebibytes = max(self.mebibytes, total / 1024)


def descendants(root: int) -> list[int]:
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                parent = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            parents.setdefault(parent, []).append(int(entry))
    found, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        waiting += parents.get(pid, [])
    return found


def cpu_seconds(pids: list[int]) -> float:
    """Processor time of these processes and of all of theirs that have ended."""
    ticks = 0
    for pid in pids:
        try:
            ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]))
        except OSError:
            continue
    return ticks / os.sysconf("SC_CLK_TCK")


def timed(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def ours(disk: Path, names: tuple[str, str, str], rows: Rows, memory: dict[str, float]) -> None:
    engine = EngineUnderTest(disk)
    share_network(engine)
    engine.start(vm=False)
    try:
        assert engine.process is not None
        pid = engine.process.pid
        with PeakMemory(lambda: descendants(pid)) as peak:
            run = functools.partial(engine.docker, check=True, timeout=600)
            _verbs("ours", run, names, rows, disk, lambda: descendants(pid))
            for part in ("blobs", "layers"):
                rows[f"disk {part}"] = [taken(engine.data / "images" / part)]
        memory["ours"] = max(memory.get("ours", 0), peak.mebibytes)
    finally:
        engine.destroy()


def dockers(disk: Path, names: tuple[str, str, str], rows: Rows, memory: dict[str, float]) -> None:
    (disk / "docker").mkdir()
    with Dockerd(disk / "docker") as peer, PeakMemory(peer.pids) as peak:
        run = functools.partial(peer.docker, check=True, timeout=600)
        _verbs("docker", run, names, rows, disk, peer.pids)
        rows["disk docker"] = [taken(disk / "docker" / "data" / "overlay2")]
    memory["docker"] = max(memory.get("docker", 0), peak.mebibytes)


def _verbs(
    who: str,
    docker: Callable[..., object],
    names: tuple[str, str, str],
    rows: Rows,
    disk: Path,
    pids: Callable[[], list[int]],
) -> None:
    """names: the image, one that shares all layers but one with it, and the first one's name at a second registry or ""."""
    before = cpu_seconds(pids())
    image, more, second = names
    row = rows.setdefault
    row(f"pull {who}", []).append(timed(lambda: docker("pull", "-q", image)))
    row(f"cpu {who}", []).append(cpu_seconds(pids()) - before)
    row(f"again {who}", []).append(timed(lambda: docker("pull", "-q", more)))
    if not second:
        return
    docker("tag", image, second)
    row(f"push {who}", []).append(timed(lambda: docker("push", second)))
    archive = disk / "saved.tar"
    row(f"save {who}", []).append(timed(lambda: docker("save", "-o", str(archive), image)))
    docker("rmi", image, second, more)
    row(f"load {who}", []).append(timed(lambda: docker("load", "-q", "-i", str(archive))))
    archive.unlink()


def podman(disk: Path, image: str, more: str, rows: Rows, memory: dict[str, float]) -> None:
    roots = ["--root", f"{disk}/podman", "--runroot", f"{disk}/podman-run", "--storage-driver", "overlay"]
    for verb, name in (("pull", image), ("again", more)):
        begin, before = time.perf_counter(), sum(os.times()[2:4])
        process = subprocess.Popen(["podman", *roots, "pull", "-q", "--tls-verify=false", name], stdout=subprocess.DEVNULL)
        with PeakMemory(lambda: descendants(process.pid)) as peak:  # noqa: B023 - it ends in this turn
            status = process.wait()
        rows.setdefault(f"{verb} podman", []).append(time.perf_counter() - begin)
        if verb == "pull":
            rows.setdefault("cpu podman", []).append(sum(os.times()[2:4]) - before)
        memory["podman"] = max(memory.get("podman", 0), peak.mebibytes)
        assert status == 0, f"podman pull {name} ended with {status}"
    subprocess.run(["podman", *roots, "rmi", "-a", "-f"], check=False, capture_output=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=700)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--zstd", action="store_true")
    parser.add_argument("--pulls", action="store_true")
    parser.add_argument("--disk", type=Path, default=Path("/tmp"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    process.unshare(process.CLONE_NEWNET)
    loopback_up()
    base = Path(tempfile.mkdtemp(prefix="bench-pull-", dir="/tmp"))
    place = Path(tempfile.mkdtemp(prefix="bench-pull-", dir=options.disk))
    rows: Rows = {}
    memory: dict[str, float] = {}
    try:
        layers = make_layers(base, options.megabytes, options.layers, zstd=options.zstd)
        extra = (
            make_layers(base / "extra", options.megabytes // options.layers, 1, zstd=options.zstd)
            if (base / "extra").mkdir() is None
            else []
        )
        with docker_registry(base / "one") as first, docker_registry(base / "two") as second:
            push_layers(first, layers, "bench:1", zstd=options.zstd)
            push_layers(first, [*layers[:-1], *extra], "more:1", zstd=options.zstd)
            for number in range(options.rounds):
                target = "" if options.pulls else f"{second}/round{number}"
                if not options.zstd:
                    with fresh_disk(place) as disk:
                        dockers(disk, (f"{first}/bench:1", f"{first}/more:1", target and f"{target}/docker:1"), rows, memory)
                with fresh_disk(place) as disk:
                    ours(disk, (f"{first}/bench:1", f"{first}/more:1", target and f"{target}/ours:1"), rows, memory)
                if shutil.which("podman"):
                    with fresh_disk(place) as disk:
                        podman(disk, f"{first}/bench:1", f"{first}/more:1", rows, memory)
        report(rows, memory, sum(path.stat().st_size for path, _ in layers), options.megabytes)
        if options.json:
            options.json.write_text(json.dumps({"seconds": rows, "peak_mebibytes": memory}))
    finally:
        shutil.rmtree(base, ignore_errors=True)
        shutil.rmtree(place, ignore_errors=True)


def report(rows: Rows, memory: dict[str, float], packed: int, megabytes: int) -> None:
    print(f"image of {megabytes} MB, {packed / 1e6:.0f} MB compressed; seconds: median (min)")
    goals = {
        "pull": "1/3, aim 1/4",
        "cpu": "told: of the pull, seconds of processor time",
        "again": "1/3",
        "push": "1",
        "load": "1/2",
        "save": "1/2",
    }
    for verb, goal in goals.items():
        mine = rows.get(f"{verb} ours")
        if mine is None:
            continue
        line = f"  {verb:6} ours {statistics.median(mine):6.2f} ({min(mine):.2f})"
        for peer in ("docker", "podman"):
            if values := rows.get(f"{verb} {peer}"):
                ratio = statistics.median(a / b for a, b in zip(mine, values, strict=True))
                line += f"   {peer} {statistics.median(values):6.2f} ({min(values):.2f})  ratio {ratio:.2f}"
        print(f"{line}   (goal {goal})")
    print("  disk, MB: " + ", ".join(f"{name[5:]} {found[0]:.0f}" for name, found in rows.items() if name[:5] == "disk "))
    print("  peak PSS, MiB: " + ", ".join(f"{name} {value:.0f}" for name, value in memory.items()))


if __name__ == "__main__":
    main()
