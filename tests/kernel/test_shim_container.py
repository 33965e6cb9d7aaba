"""The real zygote with the real container driver, end to end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ambi.core.model import InstanceId, Isolation
from ambi.core.plan import Directory, LaunchPlan, Supervision
from ambi.linux import unix
from ambi.shim import client, drivers, leave, logread
from ambi.shim.launch import ensure
from tests.shimkit import ROOT, Run, ShimLab, read_all, state, wait_gone

NAMESPACES = ("pid", "mount", "uts", "ipc", "network", "cgroup")


class ContainerLab(ShimLab):
    """Real containers over a busybox directory."""

    def __init__(self, base: Path, tar: Path) -> None:
        self.base, self.run_root, self.runs = base, base / "run", []
        self.run_root.mkdir()
        self.root = base / "root"
        self.root.mkdir()
        subprocess.run(["tar", "-xf", tar, "-C", self.root], check=True)

    def plan(self, *args: str, stdin: bool = False, terminal: bool = False, **more: Any) -> LaunchPlan:
        name = InstanceId(os.urandom(32).hex())
        data = self.base / "data" / name
        process = {"args": list(args), "env": ["PATH=/bin"], "cwd": "/", "user": {"uid": 0, "gid": 0}, "terminal": terminal}
        config = {
            "ociVersion": "1.0.2",
            "process": process,
            "root": {"path": "rootfs"},
            "hostname": "inside",
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
                {
                    "destination": "/dev/pts",
                    "type": "devpts",
                    "source": "devpts",
                    "options": ["newinstance", "ptmxmode=0666"],
                },
            ],
            "linux": {"cgroupsPath": f"/ambi/{name}", "namespaces": [{"type": kind} for kind in NAMESPACES], **more},
        }
        return LaunchPlan(
            id=name,
            isolation=Isolation.CONTAINER,
            config=config,
            rootfs=Directory(self.root),
            data_dir=data,
            run_dir=self.run_root / "instances" / name,
            layers_dir=self.run_root / "layers",
            guest_dir=self.base / "guest",
            stdin=stdin,
            supervision=Supervision(log=data / "log", open_stdin=stdin, stdin_once=True),
        )

    def close(self) -> None:
        for run in self.runs:
            run.call("delete")
        super().close()


@pytest.fixture
def lab(short_tmp: Path, busybox_tar: Path) -> Iterator[ContainerLab]:
    lab = ContainerLab(short_tmp, busybox_tar)
    yield lab
    lab.close()


def cgroups_of(run: Run) -> list[str]:
    return [path for path, _, _ in os.walk("/sys/fs/cgroup") if run.plan.id in path]


def test_run_and_exec(lab: ContainerLab) -> None:
    run = lab.launch("sh", "-c", "hostname; cat; exit 3", stdin=True)
    sock = run.attach(stdin=True)
    run.call("start")
    assert cgroups_of(run)
    assert read_all(run.exec("e", "sh", "-c", "hostname; cat /proc/1/comm")) == b"inside\nsh\n"
    sock.sendall(b"typed\n")
    sock.shutdown(1)
    assert read_all(sock) == b"inside\ntyped\n"
    assert run.exit_code() == 3
    run.wait_closed()
    assert not cgroups_of(run)
    assert [entry.line for entry in logread.entries(run.plan.data_dir / "log")] == [b"inside\n", b"typed\n"]
    assert lab.log() == ""


def test_a_killed_shim_takes_its_container_along_and_sweep_removes_the_rest(lab: ContainerLab) -> None:
    run = lab.start("sh", "-c", "sleep 60 & sleep 60")
    init = run.call("state")["pid"]
    os.kill(run.connection.pid, signal.SIGKILL)
    run.wait_closed()
    wait_gone(init)
    drivers.load("container").sweep(run.plan)
    assert not cgroups_of(run)
    assert leave.read_exit(run.plan.data_dir) is None


def test_a_killed_zygote_costs_nothing(lab: ContainerLab) -> None:
    run = lab.start("sleep", "60")
    namespace = os.readlink(f"/proc/{run.connection.pid}/ns/mnt")
    old = lab.zygote_pid()
    os.kill(old, signal.SIGKILL)
    wait_gone(old)
    assert read_all(run.exec("e", "echo", "alive")) == b"alive\n"
    other = lab.start("true")
    assert other.exit_code() == 0
    assert os.readlink(f"/proc/{lab.zygote_pid()}/ns/mnt") == namespace
    run.call("delete")
    assert not cgroups_of(run)


def test_a_shim_imports_nothing(lab: ContainerLab, tmp_path: Path) -> None:
    """The zygote's finders are taken away when its drivers are loaded: an import in a shim fails."""
    script = (
        "import sys\n"
        "from ambi.shim import drivers, zygote\n"
        "load = drivers.preload\n"
        "def load_and_close():\n"
        "    failures = load()\n"
        "    sys.meta_path.clear()\n"
        "    return failures\n"
        "drivers.preload = load_and_close\n"
        "sys.exit(zygote.main(sys.argv))\n"
    )
    with unix.listen(lab.run_root / "zygote.sock") as listener, open(lab.run_root / "zygote.log", "ab") as log:
        argv = [sys.executable, "-c", script, str(lab.run_root), str(listener.fileno())]
        subprocess.run(argv, pass_fds=(listener.fileno(),), stderr=log, cwd=ROOT, check=True)
    run = lab.launch("sh", "-c", "read x; exit 2", stdin=True, terminal=True)
    sock = run.attach(stdin=True, logs=True)
    run.call("resize", rows=10, columns=20)
    run.call("start")
    assert read_all(run.exec("e", "echo", "hi")) == b"hi\n"
    assert run.call("usage")["pids"] >= 1
    assert run.call("processes")["processes"]
    sock.sendall(b"\n")
    assert run.exit_code() == 2
    run.wait_closed()
    assert lab.log() == ""


