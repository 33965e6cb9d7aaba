"""Images that docker, podman, buildah and skopeo write are run here, and ours there: by a registry and by archives.

Each writer's image says in /word who wrote it; it has two layers where the writer can do that without running anything.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ambi.network import namespaces
from tests.harness import EngineUnderTest
from tests.peers import Dockerd
from tests.rawclient import RawClient
from tests.registrykit import docker_registry

pytestmark = pytest.mark.needs("docker", "dockerd", "podman", "buildah", "skopeo", "registry")
OCI = "application/vnd.oci.image.manifest.v1+json"
WRITERS = {
    "docker": ("application/vnd.docker.distribution.manifest.v2+json", "gzip"),
    "podman-v2s2": ("application/vnd.docker.distribution.manifest.v2+json", "gzip"),
    "podman-zstd": (OCI, "zstd"),
    "buildah-oci": (OCI, "gzip"),
}


class Peers:
    """An engine of ours and its peers in one network namespace with a registry, `address`."""

    def __init__(self, base: Path, engine: EngineUnderTest, docker: Dockerd, address: str) -> None:
        self.base, self.engine, self.docker, self.address = base, engine, docker, address
        self.roots = [f"--root={base}/storage", f"--runroot={base}/storage-run", "--storage-driver=vfs"]

    def run(self, *argv: str, **options: Any) -> bytes:
        """A tool of the containers family, in the namespace of the registry."""
        program, *rest = argv
        roots = [] if program == "skopeo" else self.roots
        argv = (*self.engine.entering, program, *roots, *rest)
        done = subprocess.run(argv, check=False, capture_output=True, timeout=120, **options)
        assert done.returncode == 0, (argv, done.stderr.decode())
        return done.stdout

    def ours(self, *args: str, **options: Any) -> bytes:
        done = self.engine.docker(*args, **options)
        assert done.returncode == 0, (args, done.stderr.decode())
        return done.stdout

    def theirs(self, *args: str, **options: Any) -> bytes:
        done = self.docker.docker(*args, **options)
        assert done.returncode == 0, (args, done.stderr.decode())
        return done.stdout

    def word(self, image: str) -> str:
        """What a container of ours reads in the image."""
        return self.ours("run", "--rm", "--network=none", image, "cat", "/word").decode()


@pytest.fixture(scope="module")
def peers(busybox_tar: Path) -> Iterator[Peers]:
    base = Path(tempfile.mkdtemp(prefix="ambi-", dir="/tmp"))
    engine = EngineUnderTest(base / "ours")
    base.joinpath("ours").mkdir()
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, base, ignore_errors=True)
        stack.callback(engine.destroy)
        engine.start()
        registry = docker_registry(base / "registry")
        address = namespaces.inside(engine.netns, registry.__enter__)
        stack.callback(registry.__exit__, None, None, None)
        docker = Dockerd()
        namespaces.inside(engine.netns, docker.__enter__)
        stack.callback(docker.__exit__, None, None, None)
        it = Peers(base, engine, docker, address)
        _write_images(it, busybox_tar)
        yield it


def _write_images(peers: Peers, busybox_tar: Path) -> None:
    base = peers.base
    for name in ("docker", "podman", "buildah"):
        (base / name).write_text(name)
    peers.theirs("import", str(busybox_tar), "busybox:1")
    peers.theirs("create", "--name=maker", "busybox:1", "sh")
    peers.theirs("cp", str(base / "docker"), "maker:/word")
    peers.theirs("commit", "maker", f"{peers.address}/docker:1")
    peers.theirs("push", f"{peers.address}/docker:1")
    for kind, options in (("v2s2", ["--format=v2s2"]), ("zstd", ["--format=oci", "--compression-format=zstd"])):
        archive = base / f"podman-{kind}.tar"  # of one layer alone podman would send the blob that the registry has
        shutil.copy(busybox_tar, archive)
        with tarfile.open(archive, "a") as tar:
            tar.add(base / "podman", "word")
            tar.add(base / "podman", f"only-{kind}")
        peers.run("podman", "import", "-q", str(archive), f"podman-{kind}:1")
        target = f"{peers.address}/podman-{kind}:1"
        peers.run("podman", "push", "-q", "--tls-verify=false", *options, f"podman-{kind}:1", target)
    peers.run("buildah", "from", "--name=maker", "scratch")
    peers.run("buildah", "add", "-q", "maker", str(busybox_tar), "/")
    peers.run("buildah", "copy", "-q", "maker", str(base / "buildah"), "/word")
    peers.run("buildah", "commit", "-q", "--format=oci", "maker", "localhost/written:1")
    peers.run(
        "buildah", "push", "-q", "--tls-verify=false", "localhost/written:1", f"docker://{peers.address}/buildah-oci:1"
    )


@pytest.mark.parametrize("writer", WRITERS)
def test_pushed_images_run_here(peers: Peers, writer: str) -> None:
    name = f"{peers.address}/{writer}:1"
    raw = json.loads(peers.run("skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{name}"))
    media_type, compression = WRITERS[writer]
    assert raw.get("mediaType", OCI) == media_type and all(x["mediaType"].endswith(compression) for x in raw["layers"])
    peers.ours("pull", "-q", name)
    assert peers.word(name) == writer.partition("-")[0]


@pytest.mark.needs("qemu")
def test_a_pushed_image_runs_as_a_vm(peers: Peers) -> None:
    name = f"{peers.address}/podman-zstd:1"
    asked = ("--rm", "--runtime=vm", "--network=none", "--storage-opt=size=200m", name, "sh", "-c")
    word, size = peers.ours("run", *asked, "cat /word; df -m / | awk 'END { print \" \" $2 }'").split()
    assert word == b"podman" and 150 < int(size) <= 200, "its disk is as large as was asked for"


@pytest.mark.parametrize("writer", ["docker", "podman-docker", "podman-oci", "buildah-docker", "skopeo-oci"])
def test_archives_from_pipes_run_here(peers: Peers, writer: str) -> None:
    for name in peers.ours("images", "-q", "--no-trunc").decode().split():
        peers.ours("rmi", "-f", name)
    archive, loaded = _saved(peers, writer)
    said = peers.ours("load", input=archive).decode()
    names = [line.partition(": ")[2] for line in said.splitlines()]
    assert len(names) == loaded
    written = [peers.word(name) for name in names if name != "busybox:1"]
    assert set(written) == {writer.partition("-")[0].replace("skopeo", "buildah")}


def _saved(peers: Peers, writer: str) -> tuple[bytes, int]:
    """An archive as it comes from the writer's pipe, and the number of its images, of which the last says who wrote it."""
    target = peers.base / "from-peer.tar"
    target.unlink(missing_ok=True)
    name = f"{peers.address}/docker:1"
    if writer == "docker":  # two images with a layer in common, and a parent link between their layers
        archive = peers.theirs("save", "busybox:1", name)
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            links = [json.load(tar.extractfile(x)) for x in tar if x.name.endswith("/json")]  # type: ignore[arg-type]
        assert any("parent" in link for link in links)
        return archive, 2
    if writer.startswith("podman"):
        return peers.run("podman", "save", "-q", f"--format={writer[7:]}-archive", "podman-v2s2:1"), 1
    if writer == "skopeo-oci":
        source = f"docker://{peers.address}/buildah-oci:1"
        peers.run("skopeo", "copy", "-q", "--src-tls-verify=false", source, f"oci-archive:{target}:box:1")
    else:
        peers.run("buildah", "push", "-q", "localhost/written:1", f"docker-archive:{target}:box:1")
        return target.read_bytes(), 2  # one image, with the name that it had and the one given here
    return target.read_bytes(), 1


