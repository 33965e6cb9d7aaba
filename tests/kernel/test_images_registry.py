"""Pull and push with Debian's registry, and with one that misbehaves."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ambi.core.errors import AmbiError, Conflict, Corrupt, Forbidden, InvalidRequest, NotFound, Unavailable, Unsupported
from images import copy, pull, reference, referrers
from images.registry.settings import Credentials
from images.store import Image, Store
from tests.layerkit import directory, member, tar_bytes
from tests.registrykit import HTPASSWD, PASSWORD, USER, Answer, FaultyRegistry, basic, docker_registry

GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
ANN = Credentials(USER, PASSWORD)


@pytest.fixture
def store(short_tmp: Path) -> Iterator[Store]:
    it = Store.open(short_tmp / "images")
    yield it
    it.close()


@pytest.fixture
def other(short_tmp: Path) -> Iterator[Store]:
    it = Store.open(short_tmp / "other")
    yield it
    it.close()


@pytest.fixture
def registry() -> Iterator[FaultyRegistry]:
    it = FaultyRegistry()
    yield it
    it.close()


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("images.registry.stream.PAUSE_S", 0.01)


def layer(seed: int, size: int = 300_000) -> tuple[bytes, str, str]:
    """A gzip layer that does not compress: blob, media type, diff ID."""
    body = hashlib.shake_128(str(seed).encode()).digest(size)
    tar = tar_bytes(directory(f"d{seed}"), member(f"d{seed}/f", body))
    return gzip.compress(tar, 1, mtime=0), GZIP, "sha256:" + hashlib.sha256(tar).hexdigest()


def contents(store: Store) -> set[str]:
    """All files of the store but its bookkeeping and what is kept for the next attempt."""
    folders = ("blobs", "layers", "ingest")
    return {str(p.relative_to(store.root)) for name in folders for p in (store.root / name).rglob("*") if p.is_file()}


def imported(store: Store, name: str, text: str = "x") -> str:
    return store.import_tar(io.BytesIO(tar_bytes(member("f", text.encode()))), name).id


# Debian's registry


def test_there_and_back(store: Store, other: Store, short_tmp: Path) -> None:
    with docker_registry(short_tmp / "registry") as address:
        image_id = imported(store, f"{address}/team/app:1")
        pushed = store.push(f"{address}/team/app:1")
        steps: list[str] = []
        pulled = other.pull(f"{address}/team/app:1", progress=lambda step: steps.append(step.status))
        assert (pulled.image.id, pulled.digest, pulled.new) == (image_id, pushed.digest, True)
        assert pulled.image.names == (f"{address}/team/app:1",)
        assert pulled.image.digests == (f"{address}/team/app@{pushed.digest}",)
        assert steps[0] == "Pulling from team/app" and steps[-1] == "Pull complete"
        assert other.pull(f"{address}/team/app:1").new is False
        removed = other.remove(f"{address}/team/app:1", in_use=lambda _: [])
        assert [x.name for x in removed if x.name] == [f"{address}/team/app:1", f"{address}/team/app@{pushed.digest}"]
        assert other.list() == []
        assert other.pull(f"{address}/team/app@{pushed.digest}").image.id == image_id
        assert other.resolve(f"{address}/team/app@{pushed.digest}").id == image_id
        told: list[str] = []
        store.push(f"{address}/team/app:1", progress=lambda step: told.append(step.status))
        assert "Layer already exists" in told and "Pushed" not in told
        store.tag(store.resolve(image_id), f"{address}/other/app:2")
        told.clear()
        store.push(f"{address}/other/app:2", progress=lambda step: told.append(step.status))
        assert "Mounted from team/app" in told
        with pytest.raises(NotFound, match=r"manifest for .*/team/app:9 not found: manifest unknown"):
            other.pull(f"{address}/team/app:9")
        with pytest.raises(NotFound, match="An image does not exist locally with the tag"):
            other.push(f"{address}/nothing/here:1")


def test_log_in(store: Store, other: Store, short_tmp: Path) -> None:
    with docker_registry(short_tmp / "registry", htpasswd=HTPASSWD) as address:
        imported(store, f"{address}/app:1")
        with pytest.raises(Forbidden, match="denied"):
            store.push(f"{address}/app:1")
        store.push(f"{address}/app:1", ANN)
        with pytest.raises(
            NotFound, match=r"pull access denied for .*, repository does not exist or may require 'docker login'"
        ):
            other.pull(f"{address}/app:1")
        with pytest.raises(NotFound, match="pull access denied"):
            other.pull(f"{address}/app:1", Credentials(USER, "wrong"))
        assert other.pull(f"{address}/app:1", ANN).new


@pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning")
def test_tls(store: Store, short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loopback is used without a valid certificate, as Docker does; any other name is not."""
    key, certificate = short_tmp / "key.pem", short_tmp / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=registry.test", "-addext", "subjectAltName=DNS:registry.test", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    with docker_registry(short_tmp / "registry", tls=(certificate, key)) as address:
        imported(store, f"{address}/app:1")
        assert store.push(f"{address}/app:1").tag == "1"
        port = address.rpartition(":")[2]
        name = f"registry.test:{port}"
        _resolve(monkeypatch, "registry.test")
        with pytest.raises(Unavailable, match="certificate verify failed") as caught:
            store.pull(f"{name}/app:1")
        assert f"/etc/ambi/certs.d/{name}/ca.crt" in str(caught.value.hint)
        folder = short_tmp / "certs.d" / name
        folder.mkdir(parents=True)
        (folder / "ca.crt").write_bytes(certificate.read_bytes())
        monkeypatch.setattr("images.registry.settings._CERTIFICATES", (short_tmp / "certs.d",))
        assert store.pull(f"{name}/app:1").image.names


