"""The store with real archives, real workers and a real file system."""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import io
import json
import os
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ambi.core.errors import AmbiError, Conflict, Corrupt, InvalidRequest, NotFound, StorageFull, Unsupported
from images import reference
from images.store import Image, Store
from tests.layerkit import directory, member, symlink, tar_bytes

Opener = Callable[[], Store]


def nobody(_: str) -> list[str]:
    return []


@pytest.fixture
def opened(short_tmp: Path) -> Iterator[Opener]:
    stores: list[Store] = []

    def make() -> Store:
        for store in stores:
            store.close()
        stores[:] = [Store.open(short_tmp / "images")]
        return stores[0]

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def store(opened: Opener) -> Store:
    return opened()


def files(store: Store) -> set[str]:
    """What lies in the store, but for its own bookkeeping."""
    found = set()
    for folder in ("blobs", "layers", "ingest"):
        found |= {str(path.relative_to(store.root)) for path in (store.root / folder).rglob("*") if path.is_file()}
    return found


def imported(store: Store, name: str, text: str = "x", **options: object) -> Image:
    return store.import_tar(io.BytesIO(tar_bytes(member("f", text.encode()))), name, **options)  # type: ignore[arg-type]


def test_import(store: Store, busybox_tar: Path) -> None:
    with open(busybox_tar, "rb") as file:
        image = store.import_tar(file, "box", changes=['CMD ["sh"]'], message="why")
    assert image.names == ("box:latest",)
    assert image.config["config"] == {"Cmd": ["sh"]}
    assert image.layers == ("sha256:" + hashlib.sha256(busybox_tar.read_bytes()).hexdigest(),)
    assert [(step.comment, step.id, step.size_bytes) for step in store.history(image)] == [
        ("why", image.id, image.size_bytes)
    ]
    for name in ("box", "docker.io/library/box:latest", image.id, image.id[7:], image.id[7:19], image.id[:20]):
        assert store.resolve(name) == image
    (layer,) = store.layers(image, "erofs")
    assert layer.path.stat().st_size == layer.size_bytes
    assert len(layer.name) <= 12
    (as_directory,) = store.layers(image, "dir")
    assert (as_directory.path / "bin" / "busybox").stat().st_mode & 0o777 == 0o755