def test_running_out_of_memory_is_told_once(lab: ContainerLab) -> None:
    run = lab.start("sleep", "60", resources={"memory": {"limit": 24 << 20, "swap": 24 << 20}})
    for name in ("one", "two"):
        read_all(run.exec(name, "sh", "-c", "tail /dev/zero"))
    for name in ("one", "two"):
        run.wait(lambda name=name: any(e.get("exec_id") == name for e in run.events))
    assert [e["event"] for e in run.events] == ["oom", "exec_exit", "exec_exit"]
    assert run.call("state")["execs"]["one"]["exit"]["code"] == 137


def parked_groups() -> set[int]:
    return {
        int(name.removeprefix("park-"))
        for path, folders, _ in os.walk("/sys/fs/cgroup")
        if path.endswith("/ambi")
        for name in folders
        if name.startswith("park-")
    }


@pytest.mark.needs("cgroup-v1")
def test_the_parked_shim_is_the_next_one(lab: ContainerLab) -> None:
    ensure(lab.run_root)
    zygote = lab.zygote_pid()

    def parked() -> list[int]:
        children = Path(f"/proc/{zygote}/task/{zygote}/children").read_text().split()
        return [pid for pid in parked_groups() if str(pid) in children]

    first = wait_for(parked)[0]
    run = lab.start("sh", "-c", "exit 5")
    assert run.connection.pid == first
    assert run.exit_code() == 5
    run.wait_closed()
    assert not cgroups_of(run)
    second = wait_for(parked)[0]
    os.kill(second, signal.SIGKILL)
    wait_gone(second)
    assert lab.start("true").exit_code() == 0, "one that has died is not missed"
    third = wait_for(parked)[0]
    os.kill(third, signal.SIGKILL)
    wait_gone(third)
    killed = third
    third = wait_for(lambda: [pid for pid in parked() if pid != killed])[0]
    assert second not in parked_groups(), "its successor removes what a killed one left"
    client.ZygoteClient(lab.run_root).stop()
    wait_gone(third)
    assert state(zygote) in ("gone", "Z") or wait_gone(zygote) is None
    assert not {first, third} & parked_groups(), lab.log()


def wait_for(find: Any) -> Any:
    end = time.monotonic() + 30
    while not (found := find()):
        assert time.monotonic() < end, "did not come"
        time.sleep(0.05)
    return found
