"""`ambi volume attach` and `detach` on a real engine: what inspect shows, who uses a volume, what a death costs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ambi.linux import mount
from tests.harness import EngineUnderTest
from tests.rawclient import RawClient

pytestmark = pytest.mark.needs("root")


def opened(busybox_tar: Path, *, vm: bool) -> Iterator[EngineUnderTest]:
    made = EngineUnderTest(Path(tempfile.mkdtemp(prefix="ambi-", dir="/tmp")))
    made.start(vm=vm)
    try:
        made.load_busybox(busybox_tar)
        yield made
    finally:
        made.destroy()


@pytest.fixture(scope="module")
def engine(busybox_tar: Path) -> Iterator[EngineUnderTest]:
    yield from opened(busybox_tar, vm=False)


@pytest.fixture
def vm_engine(busybox_tar: Path) -> Iterator[EngineUnderTest]:
    yield from opened(busybox_tar, vm=True)


@pytest.fixture
def box(engine: EngineUnderTest) -> Iterator[str]:
    """A running instance with a mount of its own at /own."""
    out(engine, "run", "-d", "--name", "box", "--network", "none", "-v", "kept:/own", "busybox", "sleep", "1000")
    yield "box"
    out(engine, "rm", "-f", "box")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("of the host\n")
    return tmp_path


def ambi(engine: EngineUnderTest, *args: str) -> subprocess.CompletedProcess[bytes]:
    return engine.ambi(*args)


def out(engine: EngineUnderTest, *args: str) -> str:
    done = ambi(engine, *args)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def refused(engine: EngineUnderTest, *args: str) -> str:
    done = ambi(engine, *args)
    assert done.returncode and b"hint:" in done.stderr, done
    return done.stderr.decode()


def shown(engine: EngineUnderTest, name: str = "box") -> dict[str, dict[str, Any]]:
    """Mounts of docker inspect, by target."""
    done = engine.docker("inspect", name)
    return {point["Destination"]: point for point in json.loads(done.stdout)[0]["Mounts"]}


def test_what_is_attached_is_seen_and_goes(engine: EngineUnderTest, box: str, source: Path) -> None:
    assert out(engine, "volume", "attach", box, f"{source}:/late/path/:ro") == ""
    out(engine, "volume", "attach", box, "late:/late/volume")
    script = "cat /late/path/file && ! touch /late/path/no 2> /dev/null && echo kept > /late/volume/x"
    assert out(engine, "exec", box, "sh", "-c", script) == "of the host\n"
    found = shown(engine)
    assert set(found) == {"/own", "/late/path", "/late/volume"}
    path, volume = found["/late/path"], found["/late/volume"]
    assert (path["Type"], path["Source"], path["RW"], path["Mode"]) == ("bind", str(source), False, "ro")
    assert (volume["Type"], volume["Name"], volume["RW"]) == ("volume", "late", True)
    assert "volume is in use" in refused(engine, "volume", "rm", "late")
    for target in ("/late/path", "/late/volume/"):
        assert out(engine, "volume", "detach", box, target) == ""
    assert set(shown(engine)) == {"/own"}
    assert out(engine, "exec", box, "sh", "-c", "ls /late/path /late/volume").split() == ["/late/path:", "/late/volume:"]
    assert out(engine, "run", "--rm", "-v", "late:/x", "--network", "none", "busybox", "cat", "/x/x") == "kept\n"
    out(engine, "volume", "rm", "late")


def test_an_engine_that_was_killed_knows_them(engine: EngineUnderTest, box: str, source: Path) -> None:
    out(engine, "volume", "create", "-o", "type=tmpfs", "-o", "device=tmpfs", "-o", "o=size=1m", "memory")
    out(engine, "volume", "attach", box, "memory:/memory")
    out(engine, "volume", "attach", box, f"{source}:/path")
    out(engine, "exec", box, "sh", "-c", "echo here > /memory/x")
    held = [place for place, _ in mount.table() if place.endswith("/memory/_data")]
    engine.kill()
    engine.start(vm=False)
    assert set(shown(engine)) == {"/own", "/memory", "/path"}
    assert "volume is in use" in refused(engine, "volume", "rm", "memory")
    assert out(engine, "exec", box, "cat", "/memory/x", "/path/file") == "here\nof the host\n"
    assert [place for place, _ in mount.table() if place.endswith("/memory/_data")] == held
    out(engine, "volume", "detach", box, "/path")
    assert set(shown(engine)) == {"/own", "/memory"}
    out(engine, "restart", "-t", "0", box)
    assert set(shown(engine)) == {"/own"}, "a restart is without what was attached"
    assert out(engine, "exec", box, "ls", "/memory") == ""
    out(engine, "volume", "rm", "memory")


def inside(engine: EngineUnderTest, name: str = "box") -> set[str]:
    """Where the instance has mounts below /late, by the kernel."""
    pid = json.loads(engine.docker("inspect", name).stdout)[0]["State"]["Pid"]
    places = [line.split()[4] for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
    return {place for place in places if place.startswith("/late")}


@pytest.mark.parametrize("delay", [0.0, 0.002, 0.005, 0.01, 0.02, 0.04])
def test_an_engine_that_dies_on_the_way(engine: EngineUnderTest, box: str, delay: float) -> None:
    """What the kernel has is what the next engine knows, and a volume that is mounted is there."""
    client = RawClient(engine.socket)
    client.send("POST", f"/ambi/instances/{box}/mounts", {"Volume": "late:/late"})
    time.sleep(delay)
    engine.kill()
    client.socket.close()
    engine.start(vm=False)
    known = {target for target in shown(engine) if target != "/own"}
    assert inside(engine) == known
    if known:
        assert "volume is in use" in refused(engine, "volume", "rm", "late")
        out(engine, "exec", box, "touch", "/late/x")
        out(engine, "volume", "detach", box, "/late")
    out(engine, "volume", "rm", "-f", "late")


def test_a_shim_that_dies_lets_go(engine: EngineUnderTest, source: Path) -> None:
    out(engine, "volume", "create", "-o", "type=tmpfs", "-o", "device=tmpfs", "-o", "o=size=1m", "memory")
    out(engine, "run", "-d", "--name", "short", "--network", "none", "busybox", "sleep", "1000")
    out(engine, "volume", "attach", "short", "memory:/memory")
    os.kill(json.loads(engine.docker("inspect", "short").stdout)[0]["Ambi"]["ShimPid"], signal.SIGKILL)
    assert out(engine, "wait", "short") == "137\n"
    assert shown(engine, "short") == {}
    out(engine, "start", "short")  # behind the sweep of the run before
    assert not [place for place, _ in mount.table() if place.endswith("/memory/_data")]
    out(engine, "rm", "-f", "short")
    out(engine, "volume", "rm", "memory")


def test_one_that_is_in_use(engine: EngineUnderTest, box: str, source: Path) -> None:
    out(engine, "volume", "attach", box, f"{source}:/path")
    out(engine, "exec", "-d", box, "sh", "-c", "cd /path && touch ready && exec sleep 1000")
    while not (source / "ready").exists():
        time.sleep(0.01)
    text = refused(engine, "volume", "detach", box, "/path")
    assert "/path is in use" in text and f"ambi volume detach --force {box} /path" in text
    assert "/path" in shown(engine)
    out(engine, "volume", "detach", "--force", box, "/path")
    assert out(engine, "exec", box, "ls", "/path") == "" and set(shown(engine)) == {"/own"}


def test_bad_ones_name_what_is_wrong_and_change_nothing(engine: EngineUnderTest, box: str, source: Path) -> None:
    out(engine, "create", "--name", "still", "--network", "none", "busybox", "true")
    out(engine, "volume", "create", "-o", "type=disk", "-o", "size=64m", "disk")
    before = shown(engine)
    for words, text in (
        (("attach", "still", f"{source}:/x"), "is not running"),
        (("attach", "nobody", f"{source}:/x"), "No such container: nobody"),
        (("attach", box, f"{source}:/own"), "has a mount of its own at /own"),
        (("attach", box, f"{source}:/proc"), "has a mount of its own at /proc"),
        (("attach", box, f"{source}:/"), "destination can't be '/'"),
        (("attach", box, f"{source}:relative"), "mount path must be absolute"),
        (("attach", box, str(source)), "does not say where it goes"),
        (("attach", box, f"{source}:/x:nonsense"), "invalid mode: nonsense"),
        (("attach", box, "a volume:/x"), "invalid characters"),
        (("attach", box, "disk:/x"), "volume disk is a disk"),
        (("attach", box, f"{source}:/bin/busybox/x"), "/bin/busybox"),
        (("attach", box, "fresh:/bin/busybox/x"), "/bin/busybox"),
        (("detach", box, "/x"), "nothing is attached at /x of box"),
        (("detach", box, "/own"), "is of the configuration of box"),
        (("detach", box, "x"), "must be an absolute path"),
        (("detach", "still", "/x"), "is not running"),
    ):
        assert text in refused(engine, "volume", *words), words
    assert shown(engine) == before
    assert "x" not in out(engine, "exec", box, "ls", "/").split()
    names = out(engine, "volume", "ls", "-q").split()
    assert set(names) == {"kept", "disk"}, "none was made for what failed"
    out(engine, "rm", "still")


@pytest.mark.needs("qemu")
def test_the_same_in_a_virtual_machine(vm_engine: EngineUnderTest, source: Path) -> None:
    engine = vm_engine
    out(engine, "run", "-d", "--isolation", "vm", "--name", "bare", "--network", "none", "busybox", "sleep", "1000")
    text = refused(engine, "volume", "attach", "bare", f"{source}:/late")
    assert "cannot get a file tree while it runs" in text and "start it with a bind mount" in text
    out(engine, "rm", "-f", "bare")
    words = ("--isolation", "vm", "--name", "vm", "--network", "none", "-v", "kept:/own")
    out(engine, "run", "-d", *words, "busybox", "sleep", "1000")
    out(engine, "volume", "attach", "vm", f"{source}:/late:ro")
    out(engine, "volume", "attach", "vm", "late:/volume")
    engine.kill()
    engine.start()
    assert set(shown(engine, "vm")) == {"/own", "/late", "/volume"}
    script = "cat /late/file && ! touch /late/x 2> /dev/null && echo in > /volume/x"
    assert out(engine, "exec", "vm", "sh", "-c", script) == "of the host\n"
    assert "volume is in use" in refused(engine, "volume", "rm", "late")
    assert "file trees" in refused(engine, "snapshot", "save", "vm")
    out(engine, "volume", "detach", "vm", "/late")
    out(engine, "restart", "-t", "0", "vm")
    assert set(shown(engine, "vm")) == {"/own"}
    assert out(engine, "exec", "vm", "ls", "/late", "/volume").split() == ["/late:", "/volume:"]
    out(engine, "rm", "-f", "vm")
    out(engine, "volume", "rm", "late")
