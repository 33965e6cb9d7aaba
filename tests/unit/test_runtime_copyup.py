"""Filling an empty volume: what is copied, what a death leaves to be finished, and what a neighbour may put in the way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runtime import copyup


@pytest.fixture
def image(tmp_path: Path) -> Path:
    root = tmp_path / "image"
    (root / "deep/er").mkdir(parents=True)
    (root / "deep/file").write_text("text")
    os.link(root / "deep/file", root / "same")
    (root / "link").symlink_to("/etc/passwd")
    os.mkfifo(root / "pipe")
    os.utime(root / "deep", (5, 6))
    root.chmod(0o1751)
    return root


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    (tmp_path / "volume").mkdir()
    return tmp_path / "volume"


def fill(image: Path, volume: Path) -> None:
    source, target = os.open(image, os.O_RDONLY), os.open(volume, os.O_RDONLY)
    before = set(os.listdir("/proc/self/fd"))
    try:
        copyup.fill(source, target)
    finally:
        assert set(os.listdir("/proc/self/fd")) == before
        os.close(source)
        os.close(target)


def listed(place: Path) -> list[str]:
    return sorted(str(path.relative_to(place)) for path in place.rglob("*"))


ALL = ["deep", "deep/er", "deep/file", "link", "pipe", "same"]


def test_everything_is_copied_with_what_it_has(image: Path, volume: Path) -> None:
    fill(image, volume)
    assert listed(volume) == ALL
    assert os.readlink(volume / "link") == "/etc/passwd" and (volume / "pipe").is_fifo()
    assert (volume / "same").stat().st_ino == (volume / "deep/file").stat().st_ino
    assert (volume / "deep").stat().st_mtime == 6 and volume.stat().st_mode & 0o7777 == 0o1751


def test_one_with_something_in_it_is_left_alone(image: Path, volume: Path) -> None:
    (volume / "mine").touch()
    fill(image, volume)
    assert listed(volume) == ["mine"]


def test_what_a_death_left_is_begun_again_or_finished(image: Path, volume: Path) -> None:
    (volume / copyup.COPYING / "half").mkdir(parents=True)
    fill(image, volume)
    assert listed(volume) == ALL
    (volume / copyup.COPIED).mkdir()
    for name in ("deep", "same"):
        (volume / name).rename(volume / copyup.COPIED / name)
    fill(image, volume)
    assert listed(volume) == ALL


def test_links_that_a_neighbour_lays_lead_nowhere(image: Path, volume: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "kept").mkdir(parents=True)
    for name in (copyup.COPYING, copyup.COPIED):
        (volume / name).symlink_to(outside)
        fill(image, volume)
        assert listed(outside) == ["kept"]
        for path in volume.iterdir():
            if path.is_symlink() and path.name.startswith(".ambi"):
                path.unlink()


def test_a_copy_that_fails_leaves_the_volume_empty(image: Path, volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("runtime.copyup.os.sendfile", full)
    with pytest.raises(OSError, match="No space left"):
        fill(image, volume)
    assert listed(volume) == []
