"""Bootstrapping with a program in mmdebstrap's place: what we ask of it, and what happens when it fails."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from ambi.core.errors import InvalidRequest, NotFound, Unavailable, Unsupported
from ambi.core.events import Progress
from images import bootstrap
from images.store import Store

PROGRAM = """#!/bin/sh
echo "$@" > {place}/arguments
echo "epoch=$SOURCE_DATE_EPOCH" > {place}/epoch
echo "I: running apt-get update..." >&2
{action}
"""


@pytest.fixture
def program(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory at the front of PATH; `arguments` and `epoch` appear in it."""
    place = short_tmp / "bin"
    place.mkdir()
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    monkeypatch.setattr(
        bootstrap, "apt_sources", lambda release: ([f"deb http://mirror/debian {release} main"], 1_700_000_000)
    )
    return place


def write(place: Path, action: str) -> None:
    path = place / "mmdebstrap"
    path.write_text(PROGRAM.format(place=place, action=action))
    path.chmod(0o755)


def test_a_release_becomes_an_image(program: Path, busybox_tar: Path, short_tmp: Path) -> None:
    write(program, f"cat {busybox_tar}")
    store, seen = Store.open(short_tmp / "images"), list[Progress]()
    try:
        image = store.bootstrap("debian:bookworm", packages=["less", "vim-tiny"], progress=seen.append)
        assert (image.names, image.config["config"]) == (("debian:bookworm",), {"Cmd": ["bash"]})
        assert image.created_ns == 1_700_000_000 * 10**9
        assert store.bootstrap("bookworm", "again").id == image.id
    finally:
        store.close()
    assert Progress("", "running apt-get update...") in seen
    assert (program / "epoch").read_text() == "epoch=1700000000\n"
    assert "bookworm - deb http://mirror/debian bookworm main" in (program / "arguments").read_text()


@pytest.mark.parametrize("output", ["", "head -c 300000 {tar}", "cat {tar}"])
def test_a_failure_leaves_nothing_and_says_why(program: Path, busybox_tar: Path, short_tmp: Path, output: str) -> None:
    """Even when all of the archive came before the failure."""
    write(program, output.format(tar=busybox_tar) + "\necho 'E: unable to locate package nonsense' >&2\nexit 25")
    store = Store.open(short_tmp / "images")
    try:
        with pytest.raises(Unavailable, match=r"status 25: E: unable to locate package nonsense") as refused:
            store.bootstrap("bookworm", packages=["nonsense"])
        assert refused.value.hint
        assert store.list() == []
        assert not list((store.root / "ingest").iterdir())
    finally:
        store.close()


@pytest.mark.parametrize("suite,packages", [("--help", []), ("", []), ("book worm", []), ("bookworm", ["-x"]), ("../x", [])])
def test_words_that_would_be_options(program: Path, short_tmp: Path, suite: str, packages: list[str]) -> None:
    write(program, "exit 0")
    store = Store.open(short_tmp / "images")
    try:
        with pytest.raises(InvalidRequest):
            store.bootstrap(suite, packages=packages)
        with pytest.raises(Unsupported, match="only Debian"):
            store.bootstrap("fedora:40")
    finally:
        store.close()
    assert not (program / "arguments").exists()


def test_the_hosts_own_sources() -> None:
    release = platform.freedesktop_os_release()["VERSION_CODENAME"]
    lines, epoch = bootstrap.apt_sources(release)
    assert any(line.startswith("deb ") and line.endswith(f" {release} main") for line in lines)
    assert not any("backports" in line for line in lines)
    assert epoch == 0 or epoch > 1_600_000_000
    with pytest.raises(NotFound, match="knows no Debian warty"):
        bootstrap.apt_sources("warty")
