"""Volumes of a real engine: what is in them, who uses them, and what is left of them."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import EngineUnderTest

PREPARE = (
    "mkdir -p /data/deep && echo hello > /data/deep/file && ln /data/deep/file /data/other && ln -s deep /data/link &&"
    " chown 5:6 /data/deep/file && chmod 1750 /data/deep && chown 7:8 /data && mkfifo /data/pipe && touch -d @1000 /data/old"
)


@pytest.fixture(scope="module")
def engine(busybox_tar: Path) -> Iterator[EngineUnderTest]:
    made = EngineUnderTest(Path(tempfile.mkdtemp(prefix="ambi-", dir="/tmp")))
    made.start(vm=False)
    try:
        _prepare(made, busybox_tar)
        yield made
    finally:
        made.destroy()


def _prepare(made: EngineUnderTest, busybox_tar: Path) -> None:
    """The image `filled`, with a volume declared at /data and something in it."""
    made.load_busybox(busybox_tar)
    run(made, "--name", "maker", "busybox", "sh", "-c", PREPARE, check=True)
    change = ["-c", "VOLUME /data"]
    assert made.docker("commit", *change, "maker", "filled").returncode == 0
    made.docker("rm", "maker")


def run(engine: EngineUnderTest, *args: str, check: bool = False) -> subprocess.CompletedProcess[bytes]:
    done = engine.docker("run", "--network", "none", *args)
    assert not check or done.returncode == 0, done.stderr.decode()
    return done


def out(engine: EngineUnderTest, *args: str) -> str:
    done = engine.docker(*args)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().strip()


def names(engine: EngineUnderTest, *args: str) -> list[str]:
    return out(engine, "volume", "ls", "-q", *args).split()


def test_a_new_volume_has_what_the_image_has_there(engine: EngineUnderTest) -> None:
    look = "cd /data; stat -c '%n %u:%g %a %h' deep deep/file other pipe .; stat -c %Y old; readlink link; cat other"
    seen = run(engine, "--rm", "-v", "first:/data", "filled", "sh", "-c", look, check=True).stdout.decode().splitlines()
    assert seen == [
        "deep 0:0 1750 2", "deep/file 5:6 644 2", "other 5:6 644 2", "pipe 0:0 644 1", ". 7:8 755 3", "1000", "deep",
        "hello",
    ]  # fmt: skip
    run(engine, "--rm", "-v", "first:/data", "filled", "rm", "/data/other", check=True)
    assert run(engine, "--rm", "-v", "first:/data", "filled", "ls", "/data").stdout.split() == [
        b"deep",
        b"link",
        b"old",
        b"pipe",
    ]
    assert run(engine, "--rm", "-v", "second:/data:nocopy", "filled", "ls", "/data").stdout == b""
    done = run(engine, "--rm", "-v", "third:/data:ro", "filled", "sh", "-c", "ls /data/deep; touch /data/x")
    assert done.returncode == 1 and done.stdout == b"file\n" and b"Read-only file system" in done.stderr
    assert set(names(engine)) >= {"first", "second", "third"}
    out(engine, "volume", "rm", "first", "second", "third")
