"""Snapshots of our monitor's VMs: whole, as differences, and back; what is damaged or of another host is refused."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ambi.core.deadline import Deadline
from ambi.core.errors import Corrupt, Unsupported
from ambi.core.loop import Loop
from ambi.core.model import VmShape
from ambi.core.undo import Undo
from hyper.vm import snapshots
from hyper.vmm import snapshot as state_file
from tests import driverkit
from tests.cli.test_real_engine import OnDemand
from tests.snapshotkit import COUNT, home_of, restored, save, until_more

pytestmark = pytest.mark.needs("kvm")


@pytest.fixture(scope="module")
def rig(busybox_tar: Path) -> Iterator[driverkit.Rig]:
    with driverkit.vm_rig(busybox_tar) as it:
        yield it


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_a_count_goes_on_from_a_whole_one_and_from_a_difference(rig: driverkit.Rig) -> None:
    plan = rig.plan(["sh", "-c", COUNT])
    with rig.started_plan(plan) as running:
        until_more(running, 5)
        one = save(running, "one")
        middle = until_more(running, 5)
        two = save(running, "two")
        last = until_more(running, 5)
        assert running.exec(["cat", "/last"]).code == 0
    assert last == list(range(1, len(last) + 1))
    assert (one["vmm"], one["parent"], two["parent"]) == ("ambi", None, "one")
    sizes = [allocated(home_of(plan, name) / "memory") for name in ("one", "two")]
    assert 0 < sizes[1] < sizes[0] // 4
    began = time.monotonic()
    with restored(rig, plan, "two") as running:
        took = time.monotonic() - began
        later = until_more(running, 5)
        assert later == list(range(later[0], later[0] + len(later))) and later[0] > middle[-1]
        assert int(running.exec(["cat", "/last"]).out) >= later[-1] - 1
    with restored(rig, plan, "one") as running:
        again = until_more(running, 5)
        assert again == list(range(again[0], again[0] + len(again))) and 5 < again[0] < middle[-1]
        assert save(running, "three")["parent"] == "one"
    print(
        f"\nstood still {one['still_ns'] / 1e6:.0f} and {two['still_ns'] / 1e6:.0f} ms, memory {sizes[0] >> 10} and"
        f" {sizes[1] >> 10} KiB, restored in {took:.2f} s"
    )


def test_two_processors_go_on(rig: driverkit.Rig) -> None:
    """Each with a program of its own that counts."""
    plan = rig.plan(["sh", "-c", f"(while :; do :; done) & {COUNT}"])._replace(vm=VmShape(vcpus=2))
    with rig.started_plan(plan) as running:
        until_more(running, 5)
        save(running, "one")
        last = until_more(running, 2)
    with restored(rig, plan, "one") as running:
        again = until_more(running, 5)
        assert again == list(range(again[0], again[0] + len(again))) and 5 < again[0] <= last[-1]
        assert running.exec(["nproc"]).out == b"2\n"


def test_what_is_damaged_or_of_another_host_is_refused_and_changes_nothing(
    rig: driverkit.Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = rig.plan(["sleep", "1000"])
    with rig.started_plan(plan) as running:
        save(running, "one")
        save(running, "two")
    disk = plan.rootfs.upper / "disk.img"  # type: ignore[union-attr]
    before = disk.stat()
    for name, snapshot in (("state", "two"), ("disk.img", "two"), ("memory", "one")):
        path = home_of(plan, snapshot) / name
        with open(path, "r+b") as file:
            at = os.lseek(file.fileno(), 0, os.SEEK_DATA) + 100
            old = os.pread(file.fileno(), 1, at)
            os.pwrite(file.fileno(), bytes([old[0] ^ 1]), at)
            with pytest.raises(Corrupt, match="damaged"), Undo() as undo:
                rig.driver.restore(plan, home_of(plan, "two"), undo, Deadline.after(60), Loop())  # type: ignore[attr-defined]
            os.pwrite(file.fileno(), old, at)
    here = state_file.this_host
    monkeypatch.setattr(state_file, "this_host", lambda found: here(found)._replace(model=here(found).model + 1))
    with pytest.raises(Unsupported, match="another processor"), Undo() as undo:
        rig.driver.restore(plan, home_of(plan, "two"), undo, Deadline.after(60), Loop())  # type: ignore[attr-defined]
    monkeypatch.undo()
    after = disk.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert sorted(path.name for path in disk.parent.iterdir()) == ["disk.img"]
    with restored(rig, plan, "two") as running:
        assert running.exec(["true"]).code == 0
    assert snapshots.children(home_of(plan, "x").parent, "one") == ["two"]


def test_one_with_a_network_goes_on_with_another_address(engine: OnDemand) -> None:
    engine.ok("network", "create", "one")
    engine.ok("network", "create", "two")
    engine.ok("run", "-d", "--isolation", "vm", "--name", "web", "--network", "one", "bb", "sleep", "100000")
    engine.ok("exec", "web", "sh", "-c", "echo saved > /file")
    engine.ok("snapshot", "save", "web", "s")
    engine.ok("exec", "web", "sh", "-c", "echo later > /file")
    engine.ok("network", "connect", "two", "web")
    engine.ok("network", "disconnect", "one", "web")
    engine.ok("snapshot", "restore", "--force", "web", "s")
    address = engine.ok("inspect", "-f", "{{.NetworkSettings.Networks.two.IPAddress}}", "web").strip()
    script = "cat /file; ip -o -4 addr; ping -c 1 -W 5 $(ip route | sed -n 's/default via \\([^ ]*\\).*/\\1/p')"
    said = engine.ok("exec", "web", "sh", "-c", script)
    assert said.startswith("saved\n") and f" {address}/" in said and said.count(" inet ") == 2, said
    assert " 0% packet loss" in said, said
    assert f"{address}\t" in engine.ok("exec", "web", "cat", "/etc/hosts")
    assert engine.ok("inspect", "-f", "{{.Machine.started}}", "web") == "snapshot\n"
    engine.ok("rm", "-f", "web")
    engine.ok("network", "rm", "one", "two")
