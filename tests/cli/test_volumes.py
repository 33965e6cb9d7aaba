"""Volumes of both kinds of instance by our own command: the same promises, and one volume shared by both."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import EngineUnderTest

pytestmark = pytest.mark.needs("qemu")

PREPARE = (
    "mkdir -p /data/deep && echo hello > /data/deep/file && ln -s deep /data/link && chown 5:6 /data/deep/file &&"
    " chmod 1750 /data/deep && chown 7:8 /data && touch -d @1000 /data/old"
)
LOOK = (
    "cd /data; stat -c '%n %u:%g %a' deep deep/file .; stat -c %Y old; readlink link; cat deep/file; ls /sub;"
    " echo mine > new"
)
SEEN = ["deep 0:0 1750", "deep/file 5:6 644", ". 7:8 755", "1000", "deep", "hello", "file"]


@pytest.fixture(scope="module")
def engine(busybox_tar: Path) -> Iterator[EngineUnderTest]:
    made = EngineUnderTest(Path(tempfile.mkdtemp(prefix="ambi-", dir="/tmp")))
    made.start()
    try:
        made.load_busybox(busybox_tar)
        for args in (
            ["run", "--name", "maker", "--network", "none", "busybox", "sh", "-c", PREPARE],
            ["commit", "maker", "filled"],
            ["rm", "maker"],
        ):
            done = made.docker(*args)
            assert done.returncode == 0, done.stderr.decode()
        yield made
    finally:
        made.destroy()


def run(engine: EngineUnderTest, kind: str, *args: str) -> subprocess.CompletedProcess[bytes]:
    return engine.ambi("run", "--isolation", kind, "--network", "none", *args)


def lines(engine: EngineUnderTest, kind: str, *args: str) -> list[str]:
    done = run(engine, kind, *args)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().splitlines()


def out(engine: EngineUnderTest, *args: str) -> str:
    done = engine.ambi(*args)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().strip()


def test_a_volume_is_filled_has_parts_and_keeps_what_is_written(engine: EngineUnderTest, isolation: str) -> None:
    out(engine, "volume", "create", "parts")
    place = Path(json.loads(out(engine, "volume", "inspect", "parts"))[0]["Mountpoint"])
    (place / "some/where").mkdir(parents=True)
    (place / "some/where/file").touch()
    part = "type=volume,src=parts,dst=/sub,volume-subpath=some/where,ro"
    name = f"new-{isolation}"
    assert (
        lines(engine, isolation, "--rm", "-v", f"{name}:/data", "-v", "/anon", "--mount", part, "filled", "sh", "-c", LOOK)
        == SEEN
    )
    mine = Path(json.loads(out(engine, "volume", "inspect", name))[0]["Mountpoint"])
    assert (mine / "new").read_text() == "mine\n"
    assert set(out(engine, "volume", "ls", "-q").split()) == {"parts", name}
    (place / "out").symlink_to("/etc")
    refused = run(engine, isolation, "--rm", "--mount", "src=parts,dst=/sub,volume-subpath=out", "filled", "ls", "/sub")
    assert refused.returncode in (125, 127) and b"out" in refused.stderr and refused.stdout == b""
    out(engine, "volume", "rm", "parts", name)


def test_both_kinds_see_at_once_what_the_other_writes(engine: EngineUnderTest) -> None:
    for kind in ("container", "vm"):
        sleep = ["-d", "--name", kind, "-v", "both:/v", "--tmpfs", "/t:size=1m", "busybox", "sleep", "1000"]
        lines(engine, kind, *sleep)
    for writer, reader in (("container", "vm"), ("vm", "container")):
        for number in range(3):
            text = writer * (number + 1)
            out(engine, "exec", writer, "sh", "-c", f"echo {text} > /v/f; chown {number}:7 /v/f; chmod 640 /v/f")
            assert out(engine, "exec", reader, "sh", "-c", "cat /v/f; stat -c %s:%u:%g:%a /v/f") == (
                f"{text}\n{len(text) + 1}:{number}:7:640"
            )
        out(engine, "exec", writer, "sh", "-c", "mkdir /v/d; touch /v/d/x; mv /v/d /v/e; rm /v/f")
        assert out(engine, "exec", reader, "sh", "-c", "ls /v; ls /v/e; rm -r /v/e") == "e\nx"
    assert out(engine, "inspect", "-f", "{{len .Mounts}} {{(index .Mounts 0).Type}}", "vm") == "1 volume"
    out(engine, "rm", "-f", "vm", "container")
    out(engine, "volume", "rm", "both")


def test_a_disk_is_for_one_virtual_machine_at_a_time(engine: EngineUnderTest) -> None:
    out(engine, "volume", "create", "-o", "type=disk", "-o", "size=64m", "disk")
    refused = run(engine, "container", "--rm", "-v", "disk:/d", "busybox", "true")
    assert refused.returncode == 125 and b"a virtual machine alone can mount" in refused.stderr
    lines(
        engine, "vm", "-d", "--name", "first", "-v", "disk:/d", "busybox", "sh", "-c", "echo kept > /d/f; sync; sleep 1000"
    )
    refused = run(engine, "vm", "--rm", "-v", "disk:/d", "busybox", "true")
    assert refused.returncode == 125 and b"in use by first: one virtual machine at a time" in refused.stderr
    out(engine, "rm", "-f", "first")
    assert lines(engine, "vm", "--rm", "-v", "disk:/d", "busybox", "cat", "/d/f") == ["kept"]
    out(engine, "volume", "rm", "disk")


def test_the_figures_of_system_df(engine: EngineUnderTest) -> None:
    out(engine, "volume", "create", "weighed")
    place = Path(json.loads(out(engine, "volume", "inspect", "weighed"))[0]["Mountpoint"])
    (place / "f").write_bytes(bytes(1 << 20))
    out(engine, "create", "--name", "holder", "-v", "weighed:/w", "busybox", "true")
    shown = engine.docker("system", "df", "-v", "--format", "{{json .Volumes}}")
    found = {v["Name"]: (v["Links"], v["Size"]) for v in json.loads(shown.stdout)}
    assert found["weighed"][0] == "1" and found["weighed"][1].startswith("1.0")
    out(engine, "rm", "holder")
    assert out(engine, "volume", "prune", "-a", "-f").splitlines()[:2] == ["Deleted Volumes:", "weighed"]
