"""What the VM driver makes of values: command lines, protocol fields, limits, disks, the console's tail, QMP."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from ambi.core.deadline import Deadline
from ambi.core.errors import DeadlineExceeded, Internal, InvalidRequest, NotFound, Unavailable
from ambi.core.loop import Loop
from ambi.core.model import InstanceId, Isolation, VmShape
from ambi.core.plan import Directory, File, LaunchPlan, Layer, Layers
from hyper import boot_files, probe, translate, validate
from hyper.guest.protocol import Fields, ProcessTag, SetupTag, encode
from hyper.qemu import argv
from hyper.qemu.qmp import Qmp
from hyper.vm import cgroup, disk, jail, words
from hyper.vm.console import KEEP_BYTES, Console
from hyper.vm.hardware import Hardware, Share
from hyper.vm.layers import LayerDisk
from hyper.vm.share import Bind

MACHINE = Hardware(
    name="0123456789abcdef", kvm=False, vcpus=1, memory_bytes=256 << 20, tsc_khz=2_600_000,
    kernel=10, initramfs=11, agent=12, console=13, control=14,
)  # fmt: skip


def plan(tmp_path: Path, **changes: Any) -> LaunchPlan:
    """A plan that a VM takes; `changes` replace members of config."""
    layer = tmp_path / "layer.erofs"
    layer.write_bytes(bytes(4096))
    config = {
        "process": {"args": ["true"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
        "linux": {
            "cgroupsPath": "/ambi/x",
            "namespaces": [{"type": t} for t in ("mount", "pid", "network", "ipc", "uts", "cgroup")],
        },
        **changes,
    }
    return LaunchPlan(
        id=InstanceId("ab" * 32), isolation=Isolation.VM, config=config,
        rootfs=Layers((Layer("l", "erofs", layer, 4096),), tmp_path), data_dir=tmp_path, run_dir=tmp_path,
        layers_dir=tmp_path, guest_dir=tmp_path, vm=VmShape(),
    )  # fmt: skip


def fields(items: Any) -> Fields:
    return Fields(encode(1, 1, items)[16:])


# The command line


def test_words_fit_the_accelerator() -> None:
    emulated, real = words.command_line(MACHINE), words.command_line(MACHINE._replace(kvm=True, vcpus=2))
    assert "tsc_early_khz=2600000" in emulated.split()
    assert "mitigations=off" in emulated and "noreplace-smp" in emulated
    assert "mitigations=off" not in real and "noreplace-smp" not in real


def test_nothing_is_opened_by_a_path_of_ours() -> None:
    machine = MACHINE._replace(layers=LayerDisk((), (21, 22)), disk=23, shares=(Share("binds", 24),))
    line = " ".join(argv.build("/usr/bin/qemu-system-x86_64", machine, 20)[1:])
    assert all(f"fd={fd}," in line or f"/fd/{fd} " in line or f"fd={fd} " in line for fd in machine.fds)
    assert "memory-backend-memfd" in line and "share=on" in line
    assert "-sandbox on," in line and "-nodefaults" in line


def test_without_shares_memory_is_plain() -> None:
    assert "memory-backend" not in " ".join(argv.build("qemu", MACHINE))


def test_every_vmm_has_its_own_user() -> None:
    users = {jail.user_id(f"{number:05x}" + "0" * 59) for number in range(0, 1 << 20, 4099)}
    assert len(users) == len(range(0, 1 << 20, 4099))
    assert min(users) >= jail.FIRST_UID > 65535


# The plan in the guest's words


def test_setup_has_what_the_plan_says(tmp_path: Path) -> None:
    given = plan(
        tmp_path,
        hostname="web", root={"readonly": True}, annotations={"ambi.init": "1"},
        mounts=[{"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"]},
                {"destination": "/data", "type": "bind", "source": "/srv", "options": ["rbind", "ro"]}],
    )  # fmt: skip
    given.config["linux"] |= {"maskedPaths": ["/proc/keys"], "sysctl": {"net.core.somaxconn": "7"},
                              "resources": {"memory": {"limit": 1 << 26}, "pids": {"limit": -1}}}  # fmt: skip
    found = fields(translate.setup(given._replace(files=(File(PurePosixPath("/etc/hosts"), 0o644, "x"),))))
    assert found.text(SetupTag.HOSTNAME) == "web"
    assert [found.number(t) for t in (SetupTag.READ_ONLY, SetupTag.LAYERS, SetupTag.DISK, SetupTag.INIT)] == [1, 1, 1, 1]
    assert found.number(SetupTag.MEMORY) == 1 << 26 and not found.datas(SetupTag.PIDS)
    assert found.texts(SetupTag.MASKED) == ["/proc/keys"]
    mounts = [Fields(data) for data in found.datas(SetupTag.MOUNT)]
    assert [(m.text(1), m.text(2), m.text(3), m.texts(4)) for m in mounts] == [
        ("/proc", "proc", "proc", ["nosuid"]), ("/data", "bind", "1", ["rbind", "ro"]),
    ]  # fmt: skip
    assert translate.binds(given) == (Bind("1", Path("/srv"), readonly=True, recursive=True),)


def test_directory_root_has_no_disks(tmp_path: Path) -> None:
    found = fields(translate.setup(plan(tmp_path)._replace(rootfs=Directory(tmp_path))))
    assert found.text(SetupTag.ROOT_TAG) == "root" and not found.datas(SetupTag.DISK)


def test_process_fields(tmp_path: Path) -> None:
    body = {
        "args": ["sh", "-c", ""], "env": ["A=1", "B=\udcff"],
        "user": {"username": "alice", "additionalGids": [7, 8], "additionalGroups": ["x", "y"]},
        "terminal": True, "consoleSize": {"height": 3, "width": 4}, "capabilities": {"bounding": ["CAP_KILL"]},
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1, "hard": 2}], "noNewPrivileges": True, "oomScoreAdj": -5,
    }  # fmt: skip
    config = plan(tmp_path).config
    config["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW"}
    found = fields(translate.process(body, config, stdin=False))
    assert found.datas(ProcessTag.ARG) == [b"sh", b"-c", b""] and found.datas(ProcessTag.ENV)[1] == b"B=\xff"
    assert found.texts(ProcessTag.GROUP_NAME) == ["x", "y"]
    assert found.text(ProcessTag.USER) == "alice" and not found.datas(ProcessTag.UID)
    assert [found.number(t) for t in (ProcessTag.ROWS, ProcessTag.COLUMNS, ProcessTag.STDIN)] == [3, 4, 1]
    assert found.number(ProcessTag.BOUNDING) == 1 << 5 and found.number(ProcessTag.EFFECTIVE) == 0
    assert found.number(ProcessTag.OOM_SCORE_ADJ, signed=True) == -5
    assert len(found.data(ProcessTag.SECCOMP)) % 8 == 0 and found.data(ProcessTag.SECCOMP)


@pytest.mark.parametrize(
    "change,word",
    [
        ({"args": []}, "args"),
        ({"rlimits": [{"type": "RLIMIT_FOO", "soft": 1, "hard": 1}]}, "RLIMIT_FOO"),
        ({"capabilities": {"bounding": ["CAP_FLY"]}}, "CAP_FLY"),
    ],
    ids=["args", "rlimit", "capability"],
)
def test_process_that_is_wrong(tmp_path: Path, change: dict[str, Any], word: str) -> None:
    given = plan(tmp_path)
    body = {**given.config["process"], **change}
    with pytest.raises(InvalidRequest, match=word):
        translate.process(body, given.config, stdin=False)


# What a VM refuses


def test_a_plain_plan_has_no_problem(tmp_path: Path) -> None:
    assert validate.problems(plan(tmp_path)) == []


@pytest.mark.parametrize(
    "path,value,word",
    [
        (("linux", "namespaces"), [{"type": t} for t in ("mount", "pid", "ipc", "uts")], "network"),
        (("linux", "devices"), [{"path": "/dev/fuse"}], "devices"),
        (("linux", "resources"), {"memory": {"reservation": 5}}, "reservation"),
        (("linux", "resources"), {"cpu": {"cpus": "0"}}, "cpus"),
        (("linux", "resources"), {"blockIO": {"weight": 10}}, "blockIO"),
        (("process", "apparmorProfile"), "x", "apparmorProfile"),
        (("hooks",), {"prestart": [{"path": "/x"}]}, "prestart"),
        (("mounts",), [{"destination": "/n", "type": "nfs"}], "nfs"),
        (("mounts",), [{"destination": "/b", "type": "bind", "source": "/", "options": ["rshared"]}], "/b"),
        (("mounts",), [{"type": "tmpfs"}], "malformed"),
    ],
)
def test_what_a_vm_cannot_do_is_named(tmp_path: Path, path: tuple[str, ...], value: Any, word: str) -> None:
    given = plan(tmp_path)
    place = given.config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    problems = validate.problems(given)
    assert problems and word in problems[0].message


@pytest.mark.parametrize("shape,word", [(VmShape(memory_bytes=32 << 20), "memory"), (VmShape(vcpus=0), "CPUs")])
def test_shapes_that_no_vm_has(tmp_path: Path, shape: VmShape, word: str) -> None:
    assert word in validate.problems(plan(tmp_path)._replace(vm=shape))[0].message


# Kernels


def test_newest_kernel_counts(tmp_path: Path) -> None:
    for release in ("6.1.0-9-cloud-amd64", "6.1.0-40-cloud-amd64", "6.12.1-1-cloud-amd64", "disks"):
        (tmp_path / release).mkdir()
        (tmp_path / release / "vmlinuz").touch()
        (tmp_path / release / "initramfs-1.cpio").touch()
    (tmp_path / "6.13.0-broken").mkdir()
    assert boot_files.find(tmp_path).release == "6.12.1-1-cloud-amd64"
    assert boot_files.find(tmp_path, "6.1.0-9-cloud-amd64").kernel.name == "vmlinuz"
    with pytest.raises(NotFound, match=r"7\.0"):
        boot_files.find(tmp_path, "7.0")


# The disk


def test_clone_is_equal_and_sparse(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    with open(source, "wb") as file:
        for at in (0, 5 << 20, 63 << 20):
            file.seek(at)
            file.write(os.urandom(70_000))
        file.truncate(64 << 20)
    disk.clone(source, target)
    assert source.read_bytes() == target.read_bytes()
    assert target.stat().st_blocks * 512 < 4 << 20
    assert target.stat().st_mode & 0o777 == 0o600


def test_disk_is_a_clean_file_system_that_stays(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    disk.ensure(path, 300_000_001, tmp_path / "templates")
    assert path.stat().st_size == 287 << 20  # rounded up to MiB
    subprocess.run(["/sbin/e2fsck", "-fn", path], check=True, capture_output=True)
    with open(path, "r+b") as file:
        file.write(b"mine")
    disk.ensure(path, 300_000_001, tmp_path / "templates")
    disk.ensure(path, 1, tmp_path / "templates")
    assert path.read_bytes()[:4] == b"mine" and path.stat().st_size == 287 << 20
    assert len(list((tmp_path / "templates").iterdir())) == 1


def test_a_disk_grows_and_never_shrinks(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    disk.ensure(path, 100 << 20, tmp_path / "templates")
    assert not disk.has_room(path)
    assert disk.grow(path, 200_000_000) == 191 << 20 and disk.has_room(path)
    disk.ensure(path, 300 << 20, tmp_path / "templates")
    assert path.stat().st_size == 300 << 20
    with pytest.raises(InvalidRequest, match="from 300 MiB to 299 MiB"):
        disk.grow(path, 299 << 20)
    subprocess.run(["/sbin/resize2fs", path], check=True, capture_output=True)
    assert not disk.has_room(path)
    for forged in (b"", bytes(2048), b"\xff" * 4096):
        path.write_bytes(forged)
        assert disk.has_room(path) is (forged == bytes(2048))


# Limits


def test_limits_in_both_versions() -> None:
    limits = cgroup.Limits(memory_bytes=10, cpu_quota_us=5, cpu_period_us=9, pids=3)
    assert cgroup._files(frozenset(), limits) == [("memory.max", "10"), ("cpu.max", "5 9"), ("pids.max", "3")]
    assert cgroup._files(frozenset({"memory"}), limits) == [("memory.limit_in_bytes", "10")]
    assert cgroup._files(frozenset({"cpu"}), limits) == [("cpu.cfs_period_us", "9"), ("cpu.cfs_quota_us", "5")]
    assert cgroup._files(frozenset(), cgroup.Limits()) == []


# The console


def console(loop: Loop) -> tuple[Console, int, int]:
    (serial, guest), (output, vmm) = os.pipe(), os.pipe()
    return Console(loop, serial, output), guest, vmm


def test_cause_is_the_panic_then_the_vmm_then_nothing() -> None:
    loop = Loop()
    tail, guest, vmm = console(loop)
    os.write(guest, b"booting\r\n")
    tail.drain()
    assert (tail.cause(), tail.last_line()) == ("", "booting")
    os.write(vmm, b"qemu: cannot\nqemu: warning: old CPU\n")
    tail.drain()
    assert tail.cause() == "qemu: cannot"
    os.write(guest, b"[1.0] Kernel panic - not \x1b[31msyncing\nmore\n")
    tail.drain()
    assert tail.cause() == "[1.0] Kernel panic - not .[31msyncing"
    tail.close()
    os.close(guest), os.close(vmm)


def test_flood_is_bounded_and_slowed() -> None:
    loop = Loop()
    tail, guest, vmm = console(loop)
    os.set_blocking(guest, False)
    written = 0
    for _ in range(50):
        try:
            written += os.write(guest, b"x" * 65536)
        except BlockingIOError:
            pass
        loop.step(Deadline.after(0))
    assert written < 50 * 65536  # the rest was never read: the guest waits
    for _ in range(8):
        tail.note(b"y" * 65536)
    assert len(tail._tails[True]) == KEEP_BYTES
    tail.close()
    os.close(guest), os.close(vmm)


# QMP


def qmp() -> tuple[Qmp, socket.socket]:
    ours, theirs = socket.socketpair()
    client = Qmp(ours)
    assert json.loads(theirs.recv(100)) == {"execute": "qmp_capabilities"}
    return client, theirs


def test_qmp_answers_events_and_refusals() -> None:
    client, qemu = qmp()
    qemu.sendall(b'{"QMP": {}}\r\n{"return": {}}\r\n{"event": "RESUME"}\r\n{"return": {"running": true}}\r\n')
    assert client.execute("query-status", Deadline.after(5)) == {"running": True}
    assert [event["event"] for event in client.events] == ["RESUME"]
    qemu.sendall(b'{"error": {"class": "GenericError", "desc": "no"}}\n')
    with pytest.raises(Internal, match="refused stop: no"):
        client.execute("stop", Deadline.after(5))
    with pytest.raises(DeadlineExceeded):
        client.execute("stop", Deadline.after(0.05))
    qemu.sendall(b'{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-panic"}}\n')
    qemu.close()
    assert client.why_shut_down() == "guest-panic"
    client.close()


def test_qmp_waits_for_an_event_and_hands_descriptors_over() -> None:
    client, qemu = qmp()
    qemu.sendall(b'{"QMP": {}}\n{"return": {}}\n{"event": "RESUME"}\n{"return": {}}\n')
    reader, writer = os.pipe()
    client.send_fd("state", writer, Deadline.after(5))
    data, fds, _, _ = socket.recv_fds(qemu, 200, 2)
    assert json.loads(data) == {"execute": "getfd", "arguments": {"fdname": "state"}} and len(fds) == 1
    os.write(fds[0], b"here")
    assert os.read(reader, 9) == b"here"
    client.wait_for("RESUME", Deadline.after(5))  # it has come already
    qemu.sendall(b'{"event": "STOP"}\n{"event": "MIGRATION"}\n')
    client.wait_for("MIGRATION", Deadline.after(5))
    with pytest.raises(DeadlineExceeded):
        client.wait_for("SHUTDOWN", Deadline.after(0.05))
    qemu.close()
    with pytest.raises(Unavailable):
        client.wait_for("SHUTDOWN", Deadline.after(5))
    client.close()
    for fd in (reader, writer, fds[0]):
        os.close(fd)


@pytest.mark.parametrize(
    "noise", [b"hello\n", b"[1]\n", b"{}\n", b"x" * (2 << 20), b""], ids=["text", "list", "object", "long", "end"]
)
def test_qmp_of_something_else_is_unavailable(noise: bytes) -> None:
    client, qemu = qmp()
    qemu.setblocking(False)
    rest = memoryview(noise)
    if rest:
        rest = rest[qemu.send(rest) :]
    if not noise:
        qemu.close()
    with pytest.raises((Unavailable, DeadlineExceeded)):
        client.execute("query-status", Deadline.after(0.2))
    client.close()
    qemu.close()


# The host


def test_probe_is_kept_for_this_boot_and_device(tmp_path: Path) -> None:
    first = probe.host(tmp_path)
    kept = json.loads((tmp_path / probe.CACHE).read_text())
    assert first.tsc_khz > 100_000 and kept["tsc_khz"] == first.tsc_khz
    (tmp_path / probe.CACHE).write_text(json.dumps({**kept, "tsc_khz": 7}))
    assert probe.host(tmp_path).tsc_khz == 7
    (tmp_path / probe.CACHE).write_text(json.dumps({**kept, "tsc_khz": 7, "boot_id": "another"}))
    assert probe.host(tmp_path).tsc_khz > 100_000
    (tmp_path / probe.CACHE).write_text("{")
    assert probe.host(tmp_path).tsc_khz > 100_000


def test_disposable_unless_a_tree_is_shared(tmp_path: Path) -> None:
    found = plan(tmp_path)
    found.config["mounts"] = []
    assert not translate.disposable(found)
    found.config["annotations"] = {"ambi.disposable": "1"}
    assert translate.disposable(found)
    assert not translate.disposable(found._replace(rootfs=Directory(tmp_path)))
    found.config["mounts"] = [{"destination": "/x", "type": "bind", "source": "/", "options": []}]
    assert not translate.disposable(found)


def test_tracefs_is_made_for_who_can_mount_it(tmp_path: Path) -> None:
    found = plan(tmp_path)
    found.config["process"]["capabilities"] = {"bounding": ["CAP_CHOWN"], "permitted": None}
    assert not translate.may_mount(found)
    found.config["process"]["capabilities"] = {"bounding": ["CAP_CHOWN", "CAP_SYS_ADMIN"]}
    assert translate.may_mount(found)
    emulated = MACHINE._replace(kvm=False)
    assert "tracefs" not in words.command_line(emulated)
    assert "tracefs" in words.command_line(emulated._replace(tracing=False))
    assert "tracefs" not in words.command_line(emulated._replace(tracing=False, kvm=True))
