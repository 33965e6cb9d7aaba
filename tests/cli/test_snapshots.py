"""`ambi snapshot` and `docker checkpoint` on a real engine: a life, bad input, and deaths in the middle of a save."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import AMBI, EngineUnderTest
from tests.snapshotkit import COUNT

pytestmark = pytest.mark.needs("docker", "qemu")
SECONDS = 60.0


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, busybox_tar: Path) -> Iterator[EngineUnderTest]:
    made = EngineUnderTest(tmp_path_factory.mktemp("s"))
    made.start()
    made.load_busybox(busybox_tar)
    yield made
    made.destroy()


def ok(engine: EngineUnderTest, *args: str) -> str:
    done = engine.ambi(*args)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def refused(engine: EngineUnderTest, *args: str) -> str:
    """What `ambi` says of what it does not do; it has a hint."""
    done = engine.ambi(*args)
    text = done.stderr.decode()
    assert done.returncode == 125 and "\nhint: " in text, text
    return text


def docker(engine: EngineUnderTest, *args: str, status: int = 0) -> str:
    done = engine.docker(*args)
    text = (done.stdout + done.stderr).decode()
    assert done.returncode == status, text
    return text


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def logged(engine: EngineUnderTest, name: str) -> list[int]:
    return [int(word) for word in ok(engine, "logs", name).split()]


def counting(engine: EngineUnderTest, name: str, *options: str) -> str:
    """A VM that counts; its id."""
    identity = ok(engine, "run", "-d", "--isolation", "vm", "--name", name, *options, "busybox", "sh", "-c", COUNT).strip()
    until(lambda: len(logged(engine, name)) > 3)
    return identity


def more(engine: EngineUnderTest, name: str) -> None:
    before = len(logged(engine, name))
    until(lambda: len(logged(engine, name)) > before + 3)


def state(engine: EngineUnderTest, name: str) -> str:
    return ok(engine, "inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", name).strip()


def home(engine: EngineUnderTest, identity: str) -> Path:
    return engine.data / "instances" / identity / "snapshots"


def test_a_life_by_both_command_lines(engine: EngineUnderTest) -> None:
    identity = counting(engine, "web", "-p", "127.0.0.1::80", "--network", "bridge")
    assert ok(engine, "snapshot", "save", "web", "one") == "one\n"
    more(engine, "web")
    assert ok(engine, "snapshot", "save", "--quiet", "web") == "s1\n"
    assert docker(engine, "checkpoint", "ls", "web").split() == ["CHECKPOINT", "NAME", "one", "s1"]
    assert ok(engine, "snapshot", "ls", "-q") == "one\ns1\n"
    row = json.loads(ok(engine, "snapshot", "ls", "--format", "json", "web").splitlines()[0])
    assert (row["Instance"], row["Name"], row["Problem"]) == ("web", "one", "") and row["StoodStill"].endswith("ms")
    before = logged(engine, "web")
    assert before == list(range(1, len(before) + 1))
    assert "is running" in refused(engine, "snapshot", "restore", "web", "one")
    assert ok(engine, "snapshot", "restore", "--force", "web", "one") == "web\n"
    more(engine, "web")
    after = logged(engine, "web")[len(before) :]
    again = after[next(n for n, (a, b) in enumerate(zip(after, after[1:] + [0], strict=True)) if b < a) + 1 :] or after
    assert again == list(range(again[0], again[0] + len(again))) and again[0] < before[-1]
    assert ok(engine, "inspect", "-f", "{{.Machine.started}}", "web") == "snapshot\n"
    assert docker(engine, "checkpoint", "create", "web", "ck") == "ck\n"
    assert state(engine, "web") == "exited 137"
    stopped = logged(engine, "web")
    docker(engine, "start", "--checkpoint", "ck", "web")
    more(engine, "web")
    last = logged(engine, "web")[len(stopped) :]
    assert last == list(range(last[0], last[0] + len(last))) and 0 <= stopped[-1] + 1 - last[0] <= 1
    address = ok(engine, "inspect", "-f", "{{.NetworkSettings.IPAddress}}", "web").strip()
    inside = ok(engine, "exec", "web", "sh", "-c", "ip -o -4 addr show eth0; cat /etc/hosts")
    assert inside.count(f" {address}/") == 1 and inside.count(" inet ") == 1 and f"{address}\t" in inside
    docker(engine, "checkpoint", "rm", "web", "one")
    ok(engine, "snapshot", "rm", "web", "s1", "ck")
    assert list(home(engine, identity).iterdir()) == []
    ok(engine, "rm", "-f", "web")
    assert not home(engine, identity).parent.exists()


def test_what_is_refused_changes_nothing(engine: EngineUnderTest) -> None:
    ok(engine, "run", "-d", "--name", "box", "busybox", "sleep", "1000")
    assert "is a container" in refused(engine, "snapshot", "save", "box")
    assert "has no snapshot" in refused(engine, "snapshot", "restore", "box", "x")
    counting(engine, "vm", "--rm")
    assert "invalid name" in refused(engine, "snapshot", "save", "vm", "../x")
    assert "is removed when it ends" in refused(engine, "snapshot", "save", "--stop", "vm")
    ok(engine, "snapshot", "save", "vm", "one")
    assert "already" in refused(engine, "snapshot", "save", "vm", "one")
    assert "has no snapshot" in refused(engine, "snapshot", "rm", "vm", "two")
    assert "directory of one's own" in docker(engine, "checkpoint", "ls", "--checkpoint-dir", "/tmp", "vm", status=1)
    assert "No such container" in refused(engine, "snapshot", "ls", "nobody")
    found = refused(engine, "snapshot", "restore", "--force", "vm", "one")
    assert "is removed when it ends" in found
    ok(engine, "rm", "-f", "vm", "box")


def test_damage_is_named_before_what_runs_is_killed(engine: EngineUnderTest) -> None:
    identity = counting(engine, "hurt")
    ok(engine, "snapshot", "save", "hurt", "one")
    path = home(engine, identity) / "one" / "state"
    with open(path, "r+b") as file:
        file.seek(1 << 20)
        file.write(b"damage")
    found = refused(engine, "snapshot", "restore", "--force", "hurt", "one")
    assert str(path) in found and "checksum" in found
    assert state(engine, "hurt").startswith("running")
    (home(engine, identity) / "one" / "manifest.json").write_text("{}")
    assert "damaged" in ok(engine, "snapshot", "ls", "hurt")
    ok(engine, "snapshot", "rm", "hurt", "one")
    ok(engine, "rm", "-f", "hurt")


def test_a_full_disk_leaves_nothing_and_the_machine_runs_on(short_tmp: Path, busybox_tar: Path) -> None:
    base = short_tmp / "small"
    base.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160m", "none", base], check=True)
    engine = EngineUnderTest(base / "e")
    try:
        engine.start()
        engine.load_busybox(busybox_tar)
        place = home(engine, counting(engine, "full"))
        free = os.statvfs(base)
        with open(base / "filler", "wb") as filler:
            os.posix_fallocate(filler.fileno(), 0, (free.f_bavail * free.f_frsize) - (30 << 20))
        for options in ((), ("--stop",)):
            assert "No space left" in refused(engine, "snapshot", "save", *options, "full", "one")
            assert list(place.iterdir()) == []
            more(engine, "full")
            assert engine.ambi("exec", "full", "cat", "/last").returncode == 0
        assert ok(engine, "inspect", "-f", "{{.State.Status}}", "full") == "running\n"
    finally:
        engine.destroy()
        subprocess.run(["umount", base], check=True)


def begun(engine: EngineUnderTest, *args: str) -> subprocess.Popen[bytes]:
    """`ambi`, without waiting for it."""
    roots = {"AMBI_SOCKET": str(engine.socket), "AMBI_DATA_ROOT": str(engine.data), "AMBI_RUN_ROOT": str(engine.run)}
    return subprocess.Popen(
        [str(AMBI), *args],
        env={**engine.environment, **roots},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def half_made(engine: EngineUnderTest, identity: str, name: str) -> subprocess.Popen[bytes]:
    """A save that is under way: its files are there, and it has no name yet."""
    saving = begun(engine, "snapshot", "save", name, "one")
    until((home(engine, identity) / ".new-one" / "state").exists)
    return saving


@pytest.mark.parametrize("victim", ["shim", "vmm"])
def test_a_death_in_the_middle_leaves_nothing(engine: EngineUnderTest, victim: str) -> None:
    identity = counting(engine, victim)
    shim = engine.shims()[identity]
    pid = shim if victim == "shim" else int(Path(f"/proc/{shim}/task/{shim}/children").read_text().split()[0])
    saving = half_made(engine, identity, victim)
    os.kill(pid, signal.SIGKILL)
    assert saving.wait(SECONDS) == 125
    until(lambda: state(engine, victim) == "exited 137")
    assert list(home(engine, identity).iterdir()) == []
    ok(engine, "start", victim)
    more(engine, victim)
    ok(engine, "rm", "-f", victim)


def test_an_engine_that_dies_in_the_middle_leaves_nothing(engine: EngineUnderTest) -> None:
    identity = counting(engine, "alone")
    saving = half_made(engine, identity, "alone")
    engine.kill()
    saving.wait(SECONDS)
    engine.start()
    assert state(engine, "alone").startswith("running")
    assert ok(engine, "snapshot", "ls", "-q", "alone") == ""
    assert list(home(engine, identity).iterdir()) == []
    more(engine, "alone")
    assert ok(engine, "snapshot", "save", "alone", "one") == "one\n"
    ok(engine, "rm", "-f", "alone")


def test_a_death_in_the_middle_of_a_restore_leaves_the_disk_as_it_was(engine: EngineUnderTest) -> None:
    identity = counting(engine, "back")
    ok(engine, "snapshot", "save", "back", "one")
    ok(engine, "exec", "back", "sh", "-c", "echo kept > /kept; sync")
    ok(engine, "stop", "-t", "0", "back")
    upper = home(engine, identity).parent / "upper"
    before = (upper / "disk.img").stat().st_ino
    restoring = begun(engine, "snapshot", "restore", "back", "one")
    until((upper / ".restored-disk.img").exists)
    os.kill(engine.shims()[identity], signal.SIGKILL)
    assert restoring.wait(SECONDS) == 125
    until(lambda: [path.name for path in upper.iterdir()] == ["disk.img"])
    assert (upper / "disk.img").stat().st_ino == before and not state(engine, "back").startswith("running")
    ok(engine, "start", "back")
    assert ok(engine, "exec", "back", "cat", "/kept") == "kept\n"
    ok(engine, "rm", "-f", "back")
