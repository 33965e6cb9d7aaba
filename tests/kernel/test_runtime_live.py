"""What changes while a container runs: pause, limits, memory that runs out."""

from __future__ import annotations

from pathlib import Path

import pytest

from ambi.core.deadline import Deadline
from ambi.core.errors import Conflict, InvalidRequest
from ambi.core.model import Status
from runtime import cgroups
from tests.driverkit import Rig, Running
from tests.kernel.runtimekit import rig, tree

__all__ = ["rig", "tree"]

MEBI = 1 << 20
FILES = {
    "memory": ("memory.limit_in_bytes", "memory.max"), "pids": ("pids.max", "pids.max"),
    "shares": ("cpu.shares", "cpu.weight"), "quota": ("cpu.cfs_quota_us", "cpu.max"),
}  # fmt: skip


def soon() -> Deadline:
    return Deadline.after(10)


def control(path: str, limit: str) -> str:
    """What the control file of `limit` holds, of the group at `path`."""
    found = cgroups.hierarchies()
    name = FILES[limit][0 if found.v1 else 1]
    return Path(f"{found.of(name.partition('.')[0]) or found.v2}{path}/{name}").read_text().strip()


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def counted(running: Running) -> int:
    return int(running.exec(["cat", "/count"]).out or b"0")


COUNTING = ["sh", "-c", "n=0; while :; do n=$((n+1)); echo $n >/count.new; mv /count.new /count; done"]


def test_nothing_runs_in_a_paused_container(rig: Rig) -> None:
    with rig.started(COUNTING) as running:
        container = running.created
        running.init.until(lambda: counted(running) > 2)
        container.pause(soon())
        container.pause(soon())
        assert container.state() is Status.PAUSED
        before = container.usage().cpu_ns
        with pytest.raises(Conflict, match="is paused, unpause the container before exec"):
            running.exec(["true"])
        running.loop.run(lambda: False, Deadline.after(0.3))
        assert container.usage().cpu_ns == before
        container.resume(soon())
        container.resume(soon())
        assert container.state() is Status.RUNNING
        by = soon()
        while container.usage().cpu_ns == before:
            by.check("the resumed loop")
            running.loop.step(Deadline.after(0.02))
        assert running.exec(["echo", "again"]).out == b"again\n"


def test_a_paused_container_can_be_removed(rig: Rig) -> None:
    with rig.started(["sleep", "1000"]) as running:
        running.exec(["true"])  # its helper stays in the frozen groups
        running.created.pause(soon())
        running.created.delete(soon())
        assert running.created.init.exit is not None and running.created.init.exit.code == 137


def test_a_paused_container_of_a_dead_shim_is_swept(rig: Rig) -> None:
    plan = rig.plan(["sleep", "1000"])
    with rig.started_plan(plan) as running:
        running.created.pause(soon())
        rig.driver.sweep(plan)
        running.init.until(lambda: running.init.exits)
        assert running.init.exits[0].code == 137


def test_limits_change_all_or_none(rig: Rig) -> None:
    first = {"memory": {"limit": 64 * MEBI, "swap": 64 * MEBI}, "pids": {"limit": 50}}
    plan = rig.plan(["sleep", "1000"], resources=first)
    path = plan.config["linux"]["cgroupsPath"]
    with rig.started_plan(plan) as running:
        update = running.created.update
        for size in (128 * MEBI, 32 * MEBI):  # up, with the limit of both first, and down
            update({"memory": {"limit": size, "swap": size}}, soon())
            assert control(path, "memory") == str(size)
        update({"pids": {"limit": -1}, "cpu": {"shares": 512, "quota": 50_000, "period": 100_000}}, soon())
        assert control(path, "pids") == "max" and control(path, "quota").split()[0] == "50000"
        assert control(path, "shares") in ("512", "59")
        with pytest.raises(InvalidRequest, match="set of CPUs"):
            update({"cpu": {"shares": 1024, "cpus": "4000"}}, soon())
        assert control(path, "shares") in ("512", "59")


def test_less_memory_than_is_in_use_is_refused(rig: Rig) -> None:
    script = "dd if=/dev/zero of=/dev/shm/full bs=1M count=24 2>/dev/null; echo full; exec sleep 1000"
    size = 64 * MEBI
    plan = rig.plan(["sh", "-c", script], resources={"memory": {"limit": size, "swap": size}})
    with rig.started_plan(plan) as running:
        running.init.until(lambda: running.init.out == b"full\n")
        with pytest.raises(Conflict, match="cannot change the memory limit"):
            running.created.update({"memory": {"limit": 8 * MEBI, "swap": 8 * MEBI}}, soon())
        assert control(plan.config["linux"]["cgroupsPath"], "memory") == str(size)
        assert running.created.state() is Status.RUNNING


def test_memory_that_runs_out_is_told_while_it_runs(rig: Rig) -> None:
    size, told = 32 * MEBI, []
    script = "read x; dd if=/dev/zero of=/dev/null bs=100M count=1 2>/dev/null; echo survived; exec sleep 1000"
    plan = rig.plan(["sh", "-c", script], resources={"memory": {"limit": size, "swap": size}}, stdin=True)
    with rig.started_plan(plan) as running:
        running.created.on_oom = lambda: told.append(running.created.state())
        running.loop.run(lambda: False, Deadline.after(0.2))  # it listens a moment after the start
        running.init.write(b"\n")
        running.init.until(lambda: told and running.init.out == b"survived\n")
        assert set(told) == {Status.RUNNING}
        running.init.close_stdin()
