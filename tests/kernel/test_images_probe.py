"""Which form of layers a data root gets, on file systems that differ."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from images.probe import layer_form


def rooted(place: Path) -> Path:
    (place / "ingest").mkdir(parents=True)
    return place


def test_the_answer_is_kept_for_this_boot_and_device(short_tmp: Path) -> None:
    root = rooted(short_tmp / "images")
    first = layer_form(root)
    cache = root / "layer-form.json"
    known = json.loads(cache.read_bytes())
    assert layer_form(root) == first == (known["form"], known["why"])
    cache.write_text(json.dumps({**known, "why": "from the file"}))
    assert layer_form(root)[1] == "from the file"
    for stale in ({**known, "boot": "another", "why": "stale"}, [1], "damaged {"):
        cache.write_text(stale if isinstance(stale, str) else json.dumps(stale))
        assert layer_form(root) == first
    assert list((root / "ingest").iterdir()) == []


@pytest.mark.parametrize("kind", ["tmpfs", "overlay"])
def test_a_file_system_that_no_erofs_can_be_mounted_from(kind: str, short_tmp: Path) -> None:
    """The kernel refuses files there; a loop device may still do, and the probe says which it is."""
    place = short_tmp / "m"
    for name in ("m", "l", "u", "w"):
        (short_tmp / name).mkdir()
    options = ["-o", f"lowerdir={short_tmp}/l,upperdir={short_tmp}/u,workdir={short_tmp}/w"] if kind == "overlay" else []
    subprocess.run(["mount", "-t", kind, *options, kind, place], check=True)
    try:
        form, why = layer_form(rooted(place / "images"))
        assert form in ("erofs", "dir")
        assert "mounted directly" not in why
        assert ("loop" in why) or ("overlay" in why)
    finally:
        subprocess.run(["umount", place], check=True)
