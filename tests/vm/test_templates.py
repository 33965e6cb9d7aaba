"""VMs that are copies of a template: their clock, their random numbers, many of them; what happens to a bad template."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ambi.core.deadline import Deadline
from ambi.core.loop import Loop
from ambi.core.plan import LaunchPlan
from ambi.core.undo import Undo
from hyper import boot_files
from hyper.vm import template
from hyper.vm.cgroup import Cgroup
from hyper.vm.template_store import Store
from tests import driverkit
from tests.harness import guest_dir
from tests.treekit import look

pytestmark = pytest.mark.needs("qemu")
SERIES, AT_ONCE = 12, 4


@pytest.fixture(scope="module")
def rig(busybox_tar: Path) -> Iterator[driverkit.Rig]:
    """With a guest directory of its own, so that no template is there at first."""
    base = Path(tempfile.mkdtemp(prefix="ambi-", dir="/tmp"))
    tree = driverkit.unpack(busybox_tar, base / "tree")
    files = boot_files.find(guest_dir())
    (base / "guest").mkdir()
    (base / "guest" / files.release).symlink_to(files.kernel.parent)
    (guest_dir() / "disks").mkdir(exist_ok=True)
    (base / "guest" / "disks").symlink_to(guest_dir() / "disks")
    yield driverkit.Rig("vm", base, (driverkit.make_layer(tree, "erofs", base / "base.erofs"),), base / "guest")
    shutil.rmtree(base)


def home(rig: driverkit.Rig) -> Path:
    return rig.guest_dir / template.DIRECTORY


def kept(rig: driverkit.Rig) -> list[Path]:
    return [path for path in home(rig).iterdir() if (path / "manifest.json").exists()]


def started(running: driverkit.Running) -> str:
    """How: "template" or "boot"."""
    found = running.created._parts.monitor.inspect(Deadline.after(5))  # type: ignore[attr-defined]
    return str(found["started"])


def test_maker_that_is_killed_leaves_nothing_in_the_way(rig: driverkit.Rig) -> None:
    plan = rig.plan(["true"])
    pid = os.fork()
    if pid == 0:
        with Undo() as undo:
            rig.driver.create(plan, undo, Deadline.after(120), Loop())
        os._exit(1)
    while not (home(rig) / "new" / "memory").exists():
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    cgroup = Cgroup(plan.config["linux"]["cgroupsPath"])
    cgroup.kill()  # as the sweep of its instance does
    cgroup.remove()
    assert kept(rig) == []
    with rig.started(["sleep", "1000"]) as running:
        assert started(running) == "template"
    assert len(kept(rig)) == 1 and not (home(rig) / "new").exists()


def test_copies_share_neither_chance_nor_files(rig: driverkit.Rig) -> None:
    script = "head -c 32 /dev/urandom | sha256sum; cat /proc/sys/kernel/random/boot_id; exec sleep 1000"
    with rig.started(["sh", "-c", script]) as one, rig.started(["sh", "-c", script]) as other:
        words = []
        for running in (one, other):
            assert started(running) == "template"
            running.init.until(lambda init=running.init: init.out.count(b"\n") == 2)  # type: ignore[misc]
            words.append(running.init.out.splitlines())
            assert running.exec(["sh", "-c", "[ ! -e /mine ] && echo > /mine"]).code == 0
    assert words[0][0] != words[1][0] and words[0][1] != words[1][1]


def test_clock_is_right_within_100_ms_at_once(rig: driverkit.Rig) -> None:
    before = time.time()
    with rig.started(["sh", "-c", "echo > /first; echo made; exec sleep 1000"]) as running:
        assert started(running) == "template"
        running.init.until(lambda: running.init.out)
        after = time.time()
        made = look(running.created, running.loop, "stat", "/first").answer["mtime_ns"] / 1e9
    assert before - 0.1 <= made <= after + 0.1


def test_memory_is_open_for_reading_alone(rig: driverkit.Rig) -> None:
    with rig.started(["sleep", "1000"]) as running:
        pid = running.created._parts.monitor.child.pid  # type: ignore[attr-defined]
        flags = {
            os.readlink(f"/proc/{pid}/fd/{fd}"): int(Path(f"/proc/{pid}/fdinfo/{fd}").read_text().split()[3], 8)
            for fd in os.listdir(f"/proc/{pid}/fd")
        }
        memory = str(kept(rig)[0] / "memory")
        assert flags[memory] & os.O_ACCMODE == os.O_RDONLY
        mapped = [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if line.endswith(memory)]
        assert mapped and all(line.split()[1] == "rw-p" for line in mapped)


def test_many_copies_in_a_row_and_at_once(rig: driverkit.Rig) -> None:
    before = set(os.listdir("/proc/self/fd"))
    for number in range(SERIES):
        with rig.started(["echo", str(number)], annotations={"ambi.disposable": "1"}) as running:
            assert started(running) == "template"
            assert running.init.finish().out == b"%d\n" % number
    pids = []
    for number in range(AT_ONCE):
        plan = rig.plan(["sh", "-c", f"read x; echo $x {number}"], stdin=True)
        pids.append(os.fork())
        if pids[-1] == 0:
            _child(rig, plan, number)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [7] * AT_ONCE
    assert set(os.listdir("/proc/self/fd")) == before


def _child(rig: driverkit.Rig, plan: LaunchPlan, number: int) -> None:
    code = 8
    try:
        with rig.started_plan(plan) as running:
            running.init.write(b"here\n")
            done = running.init.finish()
            code = 7 if (done.code, done.out) == (0, b"here %d\n" % number) and started(running) == "template" else 9
    finally:
        os._exit(code)


def test_template_that_no_vmm_takes_is_dropped_and_the_guest_boots(
    rig: driverkit.Rig, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its files are as they were written; what they say is nonsense."""
    found = kept(rig)[0]
    store = Store(home(rig))
    store.drop(found.name)
    draft = store.draft(found.name, 256 << 20)
    assert draft is not None
    draft.publish(b"no state of any guest" * 1000)
    draft.close()
    with rig.started(["sleep", "1000"]) as running:
        assert started(running) == "boot"
    assert kept(rig) == []
    assert f"the guest boots; template {found.name}: " in capfd.readouterr().err


def test_switched_off_every_guest_boots(rig: driverkit.Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(template.CHOICE, "off")
    with rig.started(["sleep", "1000"]) as running:
        assert started(running) == "boot"
    assert kept(rig) == []
