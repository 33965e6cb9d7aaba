"""Snapshots of VMs of QEMU: they go on where they stood, with their disks, and nothing of a failed one stays."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ambi.core.deadline import Deadline
from ambi.core.errors import AmbiError, Corrupt, Unavailable, Unsupported
from ambi.core.loop import Loop
from ambi.core.undo import Undo
from hyper.qemu import snapshots as qemu_snapshots
from hyper.qemu.snapshots import QemuSnapshots
from hyper.vm import disk, snapshots
from tests import driverkit
from tests.snapshotkit import COUNT, home_of, numbers, restored, save, until_more

pytestmark = pytest.mark.needs("qemu")


@pytest.fixture(scope="module")
def rig(busybox_tar: Path) -> Iterator[driverkit.Rig]:
    with driverkit.vm_rig(busybox_tar) as it:
        yield it


def test_a_count_goes_on_without_a_gap_or_a_repeat(rig: driverkit.Rig) -> None:
    plan = rig.plan(["sh", "-c", COUNT])
    with rig.started_plan(plan) as running:
        until_more(running, 5)
        save(running, "first")
        first = until_more(running, 20)
        assert first == list(range(1, len(first) + 1))
        assert running.exec(["cat", "/last"]).code == 0
        save(running, "second")
        until_more(running, 5)
    with restored(rig, plan, "first") as running:
        again = until_more(running, 20)
        assert again == list(range(again[0], again[0] + len(again)))
        assert 5 < again[0] < first[-1]
        assert int(running.exec(["cat", "/last"]).out) >= again[0]
    with restored(rig, plan, "second") as running:
        later = until_more(running, 5)
        assert later == list(range(later[0], later[0] + len(later))) and later[0] > again[0]
    assert snapshots.names(home_of(plan, "x").parent) == ["first", "second"]
    assert numbers(running)


def disk_volume(rig: driverkit.Rig, name: str) -> Path:
    path = rig.base / f"{name}.img"
    disk.ensure(path, 64 << 20, rig.guest_dir / "disks")
    return path


def test_disks_are_those_of_the_moment_and_so_is_the_first_again(rig: driverkit.Rig) -> None:
    path = disk_volume(rig, "data")
    mount = {"destination": "/data", "type": "ambi.disk", "source": str(path), "options": []}
    plan = rig.plan(["sh", "-c", "sleep 100000"], mounts=(mount,))
    with rig.started_plan(plan) as running:
        for number in (1, 2):
            write = f"echo {number} > /root.txt; echo {number} > /data/file; sync"
            assert running.exec(["sh", "-c", write]).code == 0
            save(running, f"s{number}")
        assert running.exec(["sh", "-c", "echo 3 | tee /root.txt /data/file; rm /data/file; sync"]).code == 0
    inode = path.stat().st_ino
    for name, text in (("s1", b"1\n1\n"), ("s2", b"2\n2\n"), ("s1", b"1\n1\n")):
        with restored(rig, plan, name) as running:
            assert running.exec(["cat", "/root.txt", "/data/file"]).out == text
            assert (
                running.exec(["sh", "-c", "echo later > /data/file; dd if=/dev/zero of=/big bs=1M count=4; sync"]).code == 0
            )
    assert path.stat().st_ino != inode  # a copy took its place
    assert sorted(entry.name for entry in plan.rootfs.upper.iterdir()) == ["disk.img"]  # type: ignore[union-attr]
    assert not [entry for entry in rig.base.iterdir() if entry.name.startswith(".restored")]
    with rig.started_plan(plan) as running:  # and a start goes on from there
        assert running.exec(["cat", "/data/file"]).out == b"later\n"


def test_input_goes_on_and_commands_of_then_are_gone(rig: driverkit.Rig) -> None:
    plan = rig.plan(["sh", "-c", "cat; exit 7"], stdin=True)
    with rig.started_plan(plan) as running:
        running.init.write(b"one\n")
        running.init.until(lambda: b"one" in running.init.out)
        other = running.start_exec(["sh", "-c", "echo here; while :; do sleep 0.05; echo more; done"])
        other.until(lambda: b"more" in other.out)
        save(running, "one")
        assert running.exec(["true"]).code == 0
        length = len(other.out)
        other.until(lambda: len(other.out) > length)  # it goes on where it was saved
        other.release()
    big = os.urandom(400_000)  # more than the credit of both directions
    with restored(rig, plan, "one") as running:
        listed = running.exec(["ps"]).out
        assert b"echo more" not in listed and b"cat; exit 7" in listed
        running.init.write(big)
        running.init.close_stdin()
        done = running.init.finish()
    assert (done.code, done.out) == (7, big)


def test_a_paused_one_goes_on_and_a_terminal_is_there(rig: driverkit.Rig) -> None:
    plan = rig.plan(["sh", "-c", "while :; do read line; echo got $line; done"], terminal=True)
    with rig.started_plan(plan) as running:
        running.init.write(b"one\n")
        running.init.until(lambda: b"got one" in running.init.out)
        running.created.pause(Deadline.after(30))  # type: ignore[attr-defined]
        save(running, "one")
    with restored(rig, plan, "one") as running:
        running.created.init.resize(40, 100)
        running.init.write(b"two\n")
        running.init.until(lambda: b"got two" in running.init.out)


def test_what_cannot_be_restored_changes_nothing(rig: driverkit.Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = rig.plan(["sh", "-c", COUNT])
    with rig.started_plan(plan) as running:
        until_more(running, 2)
        save(running, "one")
    upper = plan.rootfs.upper  # type: ignore[union-attr]
    before, fds = (upper / "disk.img").stat(), set(os.listdir("/proc/self/fd"))

    def refused(kind: type[AmbiError], text: str) -> None:
        with pytest.raises(kind, match=text) as raised, Undo() as undo:
            rig.driver.restore(plan, home_of(plan, "one"), undo, Deadline.after(60), Loop())  # type: ignore[attr-defined]
        assert raised.value.hint

    monkeypatch.setattr(qemu_snapshots, "VERSION", "0.0.1")
    refused(Unsupported, "another version of ambi: .*, here is 0.0.1")
    monkeypatch.undo()
    for name in ("disk.img", "state"):
        path = home_of(plan, "one") / name
        with open(path, "ab") as file:
            file.write(b"!")
        size = path.stat().st_size
        refused(Corrupt, f"one/{name} is damaged: it has {size} bytes")
        os.truncate(path, size - 1)
    monkeypatch.setattr(QemuSnapshots, "restore", fail)
    refused(Unavailable, "no more")
    after = (upper / "disk.img").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert [entry.name for entry in upper.iterdir()] == ["disk.img"] and set(os.listdir("/proc/self/fd")) == fds


def fail(*_: object) -> None:
    raise Unavailable("no more", hint="none")


def test_file_trees_of_the_host_are_named(rig: driverkit.Rig, tmp_path: Path) -> None:
    mount = {"destination": "/tree", "type": "bind", "source": str(tmp_path), "options": ["rbind"]}
    with (
        rig.started(["sleep", "1000"], mounts=(mount,)) as running,
        pytest.raises(Unsupported, match="cannot be saved: /tree"),
    ):
        save(running, "one")
