"""A VM that changes its size while it runs: CPUs, disk, memory; and one whose agent does not answer.

`tests/lab/test_vmm_sizes.py` has the same over our own monitor.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ambi.core.deadline import Deadline
from ambi.core.errors import InvalidRequest, Unsupported
from ambi.core.model import VmShape
from hyper.guest import build
from hyper.guest.initramfs import build_initramfs
from hyper.vm import disk, guest_process, template
from tests import driverkit
from tests.harness import guest_dir

pytestmark = pytest.mark.needs("qemu")
SOON = 60
WEDGED = (  # in main.c
    ("send_signal(a, id, &fields);", ";"),
    ("        power_off();\n", "        break;\n"),
    ("static void send_signal(", "__attribute__((unused)) static void send_signal("),
)


@pytest.fixture(scope="module")
def rig(busybox_tar: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[driverkit.Rig]:
    base = tmp_path_factory.mktemp("sizes")
    tree = driverkit.unpack(busybox_tar, base / "tree")
    yield driverkit.Rig("vm", base, (driverkit.make_layer(tree, "erofs", base / "base.erofs"),), guest_dir())


def shaped(rig: driverkit.Rig, args: list[str], **changes: Any) -> Any:
    plan = rig.plan(args)
    assert plan.vm is not None
    return plan._replace(vm=VmShape(**{**plan.vm._asdict(), **changes}))


def shell(running: driverkit.Running, script: str) -> str:
    done = running.exec(["sh", "-c", script])
    assert done.code == 0, done
    return done.out.decode().strip()


def free_blocks(running: driverkit.Running) -> int:
    """Of 1024 bytes, on the root."""
    return int(shell(running, "df -k / | tail -1").split()[3])


def test_cpus_follow_the_quota(rig: driverkit.Rig) -> None:
    with rig.started_plan(shaped(rig, ["sleep", "1000"], vcpus=2)) as running:
        update: Any = running.created.update  # type: ignore[attr-defined]
        assert shell(running, "nproc") == "2"
        for quota, count in ((50_000, "1"), (150_000, "2"), (100_000, "1"), (-1, "2")):
            update({"cpu": {"quota": quota, "period": 100_000}}, Deadline.after(SOON))
            assert shell(running, "nproc") == count
        with pytest.raises(Unsupported, match=r"2 CPUs cannot use 2\.5"):
            update({"cpu": {"quota": 250_000, "period": 100_000}}, Deadline.after(SOON))


def test_the_disk_grows_while_it_runs_and_at_the_next_start(rig: driverkit.Rig) -> None:
    plan = shaped(rig, ["sleep", "1000"], disk_bytes=64 << 20)
    path = plan.rootfs.upper / disk.FILE
    with rig.started_plan(plan) as running:
        before = free_blocks(running)
        shell(running, "echo kept > /kept")
        grow: Any = running.created.grow  # type: ignore[attr-defined]
        grow(300 << 20, Deadline.after(SOON))
        assert free_blocks(running) - before > 200 << 10
        shell(running, "head -c 20000000 /dev/zero > /big && sync")
        with pytest.raises(InvalidRequest, match="cannot shrink from 300 MiB to 299 MiB"):
            grow(299 << 20, Deadline.after(SOON))
    assert path.stat().st_size == 300 << 20 and not disk.has_room(path)
    again = plan._replace(vm=plan.vm._replace(disk_bytes=500 << 20))
    with rig.started_plan(again) as running:
        assert shell(running, "cat /kept; wc -c < /big") == "kept\n20000000"
        assert free_blocks(running) > 350 << 10
    assert not disk.has_room(path)
    subprocess.run(["/sbin/e2fsck", "-fn", path], check=True, capture_output=True)


@pytest.fixture(scope="module")
def wedged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guest directory whose agent neither signals nor powers off: as one that hangs."""
    directory = tmp_path_factory.mktemp("wedged")
    sources = directory / "agent"
    shutil.copytree(build.SOURCES, sources)
    text = (sources / "main.c").read_text()
    for old, new in WEDGED:
        assert text.count(old) == 1
        text = text.replace(old, new)
    (sources / "main.c").write_text(text)
    original = next(path for path in guest_dir().iterdir() if (path / "kernel.json").exists())
    kernel = directory / "guest" / original.name
    shutil.copytree(original, kernel, ignore=lambda _, names: [name for name in names if name.startswith("initramfs")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "SOURCES", sources)
        build_initramfs(kernel)
    return kernel.parent


@pytest.mark.parametrize("way", ["kill", "delete"])
def test_a_guest_whose_agent_hangs_writes_its_disk_and_powers_off(
    rig: driverkit.Rig, way: str, wedged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = rig.plan(["sleep", "1000"])._replace(guest_dir=wedged)
    monkeypatch.setattr(guest_process, "KILL_GRACE_S", 0.1)
    with rig.started_plan(plan) as running:
        shell(running, "echo written > /file")
        created: Any = running.created
        child = created._parts.monitor.child
        if way == "kill":
            created.init.signal(9)
            running.init.until(lambda: created.init.exit is not None)
            assert created.init.exit.code == 137
        else:
            monkeypatch.setattr("hyper.vm.machine.POWER_OFF_S", 0.1)
            created.delete(Deadline.after(SOON))
        assert child.how() == "ended with status 0", "the guest powered off"
    whole = plan._replace(guest_dir=guest_dir())
    with rig.started_plan(whole) as running:
        assert shell(running, "cat /file") == "written"


def test_what_a_guest_that_booted_frees_goes_back_to_the_host(
    rig: driverkit.Rig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """QEMU gives it back where the guest is no copy of a template."""
    monkeypatch.setenv(template.CHOICE, "off")
    with rig.started(["sleep", "1000"]) as running:
        created: Any = running.created
        status = Path(f"/proc/{created._parts.monitor.child.pid}/status")

        def resident() -> int:
            """MiB."""
            return int(status.read_text().partition("RssAnon:")[2].split()[0]) >> 10

        idle = resident()
        shell(running, "dd if=/dev/zero of=/dev/null bs=128M count=1")
        used = resident()
        by = Deadline.after(SOON)
        while resident() > used - 64:
            by.check("free memory")
            time.sleep(0.2)
        with capsys.disabled():
            print(f"\nidle {idle} MiB, used {used} MiB, freed {resident()} MiB")