def _resolve(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """`name` is at 127.0.0.1: there is no name service in a test."""
    import socket

    original = socket.getaddrinfo

    def look_up(host: str, *args: object, **more: object) -> object:
        return original("127.0.0.1" if host == name else host, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


def test_with_skopeo(store: Store, short_tmp: Path) -> None:
    """What we push others read, what they push we read: Docker's and the OCI's types, gzip and zstd."""
    with docker_registry(short_tmp / "registry") as address:
        image_id = imported(store, f"{address}/ours:1")
        store.push(f"{address}/ours:1")
        for form, target in (("oci", "oci"), ("v2s2", "docker")):
            copy = ["skopeo", "copy", "-q", "--src-tls-verify=false", "--dest-tls-verify=false", "--format", form]
            done = subprocess.run(
                [*copy, f"docker://{address}/ours:1", f"docker://{address}/{target}:1"],
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            assert store.pull(f"{address}/{target}:1").image.layers == store.resolve(image_id).layers


# A registry that misbehaves


def test_index(store: Store, registry: FaultyRegistry) -> None:
    """The manifest of this platform is chosen; attestations and other platforms are passed over."""
    right = registry.add_image([layer(1)], "amd64")
    arm = registry.add_image([layer(2)], "arm", architecture="arm64")
    unknown = registry.add_image([layer(3)], "note")
    index: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [
            {**registry.add_manifest(arm, "arm"), "platform": {"os": "linux", "architecture": "arm64"}},
            {**registry.add_manifest(unknown, "note"), "platform": {"os": "linux", "architecture": "amd64"},
             "annotations": {"vnd.docker.reference.type": "attestation-manifest"}},
            {**registry.add_manifest(right, "amd64"), "platform": {"os": "linux", "architecture": "amd64"}},
        ],
    }  # fmt: skip
    top = registry.add_manifest(index, "1")
    pulled = store.pull(f"{registry.address}/app:1")
    assert pulled.image.layers == (layer(1)[2],) and pulled.digest == top["digest"]
    index["manifests"] = index["manifests"][:2]
    registry.add_manifest(index, "2")
    with pytest.raises(NotFound, match="no matching manifest for linux/amd64") as caught:
        store.pull(f"{registry.address}/app:2")
    assert "linux/arm64" in str(caught.value.hint)
    with pytest.raises(Unsupported, match="is for linux/arm64"):
        store.pull(f"{registry.address}/app:arm")


def test_cut_connections_go_on(store: Store, registry: FaultyRegistry) -> None:
    manifest = registry.add_image([layer(1), layer(2)])
    path = f"/v2/app/blobs/{manifest['layers'][0]['digest']}"
    registry.cut = {path: [1000, 70_000, 0]}
    assert store.pull(f"{registry.address}/app:1").image.layers == (layer(1)[2], layer(2)[2])
    starts = [headers.get("range") for _, asked, headers in registry.asked if asked == path]
    assert starts == [None, "bytes=1000-", "bytes=71000-", "bytes=71000-"]


def test_cut_connections_without_ranges(store: Store, registry: FaultyRegistry) -> None:
    registry.ranges = False
    manifest = registry.add_image([layer(1)])
    registry.cut = {f"/v2/app/blobs/{manifest['layers'][0]['digest']}": [100_000]}
    assert store.pull(f"{registry.address}/app:1").new


def test_a_pull_that_failed_goes_on_later(store: Store, registry: FaultyRegistry) -> None:
    manifest = registry.add_image([layer(1), layer(2)])
    bad = f"/v2/app/blobs/{manifest['layers'][1]['digest']}"
    before = contents(store)
    registry.cut = {bad: [50_000] + [0] * 10}
    with pytest.raises(Unavailable, match="cannot be got") as caught:
        store.pull(f"{registry.address}/app:1")
    assert "goes on where it was cut" in str(caught.value.hint)
    assert contents(store) == before
    registry.cut = {}
    registry.asked.clear()
    store.pull(f"{registry.address}/app:1")
    ranges = {path: headers.get("range") for _, path, headers in registry.asked}
    assert ranges[bad] == "bytes=50000-"
    assert not list((store.root / "partial").iterdir())


def test_a_prune_of_everything_takes_what_was_cut(store: Store, registry: FaultyRegistry) -> None:
    """It tells of its bytes; and takes nothing while something comes in."""
    manifest = registry.add_image([layer(1)])
    registry.cut = {f"/v2/app/blobs/{manifest['layers'][0]['digest']}": [50_000] + [0] * 10}
    with pytest.raises(Unavailable, match="cannot be got"):
        store.pull(f"{registry.address}/app:1")
    (left,) = (store.root / "partial").iterdir()
    taken = left.stat().st_blocks * 512
    with store.hold(["sha256:" + "0" * 64]):
        assert store.prune(lambda _: True, everything=True, in_use=lambda _: []) == ([], 0)
    assert store.prune(lambda _: True, in_use=lambda _: []) == ([], 0) and left.exists()
    assert store.prune(lambda _: True, everything=True, in_use=lambda _: []) == ([], taken) and taken >= 50_000
    assert not left.exists()


FAULTS: dict[str, tuple[int | None, dict[str, str], bytes | None, type[AmbiError], str]] = {
    "wrong bytes": (200, {}, b"x" * len(layer(2)[0]), Corrupt, "is damaged"),
    "too long": (200, {}, b"x" * 400_000, Corrupt, "is damaged"),
    "not there": (404, {}, b'{"errors":[{"code":"BLOB_UNKNOWN","message":"gone"}]}', NotFound, "gone"),
    "forbidden": (403, {}, b"no \x1b[31mway", Forbidden, r"no \[31mway"),
    "no redirect to a file": (302, {"Location": "file:///etc/passwd"}, b"", Forbidden, "not safe"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_leave_nothing(store: Store, registry: FaultyRegistry, name: str) -> None:
    """An error names the layer and says why; the store is as before; the next pull works."""
    status, fields, body, kind, text = FAULTS[name]
    manifest = registry.add_image([layer(1), layer(2)])
    path = f"/v2/app/blobs/{manifest['layers'][1]['digest']}"
    registry.fault = lambda method, asked, headers: (status or 200, fields, body or b"") if asked == path else None
    before = contents(store)
    with pytest.raises(kind, match=text):
        store.pull(f"{registry.address}/app:1")
    assert contents(store) == before and store.list() == []
    registry.fault = lambda *_: None
    assert store.pull(f"{registry.address}/app:1").new


def test_manifests_that_lie(store: Store, registry: FaultyRegistry) -> None:
    blob, kind, diff_id = layer(1)
    address = registry.address
    registry.add_image([(blob, kind, layer(2)[2])], "diff")
    registry.add_image([(blob, "application/json", diff_id)], "type")
    registry.add_image([], "none")
    manifest = registry.add_image([(blob, kind, diff_id)], "size")
    manifest["layers"][0]["size"] += 1
    registry.add_manifest(manifest, "size")
    manifest["layers"][0]["digest"] = "sha256:../../etc/passwd"
    registry.add_manifest(manifest, "digest")
    registry.manifests["text"] = ("application/vnd.oci.image.manifest.v1+json", b"[" * 100_000)
    registry.manifests["one"] = ("application/vnd.docker.distribution.manifest.v1+prettyjws", b'{"schemaVersion":1}')
    registry.manifests["big"] = ("application/vnd.oci.image.manifest.v1+json", b" " * (5 << 20))
    cases: dict[str, tuple[type[AmbiError], str]] = {
        "diff": (Corrupt, "its content has the digest"),
        "type": (Unsupported, "not a file system"),
        "none": (Unsupported, "no layers"),
        "size": (Unavailable, "cannot be got"),
        "digest": (Corrupt, "sha256 digest"),
        "text": (Corrupt, "is not JSON"),
        "one": (Unsupported, "schema 1"),
        "big": (Corrupt, "larger than"),
    }
    before = contents(store)
    for tag, (error, text) in cases.items():
        with pytest.raises(error, match=text):
            store.pull(f"{address}/app:{tag}")
        assert contents(store) == before, tag
    registry.fault = lambda method, path, headers: (
        200,
        {"Docker-Content-Digest": "sha256:" + "0" * 64},
        b'{"schemaVersion":2}',
    )
    with pytest.raises(Corrupt, match="its digest is"):
        store.pull(f"{address}/app:1")


def test_busy_registries_are_asked_again(store: Store, registry: FaultyRegistry) -> None:
    registry.add_image([layer(1)])
    answers: list[Answer] = [(429, {"Retry-After": "0"}, b""), (503, {"Retry-After": "0"}, b"")]
    registry.fault = lambda *_: answers.pop(0) if answers else None
    assert store.pull(f"{registry.address}/app:1").new
    registry.fault = lambda *_: (429, {"Retry-After": "0"}, b'{"errors":[{"code":"TOOMANYREQUESTS","message":"slow down"}]}')
    with pytest.raises(Unavailable, match="slow down"):
        store.pull(f"{registry.address}/app:1")


def test_tokens(store: Store, registry: FaultyRegistry) -> None:
    """A token is asked for with the scope; one that expires in mid-pull is asked for again; it goes to no other host."""
    manifest = registry.add_image([layer(1)])
    elsewhere = FaultyRegistry()
    elsewhere.blobs = registry.blobs
    digest = manifest["layers"][0]["digest"]
    issued: list[str] = []

    def fault(method: str, path: str, headers: dict[str, str]) -> Answer | None:
        if path.startswith("/token"):
            assert headers["authorization"] == basic(USER, PASSWORD)
            assert "service=here" in path and "scope=repository%3Aapp%3Apull" in path
            issued.append(f"token-{len(issued)}")
            return 200, {}, json.dumps({"token": issued[-1], "expires_in": 60}).encode()
        expired = path.endswith(digest) and len(issued) == 1
        if headers.get("authorization") != f"Bearer {issued[-1] if issued else ''}" or expired:
            realm = f'Bearer realm="http://{registry.address}/token",service="here",scope="ignored"'
            return 401, {"WWW-Authenticate": realm}, b""
        if path.endswith(digest):
            return 307, {"Location": f"http://{elsewhere.address}/v2/app/blobs/{digest}"}, b""
        return None

    registry.fault = fault
    try:
        assert store.pull(f"{registry.address}/app:1", ANN).new
        assert issued == ["token-0", "token-1"]
        assert len(elsewhere.asked) == 1 and "authorization" not in elsewhere.asked[0][2]
    finally:
        elsewhere.close()


def test_one_download_for_many_pulls(store: Store, registry: FaultyRegistry) -> None:
    manifest = registry.add_image([layer(1), layer(2)])
    results: list[str] = []
    threads = [
        threading.Thread(target=lambda: results.append(store.pull(f"{registry.address}/app:1").image.id)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and len(set(results)) == 1
    blobs = [path for _, path, _ in registry.asked if "/blobs/" in path]
    assert sorted(blobs) == sorted({f"/v2/app/blobs/{x['digest']}" for x in (manifest["config"], *manifest["layers"])})


def test_mirrors(store: Store, registry: FaultyRegistry, short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.add_image([layer(1)])
    settings = short_tmp / "registries.json"
    settings.write_text(json.dumps({"mirrors": {"docker.io": [f"http://{registry.address}"]}}))
    monkeypatch.setenv("AMBI_REGISTRIES", str(settings))
    pulled = store.pull("some/app:1", Credentials("ann", "secret"))
    assert pulled.image.names == ("some/app:1",)
    assert not any("authorization" in headers for _, _, headers in registry.asked)


# Pulls as often as a line comes, each in a child with a store of its own, in which `victim` (the engine, or the process of
# its workers) is killed at the `point`-th time that it opens, renames or removes a file of the store, or connects.
KILLED = """
import os, signal, sys
from pathlib import Path
from typing import Any
import images.pull
from ambi.core.errors import AmbiError
from images.layers.nursery import NURSERY
from images.store import Store
FILES = {"open", "os.rename", "os.remove", "sqlite3.connect"}
def run(victim, point):
    seen = 0
    def hook(event, args):
        nonlocal seen
        if event == "socket.connect" or (event in FILES and sys.argv[1] in str(args[0])):
            seen += 1
            if seen == point and victim == "engine":
                os.kill(os.getpid(), signal.SIGKILL)
            if seen >= point and victim == "workers" and NURSERY._process is not None:
                NURSERY._process.kill()
    sys.addaudithook(hook)
    store = Store.open(Path(sys.argv[1]))
    try:
        store.pull(sys.argv[2])
    except AmbiError as error:
        if victim == "engine" or "image worker" not in str(error):
            raise
        return b"killed\\n"
    return b"%d points\\n" % seen
print("ready", flush=True)
for line in sys.stdin:
    victim, point = line.split()
    if os.fork() == 0:
        try:
            os.write(1, run(victim, int(point)))
        finally:
            os._exit(0)
    if os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGKILL:
        print("killed", flush=True)
"""
KILLS = 50


def test_killed_pulls_are_resumed(registry: FaultyRegistry, short_tmp: Path) -> None:
    """Killed at 50 points between its first and its last step: never half an image, and gone on with the same store."""
    registry.add_image([layer(n, 100_000) for n in range(4)])
    name, root, chance = f"{registry.address}/app:1", short_tmp / "killed", random.Random(5)
    whole = Store.open(short_tmp / "whole")
    wanted, expected = whole.pull(name).image.id, contents(whole)
    pulls = subprocess.Popen(
        [sys.executable, "-c", KILLED, root, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert pulls.stdin is not None and pulls.stdout is not None and pulls.stdout.readline() == "ready\n"
    try:
        count = int(_pull_in(pulls, "engine", 0).split()[0])
        _resumed(root, name, wanted, expected)
        kills = attempts = 0
        while kills < KILLS:
            attempts += 1
            said = _pull_in(pulls, "engine" if attempts % 5 else "workers", chance.randrange(1, count))
            kills += said == "killed\n"
            if said != "killed\n" or kills % 4 == 0:  # else the next one goes on with what this one has left
                _resumed(root, name, wanted, expected)
            assert said and attempts < 3 * KILLS
    finally:
        pulls.stdin.close()
        pulls.wait()
        pulls.stdout.close()
        whole.close()


def _pull_in(pulls: subprocess.Popen[str], victim: str, point: int) -> str:
    assert pulls.stdin is not None and pulls.stdout is not None
    pulls.stdin.write(f"{victim} {point}\n")
    pulls.stdin.flush()
    return pulls.stdout.readline()


def _resumed(root: Path, name: str, wanted: str, expected: set[str]) -> None:
    """The store is sound and gets the whole image; afterwards it is empty again."""
    store = _opened(root)
    try:
        assert {image.id for image in store.list()} <= {wanted}
        store.pull(name)
        assert contents(store) == expected and not list((root / "partial").iterdir())
        for path in (root / "blobs" / "sha256").iterdir():
            assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
        store.remove(name, in_use=lambda _: [])
        assert contents(store) == set()
    finally:
        store.close()


def _opened(root: Path) -> Store:
    """Workers of a killed store end on their own, and hold its lock until then."""
    end = time.monotonic() + 10
    while True:
        try:
            return Store.open(root)
        except Conflict:
            assert time.monotonic() < end
            time.sleep(0.1)


# Archives


def loaded_into(store: Store, path: Path) -> list[Image]:
    with open(path, "rb") as source:
        return store.load(source)


def test_an_image_that_is_here_by_another_manifest(store: Store, registry: FaultyRegistry, short_tmp: Path) -> None:
    """It gets the name, and nothing of the download stays; an archive is told by the names that it has itself."""
    first, kind, diff_id = layer(1)
    registry.add_image([(first, kind, diff_id)])
    image = store.pull(f"{registry.address}/app:1").image
    registry.add_image([(gzip.compress(gzip.decompress(first), 9, mtime=0), kind, diff_id)], "2")
    before = contents(store)
    again = store.pull(f"{registry.address}/app:2").image
    assert (again.id, again.names) == (image.id, (f"{registry.address}/app:1", f"{registry.address}/app:2"))
    assert contents(store) == before and not list((store.root / "partial").iterdir())
    store.tag(again, "saved:1")
    with open(short_tmp / "saved.tar", "wb") as target:
        store.save(["saved:1"], target)
    assert [found.names for found in loaded_into(store, short_tmp / "saved.tar")] == [("saved:1",)]


def test_saved_archives_load(store: Store, other: Store, short_tmp: Path) -> None:
    first, second = imported(store, "team/app:1", "a"), imported(store, "team/app:2", "b")
    imported(store, "lonely:1", "c")
    path = short_tmp / "saved.tar"
    with open(path, "wb") as target:
        store.save(["team/app", first, "lonely:1"], target)
    loaded = loaded_into(other, path)
    assert {image.id for image in loaded} >= {first} and other.resolve("lonely:1").manifest == store.resolve(
        "lonely:1"
    ).manifest
    with open(path, "wb") as target:
        store.save(["team/app:1", "team/app:2"], target)
    assert [image.names for image in loaded_into(other, path)] == [("team/app:1",), ("team/app:2",)]
    assert other.resolve("team/app:2").id == second
    for kind, name in (("docker-archive", "docker.io/team/app:1"), ("oci-archive", "1")):
        wanted = f"{kind}:{path}:{name}"
        done = subprocess.run(["skopeo", "inspect", "--config", wanted], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["rootfs"]["diff_ids"] == list(store.resolve(first).layers)
    with pytest.raises(NotFound):
        store.save(["nothing:here"], io.BytesIO())


# Copies


def test_copies_between_places(store: Store, other: Store, registry: FaultyRegistry, short_tmp: Path) -> None:
    """Registry to registry, into and out of an archive, and to the store: the same manifest everywhere, nothing left."""
    manifest = registry.add_image([layer(1), layer(2)])
    digest = "sha256:" + hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    source = f"docker://{registry.address}/app:1"
    before = contents(store)
    with docker_registry(short_tmp / "registry") as address:
        told: list[str] = []
        there = f"docker://{address}/one/app:1"
        assert (
            copy.copy(store, source, there, credentials={}, progress=lambda step: told.append(step.status)).digest == digest
        )
        assert told.count("Copied") == 3 and contents(store) == before
        told.clear()
        again = f"docker://{address}/two/app:1"
        copy.copy(store, there, again, credentials={}, progress=lambda step: told.append(step.status))
        assert told == ["Mounted from one/app"] * 3
        archive = io.BytesIO()
        copy.copy(store, again, "oci-archive:box:9", credentials={}, download=archive)
        assert contents(store) == before
        into = copy.copy(other, "oci-archive:", "here:1", credentials={}, upload=io.BytesIO(archive.getvalue()))
        assert into.image is not None and (into.image.names, into.image.manifest) == (("here:1",), digest)
        copy.copy(other, "here:1", f"docker://{address}/three/app:1", credentials={})
        third = f"docker://{address}/four/app:1"
        copy.copy(store, "docker-archive:box:9", third, credentials={}, upload=io.BytesIO(archive.getvalue()))
        for name in ("three/app", "four/app"):
            assert store.pull(f"{address}/{name}:1").image.manifest == digest
        pulled = copy.copy(other, there, "fresh:1", credentials={})
        assert pulled.image is not None and set(pulled.image.names) == {"here:1", "fresh:1"}
        (short_tmp / "a.tar").write_bytes(archive.getvalue())
        for kind in ("docker-archive", "oci-archive"):
            done = subprocess.run(
                ["skopeo", "inspect", f"{kind}:{short_tmp}/a.tar"], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr


def _referrer(registry: FaultyRegistry, subject: dict[str, Any], kind: str, text: bytes) -> dict[str, Any]:
    """The descriptor of an artifact of `text` about `subject`, as the registry would list it."""
    empty = {"mediaType": "application/vnd.oci.empty.v1+json", **registry.add_blob(b"{}")}
    manifest = {
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "artifactType": kind,
        "config": empty, "layers": [{"mediaType": kind, **registry.add_blob(text)}], "subject": subject,
    }  # fmt: skip
    return {**registry.add_manifest(manifest, kind.rpartition("/")[2]), "artifactType": kind}


def test_copies_keep_what_refers_to_an_image(store: Store, registry: FaultyRegistry, short_tmp: Path) -> None:
    """A bill of materials and its signature, from a registry that lists them to one that wants a tag, and from there on."""
    registry.add_image([layer(1)])
    media_type, data = registry.manifests["1"]
    top: dict[str, Any] = {
        "mediaType": media_type,
        "digest": "sha256:" + hashlib.sha256(data).hexdigest(),
        "size": len(data),
    }
    bill = _referrer(registry, top, "application/bill", b"libc6")
    signature = _referrer(registry, bill, "application/signature", b"by Ann")
    stranger = _referrer(registry, signature, "application/stranger", b"about another")
    lists = {top["digest"]: [bill, stranger], bill["digest"]: [signature]}

    def fault(method: str, path: str, headers: dict[str, str]) -> Answer | None:
        digest = path.rpartition("/referrers/")[2]
        if "/referrers/" not in path:
            return None
        body = {"schemaVersion": 2, "mediaType": referrers.INDEX, "manifests": lists.get(digest, [])}
        return 200, {"Content-Type": referrers.INDEX}, json.dumps(body).encode()

    registry.fault = fault
    with docker_registry(short_tmp / "registry") as address:
        source = f"docker://{registry.address}/app:1"
        for name in ("one", "two"):
            copy.copy(store, source, f"docker://{address}/{name}:1", credentials={})
            copy.copy(store, source, f"docker://{address}/{name}:1", credentials={})  # they are not listed twice
            for subject, wanted in ((top, bill), (bill, signature)):
                tag = referrers.fallback_tag(subject["digest"])
                index = pull.describe(reference.parse(f"{address}/{name}:{tag}"), Credentials())
                assert index.body["manifests"] == [wanted]
                found = pull.describe(reference.parse(f"{address}/{name}@{wanted['digest']}"), Credentials())
                assert found.body["subject"] == subject
            assert store.pull(f"{address}/{name}:1").image.manifest == top["digest"]
            with pytest.raises(NotFound, match="manifest unknown"):
                pull.describe(reference.parse(f"{address}/{name}@{stranger['digest']}"), Credentials())
            source = f"docker://{address}/one:1"
        with pytest.raises(Unsupported, match="a layer of type 'application/bill', not a file system"):
            store.pull(f"{address}/one@{bill['digest']}")
    lists[top["digest"]] = [{**bill, "digest": "sha256:../../x"}]
    with docker_registry(short_tmp / "third") as address, pytest.raises(Corrupt, match="list of referrers of"):
        copy.copy(store, f"docker://{registry.address}/app:1", f"docker://{address}/x:1", credentials={})


def test_a_whole_index_is_copied(store: Store, registry: FaultyRegistry, short_tmp: Path) -> None:
    """Every platform, attestations, what refers to the index or to one of its manifests, and cosign's tags."""
    listed: list[dict[str, Any]] = []
    for number, machine in enumerate(("amd64", "arm64", "unknown")):
        registry.add_image([layer(number)], machine)
        media_type, data = registry.manifests[machine]
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        platform = {"os": "linux", "architecture": machine}
        listed.append({"mediaType": media_type, "digest": digest, "size": len(data), "platform": platform})
    listed[2]["annotations"] = {"vnd.docker.reference.type": "attestation-manifest"}
    index = registry.add_manifest({"schemaVersion": 2, "mediaType": referrers.INDEX, "manifests": listed}, "1")
    for subject in (index, listed[1]):
        signed = _referrer(registry, subject, "application/signature", subject["digest"].encode())
        entries = {"schemaVersion": 2, "mediaType": referrers.INDEX, "manifests": [signed]}
        registry.add_manifest(entries, referrers.fallback_tag(subject["digest"]))
    signature = registry.add_manifest(registry.add_image([layer(9)], "x"), referrers.fallback_tag(index["digest"]) + ".sig")
    source = f"docker://{registry.address}/app:1"
    with docker_registry(short_tmp / "registry") as address:
        assert (
            copy.copy(store, source, f"docker://{address}/app:1", credentials={}, whole_index=True).digest == index["digest"]
        )
        there = [*(entry["digest"] for entry in listed), referrers.fallback_tag(index["digest"]),
                 referrers.fallback_tag(listed[1]["digest"]), signature["digest"]]  # fmt: skip
        for name in there:
            joined = f"{address}/app@{name}" if ":" in name else f"{address}/app:{name}"
            found = pull.describe(reference.parse(joined), Credentials())
            assert found.data == registry.manifests[name][1]
        tag = referrers.fallback_tag(index["digest"]) + ".sig"
        assert pull.describe(reference.parse(f"{address}/app:{tag}"), Credentials()).digest == signature["digest"]
        assert store.pull(f"{address}/app:1").image.manifest == listed[0]["digest"]
        copy.copy(store, source, f"docker://{address}/one:1", credentials={})
        assert pull.describe(reference.parse(f"{address}/one:1"), Credentials()).digest == listed[0]["digest"]
    for target in ("oci-archive:", "here:1"):
        with pytest.raises(InvalidRequest, match="hold images for this host") as refused:
            copy.copy(store, source, target, credentials={}, download=io.BytesIO(), whole_index=True)
        assert refused.value.hint


def test_refused_copies_leave_nothing(store: Store, registry: FaultyRegistry, short_tmp: Path) -> None:
    manifest = registry.add_image([layer(1)])
    blob = manifest["layers"][0]["digest"]
    registry.blobs[blob] = registry.blobs[blob][:-1] + b"x"
    before = contents(store)
    with docker_registry(short_tmp / "registry") as address:
        target = f"docker://{address}/app:1"
        with pytest.raises(Corrupt, match=f"blob {blob} of {registry.address}/app is damaged"):
            copy.copy(store, f"docker://{registry.address}/app:1", target, credentials={})
        with pytest.raises(Corrupt, match=f"blob {blob} of"):
            copy.copy(store, f"docker://{registry.address}/app:1", "oci-archive:", credentials={}, download=io.BytesIO())
        with pytest.raises(NotFound, match="manifest unknown"):
            store.pull(f"{address}/app:1")
        with pytest.raises(NotFound, match="No such image: nothing:here"):
            copy.copy(store, "nothing:here", target, credentials={})
        with pytest.raises(InvalidRequest, match="not an image archive"):
            copy.copy(store, "oci-archive:", target, credentials={}, upload=io.BytesIO(tar_bytes(member("f", b""))))
    with pytest.raises(InvalidRequest, match="the transport dir is not known"):
        copy.copy(store, "dir:/tmp/x", "a:1", credentials={})
    two = io.BytesIO()
    imported(store, "box:1", "a"), imported(store, "box:2", "b")
    store.save(["box"], two)
    with pytest.raises(InvalidRequest, match="the archive has 2 images, one can be copied"):
        copy.copy(store, "docker-archive:", "c:1", credentials={}, upload=io.BytesIO(two.getvalue()))
    with pytest.raises(NotFound, match="the archive has no image box:3"):
        copy.copy(store, "docker-archive:box:3", "c:1", credentials={}, upload=io.BytesIO(two.getvalue()))
    assert sorted(name for image in store.list() for name in image.names) == ["box:1", "box:2"]
    assert before == set() and not list((store.root / "ingest").iterdir())


def test_refused_archives_of_the_oldest_form(store: Store) -> None:
    """Parent links in a circle, to nothing and out of the archive; names that are none; packed layers."""
    ids = ["a" * 64, "b" * 64]
    tar = tar_bytes(member("f", b"x"))

    def load(repositories: object, *links: object, layer: bytes = tar) -> None:
        members = [member("repositories", json.dumps(repositories).encode())]
        for layer_id, link in zip(ids, links, strict=False):
            members += [member(f"{layer_id}/json", json.dumps({"parent": link}).encode())]
            members += [member(f"{layer_id}/layer.tar", layer)]
        store.load(io.BytesIO(tar_bytes(*members)))

    named = {"app": {"1": ids[0]}}
    cases: list[tuple[type[AmbiError], str, tuple[object, ...]]] = [
        (Unsupported, "lead in a circle", (named, ids[1], ids[0])),
        (Corrupt, "lacks b", (named, ids[1])),
        (Corrupt, "no id", (named, "../../etc/passwd")),
        (Corrupt, "no id", (named, {"a": 1})),
        (Corrupt, "no list of tags", ({"app": []},)),
        (InvalidRequest, "invalid reference", ({"app": {"no tag": ids[0]}}, None)),
    ]
    for error, text, case in cases:
        with pytest.raises(error, match=text):
            load(*case)
    with pytest.raises(Unsupported, match="compressed layer"):
        load(named, None, layer=gzip.compress(tar))
    assert not contents(store)
    load(named, ids[1], None)
    assert [(image.names, len(image.layers)) for image in store.list()] == [(("app:1",), 2)]