@pytest.mark.needs("skopeo")
def test_it_is_an_oci_layout_that_others_read(store: Store, short_tmp: Path) -> None:
    imported(store, "team/one:1")
    target = short_tmp / "copy"
    name = "docker.io/team/one:1"
    done = subprocess.run(["skopeo", "copy", f"oci:{store.root}:{name}", f"dir:{target}"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert len(json.loads((target / "manifest.json").read_bytes())["layers"]) == 1


def test_everything_is_there_after_a_restart(opened: Opener) -> None:
    before = imported(opened(), "one")
    again = opened()
    assert again.list() == [before]
    assert again.layers(before, "erofs")[0].path.exists()


def test_names_move_and_go(store: Store) -> None:
    one, two = imported(store, "a", "1"), imported(store, "b", "2")
    store.tag(one, "b")
    assert (store.resolve("b").id, store.resolve(two.id).names) == (one.id, ())
    assert store.resolve(one.id).names == ("a:latest", "b:latest")
    with pytest.raises(Conflict, match="multiple repositories"):
        store.remove(one.id, in_use=nobody)
    assert [x.name for x in store.remove("b", in_use=nobody)] == ["b:latest"]
    assert [x.name or x.id for x in store.remove("a", in_use=nobody)] == ["a:latest", one.id]
    removed, freed = store.prune(lambda image: True, in_use=nobody)
    assert ([x.id for x in removed], freed > 0) == ([two.id], True)
    assert files(store) == set()
    assert json.loads((store.root / "index.json").read_bytes())["manifests"] == []


def test_digests_go_with_the_last_tag_of_their_repository(store: Store) -> None:
    image = imported(store, "a")
    digest = "sha256:" + "0" * 64
    store.set_names(image, [reference.parse(x) for x in ("host:1/b:1", "host:1/b:2", f"host:1/b@{digest}")])
    assert [x.name for x in store.remove("host:1/b:1", in_use=nobody)] == ["host:1/b:1"]
    assert [x.name for x in store.remove("host:1/b:2", in_use=nobody)] == ["host:1/b:2", f"host:1/b@{digest}"]
    assert (store.resolve("a").names, store.resolve("a").digests) == (("a:latest",), ())


def test_an_image_in_use_keeps_its_layers(store: Store) -> None:
    image = imported(store, "a")
    used = lambda _: ["c" * 64, *["d" * 64] * 6]  # noqa: E731
    for name in ("a", image.id):
        with pytest.raises(Conflict, match="cccccccccccc") as refused:
            store.remove(name, in_use=used)
        assert f"`ambi rm {'c' * 12} {'d' * 12} " in refused.value.hint and refused.value.hint.endswith(" and 2 more")
    with pytest.raises(Conflict, match="container one that is being made is using"):
        store.remove("a", in_use=lambda _: ["one that is being made"])
    assert [x.name for x in store.remove("a", force=True, in_use=used)] == ["a:latest"]
    with pytest.raises(Conflict, match="cannot be forced"):
        store.remove(image.id, force=True, in_use=used)
    assert store.prune(lambda image: True, everything=True, in_use=used)[0] == []
    assert store.layers(store.resolve(image.id), "erofs")[0].path.exists()


def test_what_was_removed_by_force_goes_with_its_last_user(opened: Opener) -> None:
    """After a restart, too; not when it is given a name again; and nothing else goes with it."""
    store = opened()
    one, two, three = imported(store, "a", "1"), imported(store, "b", "2"), imported(store, "", "3")
    used = lambda _: ["c" * 64]  # noqa: E731
    for name in ("a", two.id):
        store.remove(name, force=True, in_use=used)
    assert store.remove_unused(in_use=used) == []
    assert {image.id for image in store.list()} == {one.id, two.id, three.id}
    store.tag(two, "again")
    store = opened()
    assert [item.id for item in store.remove_unused(in_use=nobody)] == [one.id]
    assert {image.id for image in store.list()} == {two.id, three.id}
    store.remove("again", force=True, in_use=used)
    imported(store, "", "2", created_ns=two.created_ns)
    assert store.remove_unused(in_use=nobody) == [] and store.resolve(two.id).names == ()


def test_a_store_of_the_first_format_is_carried_over(opened: Opener, short_tmp: Path) -> None:
    made = Store.open(short_tmp / "images")
    image = imported(made, "a")
    made.close()
    path = short_tmp / "images" / "images.db"
    with contextlib.closing(sqlite3.connect(path)) as old:
        old.executescript("DROP TABLE removed; PRAGMA user_version = 1;")
    store = opened()
    assert store.list() == [image] and path.with_name("images.db.1.bak").exists()
    store.remove("a", force=True, in_use=lambda _: ["c" * 64])
    assert [item.id for item in store.remove_unused(in_use=nobody)] == [image.id]


def test_unknown_and_ambiguous_names(store: Store) -> None:
    with pytest.raises(NotFound, match="No such image: none:latest"):
        store.resolve("none")
    with pytest.raises(InvalidRequest, match="invalid reference"):
        store.resolve("a:b:c")
    images = [imported(store, "", str(number)) for number in range(40)]
    digits = [image.id[7] for image in images]
    twice = next(x for x in digits if digits.count(x) > 1)
    with pytest.raises(InvalidRequest, match="ambiguous"):
        store.resolve(f"sha256:{twice}")


def test_one_store_has_one_owner(store: Store) -> None:
    with pytest.raises(Conflict, match="in use by another engine"):
        Store.open(store.root)


@pytest.mark.parametrize(
    "data", [b"", b"no tar at all" * 100, gzip.compress(b"x" * 5000)[:-20], tar_bytes(member("../x", b"y"))]
)
def test_a_bad_archive_leaves_nothing(store: Store, data: bytes) -> None:
    with pytest.raises(Corrupt, match="cannot import bad:latest: ") as refused:
        store.import_tar(io.BytesIO(data), "bad")
    assert refused.value.hint
    assert (files(store), store.list()) == (set(), [])


def test_a_client_that_goes_away_leaves_nothing(store: Store) -> None:
    class Gone(io.RawIOBase):
        left = 5

        def read(self, size: int = -1) -> bytes:
            self.left -= 1
            if not self.left:
                raise ConnectionResetError("the client has gone")
            return tar_bytes(member("f", b"x" * 300_000))[: 256 << 10] if self.left == 4 else bytes(1000)

    with pytest.raises((AmbiError, ConnectionResetError)):
        store.import_tar(Gone(), "gone")  # type: ignore[arg-type]
    assert (files(store), store.list()) == (set(), [])


def test_what_a_crash_left_is_swept(opened: Opener) -> None:
    store = opened()
    image = imported(store, "kept")
    before = files(store)
    (store.root / "ingest" / "half").write_bytes(b"x")
    (store.root / "ingest" / "tree").mkdir()
    (store.root / "blobs" / "sha256" / ("0" * 64)).write_bytes(b"x")
    (store.root / "layers" / "e0123456789a.erofs").write_bytes(b"x")
    (store.root / "layers" / "d0123456789a").mkdir()
    store = opened()
    assert files(store) == before
    assert not (store.root / "layers" / "d0123456789a").exists()
    assert store.list() == [image]


def test_a_full_disk_leaves_nothing(short_tmp: Path) -> None:
    place = short_tmp / "small"
    place.mkdir()
    disk = short_tmp / "disk"
    with open(disk, "wb") as file:
        file.truncate(160 << 20)
    subprocess.run(["mkfs.ext4", "-q", disk], check=True)
    subprocess.run(["mount", "-o", "loop", disk, place], check=True)
    try:
        store = Store.open(place / "images")
        try:
            with pytest.raises(StorageFull) as refused:
                store.import_tar(io.BytesIO(tar_bytes(member("big", os.urandom(100 << 20)))), "big")
            assert refused.value.hint
            assert (files(store), store.list()) == (set(), [])
            assert imported(store, "small").names == ("small:latest",)
        finally:
            store.close()
    finally:
        subprocess.run(["umount", place], check=True)


def test_the_disk_begins_while_a_layer_comes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it says then stops the import."""
    begun: list[int] = []
    monkeypatch.setattr("images.importer._write_back", begun.append)
    store.import_tar(io.BytesIO(tar_bytes(member("f", os.urandom(20 << 20)))), "a")
    assert len(begun) >= 2 and len(set(begun)) == 2, "the blob and the layer file"
    before = files(store)

    def broken(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("images.importer._write_back", broken)
    with pytest.raises(AmbiError, match="cannot store the archive: Input/output error"):
        store.import_tar(io.BytesIO(tar_bytes(member("f", os.urandom(20 << 20)))), "b")
    assert files(store) == before


def test_imports_at_once_share_what_is_equal(store: Store) -> None:
    images: list[Image] = []
    threads = [threading.Thread(target=lambda n=n: images.append(imported(store, f"n{n % 3}", "same"))) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(images) == 6
    assert len(list((store.root / "layers").iterdir())) == 1
    assert len({image.layers for image in images}) == 1
    for image in store.list():
        assert store.layers(image, "erofs")


# Archives of images


def layer(text: str) -> bytes:
    return tar_bytes(directory("d"), member("d/f", text.encode()))


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def config_of(*plain: bytes) -> bytes:
    diff_ids = ["sha256:" + sha(x) for x in plain]
    return json.dumps({
        "architecture": "amd64", "os": "linux", "config": {"Cmd": ["sh"]}, "created": "2026-01-02T03:04:05Z",
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "history": [{"created_by": f"step {n}"} for n in range(len(plain))] + [{"created_by": "CMD", "empty_layer": True}],
    }).encode()  # fmt: skip


def docker_archive(*plain: bytes, tags: tuple[str, ...] = ("app:1",), config: bytes | None = None) -> dict[str, bytes]:
    """Members of an archive in docker save's old form."""
    config = config or config_of(*plain)
    members = {f"{number}/layer.tar": data for number, data in enumerate(plain)}
    entry = {"Config": f"{sha(config)}.json", "RepoTags": list(tags), "Layers": list(members)}
    return {**members, f"{sha(config)}.json": config, "manifest.json": json.dumps([entry]).encode()}


def oci_archive(*packed: bytes, config: bytes, name: str = "docker.io/library/app:oci") -> dict[str, bytes]:
    blobs = {f"blobs/sha256/{sha(x)}": x for x in (*packed, config)}
    types = {b"\x1f\x8b": "+gzip", b"\x28\xb5": "+zstd"}
    described = [
        {
            "mediaType": "application/vnd.oci.image.layer.v1.tar" + types.get(x[:2], ""),
            "digest": f"sha256:{sha(x)}",
            "size": len(x),
        }
        for x in packed
    ]
    config_type = "application/vnd.oci.image.config.v1+json"
    described_config = {"mediaType": config_type, "digest": f"sha256:{sha(config)}", "size": len(config)}
    manifest = json.dumps({"schemaVersion": 2, "layers": described, "config": described_config}).encode()
    entry = {"digest": f"sha256:{sha(manifest)}", "size": len(manifest), "annotations": {"io.containerd.image.name": name}}
    return {
        **blobs, f"blobs/sha256/{sha(manifest)}": manifest, "oci-layout": b'{"imageLayoutVersion": "1.0.0"}',
        "index.json": json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode(),
    }  # fmt: skip


def pack(members: dict[str, bytes]) -> io.BytesIO:
    return io.BytesIO(tar_bytes(*(member(name, data) for name, data in members.items())))


def test_load_from_docker(store: Store) -> None:
    one, two = layer("1"), layer("2")
    (image,) = store.load(pack(docker_archive(one, two, tags=("app:1", "other:2"))))
    assert image.names == ("app:1", "other:2")
    assert image.id == "sha256:" + sha(config_of(one, two))
    assert image.layers == ("sha256:" + sha(one), "sha256:" + sha(two))
    assert [(step.created_by, step.size_bytes) for step in store.history(image)] == [
        ("CMD", 0),
        ("step 1", 1),
        ("step 0", 1),
    ]
    names = files(store)
    (again,) = store.load(pack(docker_archive(one, two, tags=("app:1",))))
    assert (again.id, again.names) == (image.id, ("app:1",)) and store.resolve(image.id) == image
    assert files(store) == names


def test_load_links_and_compression(store: Store) -> None:
    members = docker_archive(layer("1"))
    moved = {("x/layer.tar" if name == "0/layer.tar" else name): data for name, data in members.items()}
    archive = tar_bytes(*(member(n, d) for n, d in moved.items()), symlink("0/layer.tar", "../x/layer.tar"))
    (image,) = store.load(io.BytesIO(gzip.compress(archive)))
    assert image.names == ("app:1",)


def test_load_from_oci_with_layers_of_all_compressions(store: Store) -> None:
    from backports.zstd import compress

    plain = [layer("1"), layer("2"), layer("3")]
    packed = [plain[0], gzip.compress(plain[1]), compress(plain[2])]
    archive = oci_archive(*packed, config=config_of(*plain))
    (image,) = store.load(pack(archive))
    assert (image.names, image.layers) == (("app:oci",), tuple("sha256:" + sha(x) for x in plain))
    assert f"blobs/sha256/{image.manifest}".replace("sha256:", "") in archive  # its own manifest is kept
    for layers in (store.layers(image, "erofs"), store.layers(image, "dir")):
        assert len({x.name for x in layers}) == 3


def test_a_layer_that_is_there_is_used_again(store: Store) -> None:
    base, top = layer("base"), layer("top")
    (one,) = store.load(pack(docker_archive(base)))
    inode = store.layers(one, "erofs")[0].path.stat().st_ino
    (two,) = store.load(pack(oci_archive(gzip.compress(base), top, config=config_of(base, top))))
    assert store.layers(two, "erofs")[0].path.stat().st_ino == inode
    store.remove("app:1", in_use=nobody)
    assert store.layers(two, "erofs")[0].path.stat().st_ino == inode
    assert len(store.layers(two, "dir")) == 2  # from the blobs that its own manifest lists


def _damaged() -> dict[str, dict[str, bytes]]:
    plain = layer("1")
    good = docker_archive(plain)
    oci = oci_archive(gzip.compress(plain), config=config_of(plain))
    blob = next(name for name, data in oci.items() if data[:2] == b"\x1f\x8b")
    config_name = next(name for name in good if len(name) > 60)
    index = json.loads(oci["index.json"])
    index["manifests"][0]["size"] += 1
    return {
        "other content": {**good, "0/layer.tar": layer("2")},
        "layer missing": {name: data for name, data in good.items() if name != "0/layer.tar"},
        "config damaged": {**good, config_name: good[config_name] + b" "},
        "too few diff ids": docker_archive(plain, config=config_of(plain, plain)),
        "no json": {**good, "manifest.json": b"{"},
        "list of numbers": {**good, "manifest.json": b"[1]"},
        "blob damaged": {**oci, blob: gzip.compress(layer("2"))},
        "size of the manifest": {**oci, "index.json": json.dumps(index).encode()},
        "config of another shape": docker_archive(plain, config=config_of(plain).replace(b'["sh"]', b'{"a": 1}')),
        "history of numbers": docker_archive(plain, config=config_of(plain).replace(b'{"created_by": "step 0"}', b"7")),
        "hostile layer": docker_archive(tar_bytes(member("../../canary", b"x"))),
    }


@pytest.mark.parametrize("case", _damaged())
def test_damaged_image_archives(store: Store, case: str) -> None:
    with pytest.raises(Corrupt):
        store.load(pack(_damaged()[case]))
    assert (files(store), store.list()) == (set(), [])


def test_archives_of_something_else(store: Store) -> None:
    with pytest.raises(InvalidRequest, match="not an image archive") as refused:
        store.load(io.BytesIO(layer("x")))
    assert "import" in (refused.value.hint or "")
    archive = oci_archive(layer("1"), config=config_of(layer("1")))
    index = json.loads(archive["index.json"])
    index["manifests"][0]["platform"] = {"os": "linux", "architecture": "s390x"}
    with pytest.raises(Unsupported, match="linux/amd64"):
        store.load(pack({**archive, "index.json": json.dumps(index).encode()}))
    assert files(store) == set()


def test_image_archives_that_end_early(store: Store) -> None:
    whole = pack(docker_archive(layer("1"), layer("2"))).getvalue()
    for data in (b"", whole[:700], whole[: len(whole) // 2], gzip.compress(whole)[:-30]):
        with pytest.raises((Corrupt, InvalidRequest)):
            store.load(io.BytesIO(data))
        assert files(store) == set()


def test_a_client_that_leaves_a_load(store: Store) -> None:
    class Gone(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            data = super().read(1000)
            if not data:
                raise ConnectionResetError("the client has gone")
            return data

    with pytest.raises(ConnectionResetError):
        store.load(Gone(pack(docker_archive(layer("1"))).getvalue()[:5000]))
    assert files(store) == set()


def test_a_held_layer_outlives_its_image(store: Store) -> None:
    base = layer("base")
    (one,) = store.load(pack(docker_archive(base)))
    (path,) = [x.path for x in store.layers(one, "erofs")]
    with store.hold(one.layers):
        store.remove("app:1", in_use=nobody)
        assert path.exists()
        assert store.known_layer(one.layers[0]) is not None
    store.collect()
    assert not path.exists()


def test_hostile_archives_touch_nothing_outside(store: Store, short_tmp: Path) -> None:
    """Links out of the layer and writes through them, in both forms, beside a directory that must not change."""
    canary = short_tmp / "canary"
    canary.mkdir()
    (canary / "f").write_bytes(b"alive")
    data = tar_bytes(
        symlink("out", str(canary)), member("out/f", b"dead"),
        symlink("up", "../" * 20 + str(canary)[1:]), member("up/g", b"dead"),
        symlink("f", str(canary / "f")), member("f", b"dead"), member(str(canary / "h"), b"dead"),
    )  # fmt: skip
    image = store.import_tar(io.BytesIO(data), "hostile")
    (tree,) = store.layers(image, "dir")
    store.layers(image, "erofs")
    assert {path.name: path.read_bytes() for path in canary.iterdir()} == {"f": b"alive"}
    assert (tree.path / str(canary)[1:] / "g").read_bytes() == b"dead"  # inside the layer, where the link points there