def test_archives_with_parent_links_alone(peers: Peers) -> None:
    """What docker wrote before 1.10 is what it writes today without `manifest.json` and configs."""
    old = io.BytesIO()
    saved = peers.theirs("save", f"{peers.address}/docker:1")
    with tarfile.open(fileobj=io.BytesIO(saved)) as tar, tarfile.open(fileobj=old, mode="w") as target:
        for entry in tar:
            if "/" in entry.name or entry.name == "repositories":
                target.addfile(entry, tar.extractfile(entry) if entry.isreg() else None)
    peers.engine.docker("rmi", "-f", f"{peers.address}/docker:1")
    peers.ours("load", input=old.getvalue())
    assert peers.word(f"{peers.address}/docker:1") == "docker"


def test_ours_run_there(peers: Peers) -> None:
    """An image of two layers, committed here, by a registry and by archives through pipes."""
    peers.ours("pull", "-q", f"{peers.address}/podman-v2s2:1")
    peers.ours("run", "--name=maker", "--network=none", f"{peers.address}/podman-v2s2:1", "sh", "-c", "echo ambi >/word")
    name = f"{peers.address}/ours:1"
    peers.ours("commit", "maker", name)
    peers.ours("rm", "maker")
    peers.ours("push", "-q", name)
    inspected = json.loads(peers.run("skopeo", "inspect", "--tls-verify=false", f"docker://{name}"))
    assert len(inspected["Layers"]) == 2
    reading = ("--rm", "--network=none", name, "cat", "/word")
    peers.theirs("pull", "-q", name)
    assert peers.theirs("run", *reading) == b"ambi\n"
    peers.theirs("rmi", name)
    archive = peers.ours("save", name)
    peers.theirs("load", input=archive)
    assert peers.theirs("run", *reading) == b"ambi\n"
    podman = (
        "podman",
        "--runtime=runc",
        "--cgroup-manager=cgroupfs",
        "run",
        "--ulimit=nofile=1024:1024",
        "--ulimit=nproc=1024:1024",
        "--security-opt=seccomp=unconfined",
    )
    peers.run("podman", "pull", "-q", "--tls-verify=false", name)
    assert peers.run(*podman, *reading) == b"ambi\n"
    peers.run("podman", "rmi", name)
    peers.run("podman", "load", "-q", input=archive)
    assert peers.run(*podman, *reading) == b"ambi\n"


