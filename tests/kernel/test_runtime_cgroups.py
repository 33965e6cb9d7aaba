"""Control groups as the kernel has them: limits, leftovers, parked starters, device programs."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

from ambi.core.deadline import Deadline
from ambi.core.errors import InvalidRequest, Unsupported
from ambi.core.loop import Loop
from ambi.linux import device_filter
from runtime import cgroups
from runtime.devices import Rule
from runtime.driver import ContainerDriver
from runtime.park import Starter
from tests.driverkit import Rig, Running, Watched
from tests.kernel.runtimekit import rig, tree

__all__ = ["rig", "tree"]


def _directories(path: str) -> list[Path]:
    found = [Path(f"{h.mount}{path}") for h in cgroups.hierarchies().v1]
    return found if found else [Path(f"{cgroups.hierarchies().v2}{path}")]


LIMITS = {
    "memory": {"limit": 64 << 20, "swap": 64 << 20, "reservation": 32 << 20},
    "cpu": {"shares": 512, "quota": 50_000, "period": 100_000},
    "pids": {"limit": 50},
}


# file -> what it holds with LIMITS
WRITTEN = {
    "v1": {
        "memory.limit_in_bytes": str(64 << 20),
        "memory.soft_limit_in_bytes": str(32 << 20),
        "cpu.shares": "512",
        "cpu.cfs_quota_us": "50000",
        "pids.max": "50",
    },
    "v2": {
        "memory.max": str(64 << 20),
        "memory.swap.max": "0",
        "memory.low": str(32 << 20),
        "cpu.max": "50000 100000",
        "cpu.weight": "59",
        "pids.max": "50",
    },
}


def test_limits(rig: Rig) -> None:
    """On this machine's version; the other one is tested where it is mounted."""
    found = cgroups.hierarchies()
    plan = rig.plan(["sleep", "1000"], resources=LIMITS)
    path = plan.config["linux"]["cgroupsPath"]
    with rig.started_plan(plan) as running:
        for name, value in WRITTEN["v1" if found.v1 else "v2"].items():
            place = found.of(name.partition(".")[0]) or found.v2
            assert Path(f"{place}{path}/{name}").read_text().strip() == value, name
        for directory in _directories(path):
            assert (directory / "cgroup.procs").read_text().split() == [str(running.created.init.pid)], directory
        assert running.created.usage().memory_limit_bytes == 64 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[str]:
    """A block device of the test's own."""
    image = tmp_path / "disk"
    image.write_bytes(bytes(1 << 20))
    name = subprocess.run(["losetup", "--find", "--show", image], check=True, capture_output=True, text=True).stdout.strip()
    yield name
    subprocess.run(["losetup", "--detach", name], check=True)


def test_limits_of_a_disk(rig: Rig, disk: str) -> None:
    """Bytes and operations a second; one member of the pair that shares a file in version 2 does not undo the other."""
    number = os.stat(disk).st_rdev
    device = {"major": os.major(number), "minor": os.minor(number)}
    rates = {"throttleReadBpsDevice": 1 << 20, "throttleWriteBpsDevice": 2 << 20, "throttleReadIOPSDevice": 300,
             "throttleWriteIOPSDevice": 400}  # fmt: skip
    block = {member: [{**device, "rate": rate}] for member, rate in rates.items()}
    found, name = cgroups.hierarchies(), f"{device['major']}:{device['minor']}"
    plan = rig.plan(["sleep", "1000"], resources={"blockIO": block})
    with rig.started_plan(plan):
        directory = Path(f"{found.of('blkio') or found.v2}{plan.config['linux']['cgroupsPath']}")
        if found.v1:
            for file, rate in zip(("read_bps", "write_bps", "read_iops", "write_iops"), rates.values(), strict=True):
                assert (directory / f"blkio.throttle.{file}_device").read_text().strip() == f"{name} {rate}"
        else:
            assert (directory / "io.max").read_text().strip() == f"{name} rbps=1048576 wbps=2097152 riops=300 wiops=400"


def test_a_limit_of_what_is_no_disk(rig: Rig) -> None:
    plan = rig.plan(["true"], resources={"blockIO": {"throttleReadBpsDevice": [{"major": 240, "minor": 1, "rate": 1}]}})
    with pytest.raises(InvalidRequest, match=r"cannot limit block I/O.*240:1"), rig.started_plan(plan):
        pass
    assert not [d for d in _directories(plan.config["linux"]["cgroupsPath"]) if d.exists()]


