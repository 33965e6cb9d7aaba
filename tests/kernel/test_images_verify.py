"""The scrub finds every kind of damage, names it, and mends what can be mended."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from images.store import Store
from tests.layerkit import directory, member, tar_bytes
from tests.registrykit import docker_registry


@pytest.fixture
def store(short_tmp: Path) -> Iterator[Store]:
    it = Store.open(short_tmp / "images")
    yield it
    it.close()


def spoil(path: Path) -> None:
    """Change one byte in the middle."""
    with open(path, "r+b") as file:
        file.seek(os.fstat(file.fileno()).st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0xFF]))


def test_a_damaged_layer_is_made_again(store: Store) -> None:
    image = store.import_tar(io.BytesIO(tar_bytes(directory("d"), member("d/f", os.urandom(100_000)))), "app:1")
    assert store.verify() == []
    layer = store.layers(image)[0]
    whole = layer.path.read_bytes() if layer.path.is_file() else None
    spoil(layer.path if layer.path.is_file() else layer.path / "d" / "f")
    (found,) = store.verify()
    assert (found.kind, found.name, found.images, found.repaired) == ("layer", layer.name, ("app:1",), "")
    (mended,) = store.verify(repair=True)
    assert mended.repaired == "made again from its archive"
    assert store.verify() == [] and (whole is None or layer.path.read_bytes() == whole)


def test_a_damaged_blob_is_pulled_again(store: Store, short_tmp: Path) -> None:
    with docker_registry(short_tmp / "registry") as address:
        store.import_tar(io.BytesIO(tar_bytes(member("f", os.urandom(200_000)))), f"{address}/app:1")
        store.push(f"{address}/app:1")
        image = store.resolve(f"{address}/app:1")
        blob = store.image_layers(image)[0].blob
        for digest in (blob, image.id, image.manifest):
            spoil(store.content.path(digest))
        store.content.path(image.manifest).unlink()
        problems = {found.name: found for found in store.verify()}
        assert set(problems) == {blob, image.id, image.manifest}
        assert problems[image.manifest].problem == "it is missing" and "digest is sha256:" in problems[blob].problem
        assert all(found.repaired == f"pulled again from {address}/app" for found in store.verify(repair=True))
        assert store.verify() == []


def test_what_cannot_be_mended_says_so(store: Store) -> None:
    image = store.import_tar(io.BytesIO(tar_bytes(member("f", b"x"))), "app:1")
    spoil(store.content.path(store.image_layers(image)[0].blob))
    (found,) = store.verify(repair=True)
    assert not found.repaired and "app:1" in found.hint