def test_copies_by_the_command(peers: Peers) -> None:
    """`ambi image copy` from a registry into a pipe, from that pipe to another repository, and into the store."""
    source, target = f"docker://{peers.address}/podman-zstd:1", f"docker://{peers.address}/copied/here:2"
    archive = peers.engine.ambi("image", "copy", source, "oci-archive:-:box:1", check=True).stdout
    said = peers.engine.ambi("image", "copy", "oci-archive:-", target, input=archive, check=True).stdout.decode()
    raw = peers.run("skopeo", "inspect", "--raw", "--tls-verify=false", target)
    assert raw == peers.run("skopeo", "inspect", "--raw", "--tls-verify=false", source)
    peers.engine.ambi("image", "copy", "-q", target, "copied:3", check=True)
    assert peers.word("copied:3") == "podman"
    file = peers.base / "copied.tar"
    peers.engine.ambi("image", "copy", "copied:3", f"docker-archive:{file}", check=True)
    config = json.loads(peers.run("skopeo", "inspect", "--config", f"docker-archive:{file}:copied:3"))
    assert config["rootfs"]["type"] == "layers" and said.startswith("Digest: sha256:")
    spdx = json.loads(peers.engine.ambi("image", "inspect", "--sbom", "copied:3", check=True).stdout)
    cyclonedx = json.loads(peers.engine.ambi("image", "inspect", "--sbom=cyclonedx", "copied:3", check=True).stdout)
    assert (spdx["spdxVersion"], cyclonedx["specVersion"]) == ("SPDX-2.3", "1.6")
    assert peers.engine.ambi("image", "inspect", "--sbom=swid", "copied:3").returncode == 125
    refused = peers.engine.ambi("image", "copy", f"docker://{peers.address}/copied/here:9", "oci-archive:-")
    assert refused.returncode == 125 and b"copied/here:9 not found" in refused.stderr and not refused.stdout
    refused = peers.engine.docker("search", "debian")
    assert refused.returncode == 1 and b"searching a registry is not supported" in refused.stderr


