"""Volumes of type nfs against a real server: the kernel's, which the machine of the lab has, in the engine's namespace."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.test_real_engine import OnDemand
from tests.nfskit import NfsServer

OPTIONS = "vers=4.2,soft,timeo=20,retrans=1"


@pytest.fixture(scope="module")
def server(engine: OnDemand, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NfsServer]:
    for module in ("nfsd", "nfsv4"):
        subprocess.run(["modprobe", module], check=True)
    with NfsServer(engine.entering, tmp_path_factory.mktemp("served")) as it:
        yield it


def volume(engine: OnDemand, name: str, address: str, device: str = ":/") -> None:
    options = ("type=nfs", f"device={device}", f"o=addr={address},{OPTIONS}")
    engine.ok("volume", "create", *(word for text in options for word in ("-o", text)), name)


def test_a_volume_of_a_server(engine: OnDemand, server: NfsServer) -> None:
    """By address and by name; both kinds of instance; one mount for all, gone with the last of them."""
    (server.export / "given").write_text("from the server\n")
    (server.export / "inside").mkdir()
    with open("/etc/hosts", "a", encoding="ascii") as hosts:
        hosts.write("127.0.0.1 files.test\n")
    volume(engine, "whole", "127.0.0.1")
    volume(engine, "part", "files.test", ":/inside")
    both = ("-v", "whole:/whole", "-v", "part:/part", "bb", "sh", "-c")
    for kind in ("container", "vm"):
        said = engine.ok("run", "--rm", "--isolation", kind, *both, f"cat /whole/given; echo {kind} > /part/{kind}")
        assert said == "from the server\n"
        written = server.export / "inside" / kind
        assert (written.read_text(), written.stat().st_uid) == (f"{kind}\n", 0)
    assert "nfs4" not in Path("/proc/self/mountinfo").read_text()
    engine.ok("run", "-d", "--name", "user", "-v", "whole:/whole", "bb", "sleep", "1000")
    assert Path("/proc/self/mountinfo").read_text().count(" nfs4 ") == 1
    (server.export / "later").write_text("at once\n")
    assert engine.ok("exec", "user", "cat", "/whole/later") == "at once\n"
    engine.ok("rm", "-f", "user")
    assert "nfs4" not in Path("/proc/self/mountinfo").read_text()


def test_what_a_server_refuses_or_does_not_have(engine: OnDemand, server: NfsServer) -> None:
    volume(engine, "missing", "127.0.0.1", ":/nowhere")
    done = engine.ambi("run", "--rm", "-v", "missing:/x", "bb", "true")
    assert done.returncode == 127 and b"no such file or directory" in done.stderr  # which docker's client reads in its way
    assert b"hint: see that the server exports it" in done.stderr
    volume(engine, "unknown", "nobody.test")
    done = engine.ambi("run", "--rm", "-v", "unknown:/x", "bb", "true")
    assert done.returncode == 125 and b"lookup nobody.test: no such host" in done.stderr


def test_a_server_that_is_away(engine: OnDemand, server: NfsServer) -> None:
    """A start says so; what runs has an error of input and output, for the mount is soft, and ends as it likes."""
    (server.export / "given").write_text("here\n")
    volume(engine, "away", "127.0.0.1")
    engine.ok("run", "-d", "--name", "user", "-v", "away:/x", "bb", "sleep", "1000")
    assert engine.ok("exec", "user", "cat", "/x/given") == "here\n"
    server.stop()
    done = engine.ambi("exec", "user", "sh", "-c", "echo more > /x/more")
    assert done.returncode != 0 and b"more" in done.stderr
    engine.ok("rm", "-f", "user")
    assert "nfs4" not in Path("/proc/self/mountinfo").read_text()
    done = engine.ambi("run", "--rm", "-v", "away:/x", "bb", "true")
    assert done.returncode == 125 and b"hint:" in done.stderr
    assert b"connection refused" in done.stderr or b"input/output error" in done.stderr  # as the kernel has it