def test_a_weight_of_block_io(rig: Rig) -> None:
    """Where this kernel has one, by whichever scheduler; else it is refused by its name."""
    plan = rig.plan(["sleep", "1000"], resources={"blockIO": {"weight": 300}})
    probe = rig.plan(["sleep", "1000"])
    with rig.started_plan(probe):
        groups = _directories(probe.config["linux"]["cgroupsPath"])
        names = {"blkio.weight": "300", "blkio.bfq.weight": "300", "io.bfq.weight": "300", "io.weight": "2930"}
        there = {name: value for name, value in names.items() if any((group / name).exists() for group in groups)}
    if not there:
        with pytest.raises(Unsupported, match="block I/O weight"), rig.started_plan(plan):
            pass
        return
    with rig.started_plan(plan):
        for group in _directories(plan.config["linux"]["cgroupsPath"]):
            for name, value in there.items():
                if (group / name).exists():
                    assert (group / name).read_text().split()[:2][-1] == value


def test_exec_joins(rig: Rig) -> None:
    plan = rig.plan(["sleep", "1000"])
    with rig.started_plan(plan) as running:
        watched = running.start_exec(["sleep", "1000"])
        for directory in _directories(plan.config["linux"]["cgroupsPath"]):
            assert str(watched.process.pid) in (directory / "cgroup.procs").read_text().split()
        watched.process.signal(9)
        watched.finish()


def test_nothing_is_left(rig: Rig) -> None:
    plan = rig.plan(["true"])
    with rig.started_plan(plan) as running:
        running.init.finish()
    assert not [d for d in _directories(plan.config["linux"]["cgroupsPath"]) if d.exists()]


def test_groups_below_are_removed(rig: Rig) -> None:
    plan = rig.plan(["sleep", "1000"])
    with rig.started_plan(plan):
        for directory in _directories(plan.config["linux"]["cgroupsPath"]):
            (directory / "a" / "b").mkdir(parents=True)
    assert not [d for d in _directories(plan.config["linux"]["cgroupsPath"]) if d.exists()]


def test_path_must_be_plain(rig: Rig) -> None:
    plan = rig.plan(["true"], linux={"cgroupsPath": "/ambi/../../x"})
    with pytest.raises(InvalidRequest, match="cgroupsPath"), rig.started_plan(plan):
        pass


def test_sweep_kills_what_forks_on(rig: Rig) -> None:
    """A shim died and left processes outside of any pid namespace of ours: by cgroup they are found."""
    namespaces = [{"type": kind} for kind in ("mount", "ipc", "uts", "cgroup")]
    plan = rig.plan(["sh", "-c", "(while :; do sleep 0.01; done) & (while :; do sleep 0.01; done) & echo up; wait"],
                    linux={"namespaces": namespaces})  # fmt: skip
    loop = Loop()
    created = rig.create(plan, loop)
    watched = Watched(created.init, loop)
    created.start(Deadline.after(30))
    watched.until(lambda: b"up" in watched.out)
    rig.driver.sweep(plan)
    assert not [d for d in _directories(plan.config["linux"]["cgroupsPath"]) if d.exists()]
    watched.until(lambda: watched.exits)
    assert watched.exits[0].code == 137
    watched.release()
    created.delete(Deadline.after(10))


# Parking


def _parked(rig: Rig) -> ContainerDriver:
    driver = ContainerDriver()
    driver.park(Path("/run"))
    rig.driver = driver
    return driver


def test_parked_start(rig: Rig) -> None:
    _parked(rig)
    plan = rig.plan(["sh", "-c", "cut -d: -f3 /proc/self/cgroup | sort -u; ip addr show lo; read x; echo $x"], stdin=True)
    with rig.started_plan(plan) as running:
        for directory in _directories(plan.config["linux"]["cgroupsPath"]):
            assert str(running.created.init.pid) in (directory / "cgroup.procs").read_text().split(), directory
        running.init.write(b"last\n")
        done = running.init.finish()
    assert done.out.startswith(b"/\n1: lo")  # its own groups are the roots that it sees
    assert b"127.0.0.1" in done.out and done.out.endswith(b"last\n")
    assert not _parking_places()


@pytest.mark.parametrize("kinds", [("network",), ("cgroup",), ("pid",), ("network", "cgroup", "ipc", "uts")])
def test_parked_start_with_shared_namespaces(rig: Rig, kinds: tuple[str, ...]) -> None:
    _parked(rig)
    own = [{"type": kind} for kind in ("mount", "network", "uts", "pid", "ipc", "cgroup") if kind not in kinds]
    names = {"network": "net"}
    done = rig.run(["sh", "-c", "; ".join(f"readlink /proc/self/ns/{names.get(k, k)}" for k in kinds)],
                   linux={"namespaces": own})  # fmt: skip
    assert done.out.decode().split() == [os.readlink(f"/proc/self/ns/{names.get(k, k)}") for k in kinds]