def test_skopeo_reaches_the_store_as_it_reaches_dockers(peers: Peers) -> None:
    socket = f"unix://{peers.engine.socket}"
    source = f"docker://{peers.address}/docker:1"
    peers.run("skopeo", "copy", "--src-tls-verify=false", "--dest-daemon-host", socket, source, "docker-daemon:by/skopeo:1")
    assert peers.word("by/skopeo:1") == "docker"
    target = f"docker-archive:{peers.base}/daemon.tar:by/skopeo:2"
    peers.run("skopeo", "copy", "--src-daemon-host", socket, "docker-daemon:by/skopeo:1", target)
    assert peers.ours("load", "-q", "-i", f"{peers.base}/daemon.tar") == b"Loaded image: by/skopeo:2\n"


def test_space_is_told_and_freed(peers: Peers, busybox_tar: Path) -> None:
    """Shared layers count once; what an instance needs is not reclaimed, and its image says who holds it."""
    for listed in peers.ours("images", "-q", "--no-trunc").decode().split():
        peers.ours("rmi", "-f", listed)
    peers.ours("import", str(busybox_tar), "base:1")
    peers.ours("run", "--name=maker", "--network=none", "base:1", "sh", "-c", "head -c 3000000 /dev/urandom >/extra")
    peers.ours("commit", "maker", "more:1")
    peers.ours("rm", "maker")
    base, more = (json.loads(peers.ours("inspect", name))[0]["Size"] for name in ("base:1", "more:1"))
    assert more == base + 3000000

    def usage() -> dict[str, Any]:
        return dict(json.loads(peers.engine.ambi("system", "df", "--format=json", check=True).stdout.splitlines()[0]))

    told = _asked(peers, "GET", "/system/df")
    assert (told["LayersSize"], told["LayersReclaimable"]) == (more, more)
    assert {row["RepoTags"][0]: (row["Size"], row["SharedSize"]) for row in told["Images"]} == {
        "base:1": (base, base), "more:1": (more, base)
    }  # fmt: skip
    peers.ours("create", "--name=holder", "--network=none", "base:1", "true")
    told = _asked(peers, "GET", "/system/df")
    assert (told["LayersSize"], told["LayersReclaimable"]) == (more, more - base)
    assert usage()["TotalCount"] == "2" and usage()["Active"] == "1"
    holder = peers.ours("inspect", "--format={{.Id}}", "holder").decode()[:12]
    refused = peers.engine.docker("rmi", "base:1")
    assert refused.returncode == 1 and f"container {holder} is using its referenced image" in refused.stderr.decode()
    store = peers.engine.data / "images"
    before = _disk_bytes(store)
    pruned = _asked(peers, "POST", '/images/prune?filters={"dangling":["false"]}')
    assert [x for x in pruned["ImagesDeleted"] if "Untagged" in x] == [{"Untagged": "more:1"}]
    assert pruned["SpaceReclaimed"] == before - _disk_bytes(store) > 3000000
    peers.ours("rmi", "-f", "base:1")
    assert _disk_bytes(store) > base / 2, "the layers are the holder's"
    peers.ours("start", "-a", "holder")
    peers.ours("rm", "holder")
    assert not [x for folder in ("blobs/sha256", "layers") for x in (store / folder).iterdir()]


def _asked(peers: Peers, method: str, path: str) -> dict[str, Any]:
    with contextlib.closing(RawClient(peers.engine.socket)) as client:
        status, answer = client.call(method, path)
    assert status == 200, answer
    return dict(answer)


def _disk_bytes(store: Path) -> int:
    files = [x for folder in ("blobs", "layers") for x in (store / folder).rglob("*") if x.is_file()]
    return sum(x.stat().st_blocks * 512 for x in files)
