"""The VM driver where it differs from a container's: its VMM, its console, its disks, its shares."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ambi.core.deadline import Deadline
from ambi.core.errors import AmbiError, DeadlineExceeded, NotFound, Unavailable
from ambi.core.loop import Loop
from ambi.core.model import VmShape
from ambi.core.plan import Directory, Layer, Layers
from ambi.core.undo import Undo
from hyper.qemu import argv
from hyper.vm import jail, template, words
from tests import driverkit

pytestmark = pytest.mark.needs("qemu")


@pytest.fixture(scope="module")
def rig(busybox_tar: Path) -> Iterator[driverkit.Rig]:
    with driverkit.vm_rig(busybox_tar) as it:
        yield it


@pytest.fixture(scope="module")
def idle(rig: driverkit.Rig) -> Iterator[driverkit.Running]:
    with rig.started(["sleep", "100000"]) as running:
        yield running


def vmm_of(running: driverkit.Running) -> int:
    pid: int = running.created._parts.monitor.child.pid  # type: ignore[attr-defined]
    return pid


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_vmm_has_no_rights(idle: driverkit.Running) -> None:
    pid = vmm_of(idle)
    fields = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    uid = str(jail.user_id(idle.created._plan.id))  # type: ignore[attr-defined]
    assert fields["Uid"].split() == [uid] * 4 and fields["Gid"].split() == [uid] * 4
    assert fields["Groups"].strip() == ""
    assert {fields[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Amb")} == {"0" * 16}
    assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2")
    for kind in ("net", "mnt", "ipc", "uts", "pid"):
        assert os.readlink(f"/proc/{pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")


def test_vmm_sees_no_file_and_no_process_of_the_host(idle: driverkit.Running) -> None:
    root = Path(f"/proc/{vmm_of(idle)}/root")
    assert set(os.listdir(root)) <= {"usr", "bin", "lib", "lib64", "etc", "dev", "proc"}
    assert set(os.listdir(root / "etc")) <= {"ld.so.cache"}
    assert [name for name in os.listdir(root / "proc") if name.isdigit()] == ["1"]
    assert all("ro" in line.split()[5].split(",") for line in (root / "proc/1/mountinfo").read_text().splitlines()
               if line.split()[4] in ("/", "/usr", "/dev"))  # fmt: skip


def test_vmm_holds_no_path_of_ours(idle: driverkit.Running) -> None:
    """What it has open is what it was given: layers for reading, the disk, sockets, memory files."""
    pid = vmm_of(idle)
    for fd in os.listdir(f"/proc/{pid}/fd"):
        target = os.readlink(f"/proc/{pid}/fd/{fd}")
        writable = int(Path(f"/proc/{pid}/fdinfo/{fd}").read_text().split("flags:")[1].split()[0], 8) & 3
        if target.startswith("/") and not target.startswith(("/dev/", "/memfd:")):
            assert not writable or target.endswith("/disk.img"), target


def test_vmm_that_is_killed_is_137_with_a_reason(rig: driverkit.Rig) -> None:
    with rig.started(["sh", "-c", "echo before; sleep 1000"]) as running:
        running.init.until(lambda: b"before" in running.init.out)
        other = running.start_exec(["sleep", "1000"])
        os.kill(vmm_of(running), signal.SIGKILL)
        done = running.init.finish()
        assert (done.code, done.out) == (137, b"before\n")
        assert done.exit.reason == "the VMM was killed by SIGKILL"
        assert other.finish().code == 137
        assert (running.created._plan.run_dir / "console").exists()  # type: ignore[attr-defined]


def test_guest_that_panics_says_so(rig: driverkit.Rig) -> None:
    plan = rig.plan(["sh", "-c", "echo c > /proc/sysrq-trigger"])
    plan.config["linux"]["readonlyPaths"] = []
    with rig.started_plan(plan) as running:
        done = running.init.finish()
    assert done.code == 137
    assert "Kernel panic" in done.exit.reason and "sysrq" in done.exit.reason


def test_boot_that_fails_tells_the_panic(rig: driverkit.Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "WORDS", (*words.WORDS, "rdinit=/nothing", "root=/dev/nothing"))
    before, loop, plan = descriptors(), Loop(), rig.plan(["true"])
    with pytest.raises(Unavailable, match="Kernel panic") as raised, Undo() as undo:
        rig.driver.create(plan, undo, Deadline.after(120), loop)
    assert raised.value.hint and str(plan.run_dir / "console") in raised.value.hint
    assert b"Kernel panic" in (plan.run_dir / "console").read_bytes()
    assert descriptors() == before


def test_qemu_that_refuses_tells_why(rig: driverkit.Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(argv, "SANDBOX", "perhaps")
    with pytest.raises(Unavailable, match="sandbox perhaps"), Undo() as undo:
        rig.driver.create(rig.plan(["true"]), undo, Deadline.after(60), Loop())


def test_boot_that_takes_too_long_leaves_nothing(rig: driverkit.Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(template.CHOICE, "off")  # a copy of a template may be there in that time
    before, plan = descriptors(), rig.plan(["true"])
    with pytest.raises(DeadlineExceeded), Undo() as undo:
        rig.driver.create(plan, undo, Deadline.after(0.3), Loop())
    assert descriptors() == before
    assert not list(Path("/sys/fs/cgroup").glob(f"*/{plan.config['linux']['cgroupsPath'].lstrip('/')}"))


def test_root_that_is_a_directory(rig: driverkit.Rig, busybox_tar: Path, short_tmp: Path) -> None:
    tree = driverkit.unpack(busybox_tar, short_tmp / "tree")
    script = "cat /etc/hosts; echo written > /root/file; ln -s there /root/link; chown 1000:50 /root/file"
    plan = rig.plan(["sh", "-c", script], files={"/etc/hosts": "1.2.3.4 there\n"})._replace(rootfs=Directory(tree))
    with rig.started_plan(plan) as running:
        done = running.init.finish()
    assert (done.code, done.out, done.err) == (0, b"1.2.3.4 there\n", b"")
    info = (tree / "root/file").stat()
    assert ((tree / "root/file").read_text(), info.st_uid, info.st_gid) == ("written\n", 1000, 50)
    assert os.readlink(tree / "root/link") == "there"
    assert not (tree / "etc/hosts").exists() or (tree / "etc/hosts").read_text() != "1.2.3.4 there\n"


def test_read_only_bind_holds_against_the_guest(rig: driverkit.Rig, short_tmp: Path) -> None:
    """A guest that ignores the option meets the host's own read-only mount."""
    (short_tmp / "file").write_text("original\n")
    bind = {"destination": "/ro", "type": "bind", "source": str(short_tmp), "options": ["rbind", "ro", "rprivate"]}
    plan = rig.plan(["sh", "-c", "mount -o remount,rw,bind /ro; echo changed > /ro/file; cat /ro/file"], mounts=(bind,))
    plan.config["process"]["capabilities"] = {
        kind: ["CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE"] for kind in ("bounding", "effective", "permitted")
    }
    plan.config["linux"].pop("seccomp", None)
    with rig.started_plan(plan) as running:
        done = running.init.finish()
    assert done.out == b"original\n" and b"Read-only file system" in done.err
    assert (short_tmp / "file").read_text() == "original\n"


