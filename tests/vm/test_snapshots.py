"""Snapshots of VMs of QEMU: they go on where they stood, with their disks, and nothing of a failed one stays."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hyper.vm import snapshots
from tests import driverkit
from tests.harness import guest_dir
from tests.snapshotkit import COUNT, home_of, numbers, restored, save, until_more

pytestmark = pytest.mark.needs("qemu")


@pytest.fixture(scope="module")
def rig(busybox_tar: Path) -> Iterator[driverkit.Rig]:
    base = Path(tempfile.mkdtemp(prefix="ambi-", dir="/tmp"))
    tree = driverkit.unpack(busybox_tar, base / "tree")
    yield driverkit.Rig("vm", base, (driverkit.make_layer(tree, "erofs", base / "base.erofs"),), guest_dir())
    shutil.rmtree(base)


def test_a_count_goes_on_without_a_gap_or_a_repeat(rig: driverkit.Rig) -> None:
    plan = rig.plan(["sh", "-c", COUNT])
    with rig.started_plan(plan) as running:
        until_more(running, 5)
        manifest = save(running, "first")
        print("still", manifest["still_ns"] / 1e6, "ms")
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