def test_parked_start_with_terminal_and_failure(rig: Rig) -> None:
    _parked(rig)
    assert rig.run(["tty"], terminal=True).out == b"/dev/pts/0\r\n"
    _parked(rig)
    with pytest.raises(Exception, match="nope"), rig.started(["nope"]):
        pass
    assert not _parking_places()


def test_parked_elsewhere_is_discarded(rig: Rig) -> None:
    _parked(rig)
    assert rig.run(["true"], linux={"cgroupsPath": f"/ambi-elsewhere-{os.getpid()}"}).code == 0
    assert not _parking_places()


def test_killed_starter_is_done_without(rig: Rig) -> None:
    """At the worst moment: it has said that it waits, and is gone when the job comes."""
    driver = _parked(rig)
    if driver._starter is not None:
        select.select([driver._starter._channel.fd], [], [], 10)
        os.kill(driver._starter._child.pid, signal.SIGKILL)
    assert rig.run(["echo", "hi"]).out == b"hi\n"
    assert not _parking_places()


def test_unpark(rig: Rig) -> None:
    driver = _parked(rig)
    assert len(_parking_places()) == len(cgroups.hierarchies().v1)  # nothing to gain with version 2
    driver.unpark()
    driver.unpark()
    assert not _parking_places()


def test_stale_starters_are_swept(rig: Rig) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    for hierarchy in cgroups.hierarchies().v1:
        Path(f"{hierarchy.mount}/ambi/park-{gone.pid}").mkdir(parents=True)
    Starter.sweep(cgroups.hierarchies(), PurePosixPath("/ambi"))
    assert not list(Path("/sys/fs/cgroup").glob(f"*/ambi/park-{gone.pid}"))


def _parking_places() -> list[Path]:
    return list(Path("/sys/fs/cgroup").glob(f"*/ambi/park-{os.getpid()}"))


# Device programs of version 2


@pytest.fixture
def unified() -> object:
    root = cgroups.hierarchies().v2
    if not root:
        pytest.fail("no unified hierarchy is mounted")
    directory = Path(root, f"ambi-test-{os.getpid()}")
    directory.mkdir()
    yield directory
    end = time.monotonic() + 5
    while time.monotonic() < end:
        try:
            directory.rmdir()
            return
        except OSError:
            time.sleep(0.02)
    directory.rmdir()


def _try_in(directory: Path, script: str) -> bytes:
    """What `script` prints in the cgroup `directory`."""
    joined = f"echo $$ > {directory}/cgroup.procs; {script}"
    return subprocess.run(["sh", "-c", joined], capture_output=True, check=False).stdout


@pytest.mark.parametrize(
    "rules,expected",
    [
        ([Rule(False, "a", None, None, "rwm")], b""),
        ([Rule(True, "a", None, None, "rwm")], b"null zero write "),
        ([Rule(False, "a", None, None, "rwm"), Rule(True, "c", 1, 3, "r")], b"null "),
        ([Rule(False, "a", None, None, "rwm"), Rule(True, "c", 1, 3, "rw")], b"null write "),
        ([Rule(True, "a", None, None, "rwm"), Rule(False, "c", 1, None, "w")], b"null zero "),
        ([Rule(False, "a", None, None, "rwm"), Rule(True, "c", None, 5, "rwm")], b"zero "),
        ([Rule(True, "c", 1, 3, "rwm"), Rule(False, "a", None, None, "rwm")], b""),
        ([Rule(False, "a", None, None, "rwm"), Rule(True, "b", 1, 3, "rwm")], b""),
    ],
)
def test_device_program(unified: Path, rules: list[Rule], expected: bytes) -> None:
    device_filter.attach(str(unified), device_filter.compile(rules))
    script = (
        "(: </dev/null) 2>&- && printf 'null '; (: </dev/zero) 2>&- && printf 'zero ';(: >/dev/null) 2>&- && printf 'write '"
    )
    assert _try_in(unified, script) == expected


def test_usage_while_it_runs(rig: Rig) -> None:
    with rig.started(["sh", "-c", "while :; do :; done"]) as running:
        assert isinstance(running, Running)
        first = running.created.usage()
        time.sleep(0.3)
        second = running.created.usage()
        assert second.cpu_ns > first.cpu_ns and second.pids == 1