def test_bind_whose_source_is_gone(rig: driverkit.Rig, short_tmp: Path) -> None:
    bind = {"destination": "/x", "type": "bind", "source": str(short_tmp / "gone"), "options": ["rbind"]}
    with pytest.raises(NotFound, match="gone"), Undo() as undo:
        rig.driver.create(rig.plan(["true"], mounts=(bind,)), undo, Deadline.after(60), Loop())


def test_127_layers(rig: driverkit.Rig, short_tmp: Path) -> None:
    layers = list(rig.lowers)
    for number in range(1, 127):
        tree = short_tmp / f"t{number}"
        (tree / "layers").mkdir(parents=True)
        (tree / "layers" / str(number)).write_text(f"{number}\n")
        (tree / "top").write_text(f"{number}\n")
        target = short_tmp / f"l{number}.erofs"
        subprocess.run(["mkfs.erofs", "--quiet", target, tree], check=True, stdout=subprocess.DEVNULL)
        layers.append(Layer(f"l{number}", "erofs", target, target.stat().st_size))
    plan = rig.plan(["sh", "-c", "ls /layers | wc -l; cat /top"])
    with rig.started_plan(plan._replace(rootfs=Layers(tuple(layers), plan.rootfs.upper))) as running:  # type: ignore[union-attr]
        assert running.init.finish().out.split() == [b"126", b"126"]


def test_shape_is_what_the_guest_sees(rig: driverkit.Rig) -> None:
    shape = VmShape(vcpus=2, memory_bytes=384 << 20, disk_bytes=3 << 30)
    plan = rig.plan(["sh", "-c", "grep -c ^processor /proc/cpuinfo; grep MemTotal /proc/meminfo; df -m / | tail -1"])
    with rig.started_plan(plan._replace(vm=shape)) as running:
        out = running.init.finish().out.decode().split()
    assert out[0] == "2" and 300 << 10 < int(out[2]) < 384 << 10
    assert 2800 < int(out[5]) < 3100


def test_clock_is_right_at_once(rig: driverkit.Rig) -> None:
    before = rig.run(["date", "+%s"])
    now = subprocess.run(["date", "+%s"], capture_output=True, check=True).stdout
    assert abs(int(before.out) - int(now)) < 60


def test_no_kernel_is_a_problem_with_a_command(rig: driverkit.Rig, short_tmp: Path) -> None:
    problems = rig.driver.check(rig.plan(["true"])._replace(guest_dir=short_tmp))
    assert len(problems) == 1 and "kernel" in problems[0].message and "hyper.guest" in (problems[0].hint or "")
    with pytest.raises(AmbiError, match="kernel"), Undo() as undo:
        rig.driver.create(rig.plan(["true"])._replace(guest_dir=short_tmp), undo, Deadline.after(60), Loop())
