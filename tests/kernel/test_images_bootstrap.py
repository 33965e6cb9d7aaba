"""Bootstrapping with a program in mmdebstrap's place: what we ask of it, and what happens when it fails."""

from __future__ import annotations

import functools
import http.server
import os
import platform
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ambi.core.errors import InvalidRequest, NotFound, Unavailable, Unsupported
from ambi.core.events import Progress
from images import distributions
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
    return place


@pytest.fixture
def debian(monkeypatch: pytest.MonkeyPatch) -> None:
    """This host's apt knows of Debian's releases, all of one date."""
    monkeypatch.setattr(
        distributions,
        "sources",
        lambda _, release: distributions.Sources([f"deb http://mirror/debian {release} main"], 1_700_000_000),
    )


@pytest.fixture
def mirror(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A mirror of Ubuntu on loopback with the files below the directory that this gives, and its keyring."""
    place = short_tmp / "mirror"
    place.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(place))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    (short_tmp / "ubuntu.gpg").touch()
    ubuntu = distributions.UBUNTU._replace(
        archives=((address, ""), (address, "-security")), keyring=short_tmp / "ubuntu.gpg"
    )
    monkeypatch.setitem(distributions._ALL, "ubuntu", ubuntu)
    yield place
    server.shutdown()
    server.server_close()
    thread.join()


def write(place: Path, action: str) -> None:
    path = place / "mmdebstrap"
    path.write_text(PROGRAM.format(place=place, action=action))
    path.chmod(0o755)


def test_a_release_becomes_an_image(program: Path, debian: None, busybox_tar: Path, short_tmp: Path) -> None:
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
def test_a_failure_leaves_nothing_and_says_why(
    program: Path, debian: None, busybox_tar: Path, short_tmp: Path, output: str
) -> None:
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
        with pytest.raises(Unsupported, match="only Debian and Ubuntu"):
            store.bootstrap("fedora:40")
    finally:
        store.close()
    assert not (program / "arguments").exists()


def test_the_hosts_own_sources() -> None:
    """Also by number, where this host has the tables."""
    release = platform.freedesktop_os_release()["VERSION_CODENAME"]
    lines, epoch = distributions.sources(distributions.DEBIAN, release)
    assert any(line.startswith("deb ") and line.endswith(f" {release} main") for line in lines)
    assert not any("backports" in line for line in lines)
    assert epoch == 0 or epoch > 1_600_000_000


def test_numbers_are_code_names(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributions, "_INFO", short_tmp)
    (short_tmp / "ubuntu.csv").write_text("version,codename,series\n23.10,M M,mantic,x\n24.04 LTS,Noble Numbat,noble,x\n")
    assert distributions.parse("ubuntu:24.04") == (distributions.UBUNTU, "noble")
    assert distributions.parse("noble") == (distributions.DEBIAN, "noble")
    for suite in ("ubuntu:99.04", "debian:12"):  # not in the table, and no table
        with pytest.raises(NotFound, match="has no code name"):
            distributions.parse(suite)


def test_a_release_that_only_the_mirror_has(
    program: Path, mirror: Path, busybox_tar: Path, short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its keyring checks it and its newest release file dates it; without the keyring it is refused."""
    write(program, f"cat {busybox_tar}")
    for suite, day in (("noble", "Thu, 25 Apr 2024 15:10:33 UTC"), ("noble-security", "Fri, 26 Apr 2024 15:10:33 UTC")):
        (mirror / "dists" / suite).mkdir(parents=True)
        (mirror / "dists" / suite / "InRelease").write_text(f"Origin: Ubuntu\nDate: {day}\n")
    store = Store.open(short_tmp / "images")
    try:
        image = store.bootstrap("ubuntu:noble", packages=["less"])
        assert image.names == ("ubuntu:noble",) and image.created_ns == 1_714_144_233 * 10**9
        said = (program / "arguments").read_text()
        assert f"[signed-by={short_tmp}/ubuntu.gpg] http://127.0.0.1" in said and "--include=less" in said
        assert " noble main universe " in said and said.endswith(" noble-security main universe\n")
        with pytest.raises(NotFound, match="Ubuntu has no release warty"):
            store.bootstrap("ubuntu:warty")
        (short_tmp / "ubuntu.gpg").unlink()
        with pytest.raises(Unsupported, match=r"its keyring .*/ubuntu.gpg is missing") as refused:
            store.bootstrap("ubuntu:noble")
        assert "ubuntu-keyring" in str(refused.value.hint)
    finally:
        store.close()
