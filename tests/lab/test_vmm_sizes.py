"""A VM of our own monitor that changes its size: the bodies of `tests/vm`, and memory, which QEMU's machine cannot change.

The lab has no compiler for an agent that hangs: what then happens is brought about here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ambi.core.deadline import Deadline
from ambi.core.errors import Unsupported
from ambi.core.roots import Roots
from ambi.engine.types import CreateSpec
from hyper import backends
from hyper.vm.cgroup import Cgroup
from tests.driverkit import Rig, Running
from tests.harness import guest_dir
from tests.kernel.test_engine_life import opened_with_busybox, output
from tests.lab.test_vmm_devices import wait_until
from tests.vm.test_vm_sizes import (
    SOON,
    rig,
    shell,
    test_cpus_follow_the_quota,
    test_the_disk_grows_while_it_runs_and_at_the_next_start,
)

__all__ = [
    "rig",
    "test_cpus_follow_the_quota",
    "test_the_disk_grows_while_it_runs_and_at_the_next_start",
]
MIB = 1 << 20
USED = 128  # MiB


@pytest.fixture(scope="module", autouse=True)
def ours() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(backends.CHOICE, backends.OURS)
        yield


def total(running: Running) -> int:
    """MiB."""
    return int(shell(running, "grep MemTotal /proc/meminfo").split()[1]) >> 10


def host_limit(running: Running) -> int:
    """MiB that the VMM may use on the host."""
    created: Any = running.created
    cgroup: Cgroup = created._parts.cgroup
    (directory,) = cgroup.directories()
    return int((directory / "memory.max").read_text()) // MIB


def anonymous(running: Running) -> int:
    """MiB of its own that the VMM has in memory."""
    created: Any = running.created
    status = Path(f"/proc/{created._parts.monitor.child.pid}/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) >> 10


def devices(running: Running) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = running.created.inspect()["devices"]  # type: ignore[attr-defined]
    return found


def test_memory_follows_the_limit_up_and_down(rig: Rig) -> None:
    with rig.started(["sleep", "1000"]) as running:
        update: Any = running.created.update  # type: ignore[attr-defined]
        began, limit = total(running), host_limit(running)
        assert update({"memory": {"limit": 600 * MIB}}, Deadline.after(SOON)) == []
        wait_until(lambda: total(running) - began > 430)  # the last block is on line a moment after it is there
        more = total(running) - began
        assert more < 460 and host_limit(running) - limit >= more
        assert shell(running, "cat /sys/fs/cgroup/memory.max") == str(600 * MIB)
        assert running.created.usage().memory_limit_bytes == 600 * MIB
        shell(running, "dd if=/dev/zero of=/dev/null bs=400M count=1")
        with pytest.raises(Unsupported, match="MiB are the most, as this host has no more"):
            update({"memory": {"limit": 1 << 40}}, Deadline.after(SOON))
        assert total(running) - began == more
        assert devices(running)["balloon2"]["stopped"] == 0
        assert update({"memory": {"limit": 100 * MIB}}, Deadline.after(SOON)) == []
        wait_until(lambda: abs(total(running) - began) < 8)
        assert host_limit(running) == limit
        assert shell(running, "cat /sys/fs/cgroup/memory.max") == str(100 * MIB)
        assert devices(running)["mem3"]["stopped"] == 0


def test_a_guest_whose_agent_is_given_up_writes_its_disk_and_powers_off(rig: Rig) -> None:
    plan = rig.plan(["sleep", "1000"])
    with rig.started_plan(plan) as running:
        shell(running, "echo written > /file")
        created: Any = running.created
        created.stuck("it hangs")
        running.init.until(lambda: created.init.exit is not None)
        assert created._parts.monitor.child.how() == "ended with status 0", "the guest powered off"
        assert "guest-shutdown" in created.init.exit.reason and created.init.exit.code == 137
    with rig.started_plan(plan) as running:
        assert shell(running, "cat /file") == "written"


def test_what_the_guest_frees_goes_back_to_the_host(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    with rig.started(["sleep", "1000"]) as running:
        idle = anonymous(running)
        shell(running, f"dd if=/dev/zero of=/dev/null bs={USED}M count=1")
        used = anonymous(running)
        wait_until(lambda: anonymous(running) < used - USED // 2)
        found = devices(running)
        with capsys.disabled():
            print(f"\nidle {idle} MiB, used {used} MiB, freed {anonymous(running)} MiB; {found['balloon2']} {found['mem3']}")
        assert found["balloon2"]["reported"] > USED // 2 * MIB
        assert running.created.inspect()["started"] == "template"  # type: ignore[attr-defined]


def test_the_engine_asks_for_memory_and_the_next_start_has_it(busybox_tar: Path, short_tmp: Path) -> None:
    roots = Roots.of(short_tmp / "data", short_tmp / "run", short_tmp / "run" / "ambi.sock")
    for path in (roots.data, roots.run):
        path.mkdir(mode=0o711)
    roots.guest.symlink_to(guest_dir())
    with opened_with_busybox(roots, busybox_tar) as opened:
        engine = opened.engine
        config = {"Image": "busybox", "Cmd": ["sh", "-c", "while :; do grep MemTotal /proc/meminfo; sleep 0.5; done"]}
        host = {"NetworkMode": "none", "Runtime": "vm", "Memory": 100 << 20}
        id, _ = engine.create(None, CreateSpec(config, host, {}))

        def last() -> int:
            """MiB."""
            lines = output(engine, id).split(b"\n")[:-1]
            return int(lines[-1].split()[1]) >> 10 if lines else 0

        try:
            engine.start(id)
            wait_until(lambda: 150 < last() < 256)
            assert engine.update(id, {"Memory": 500 * MIB, "MemorySwap": -1}) == []
            wait_until(lambda: last() > 480)
            with pytest.raises(Unsupported, match="this host has no more") as caught:
                engine.update(id, {"Memory": 1 << 40})
            assert caught.value.hint and engine.get(id).spec.host["Memory"] == 500 * MIB
            engine.restart(id, 0)
            wait_until(lambda: 500 < last() < 596)
            assert engine.update(id, {"Memory": 200 * MIB}) == []
        finally:
            engine.remove(id, force=True)
