"""The VM driver over our own monitor: the bodies of the conformance suite, with one vCPU and with two.

`scripts/test` runs this folder inside of `scripts/kvm-lab`, where a KVM that cannot be used is a failure.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ambi.core.model import VmShape
from ambi.core.plan import LaunchPlan
from hyper import backends
from tests.conformance.test_driver import (
    test_bind_mounts,
    test_exec,
    test_exec_shares_everything,
    test_full_stdout_blocks_nothing_else,
    test_memory_limit,
    test_no_new_privileges_and_filter,
    test_sigkill_is_137,
    test_stdin_and_its_end,
    test_sweep_after_a_dead_shim,
    test_terminal,
    test_upper_stays,
    test_usage_and_processes,
)
from tests.driverkit import Rig

__all__ = [
    "test_bind_mounts",
    "test_exec",
    "test_exec_shares_everything",
    "test_full_stdout_blocks_nothing_else",
    "test_memory_limit",
    "test_no_new_privileges_and_filter",
    "test_sigkill_is_137",
    "test_stdin_and_its_end",
    "test_sweep_after_a_dead_shim",
    "test_terminal",
    "test_upper_stays",
    "test_usage_and_processes",
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "variant" in metafunc.fixturenames:
        metafunc.parametrize("variant", [("vm", "erofs")], ids=["vmm"], indirect=True)


@pytest.fixture(scope="module", autouse=True)
def ours() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(backends.CHOICE, backends.OURS)
        yield


def test_the_monitor_is_alone_and_without_rights(rig: Rig) -> None:
    with rig.started(["sleep", "1000"]) as running:
        pid = running.created._parts.monitor.child.pid  # type: ignore[attr-defined]
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        root = [entry.name for entry in Path(f"/proc/{pid}/root").iterdir()]
        opened = {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()}
        spaces = {kind: Path(f"/proc/{pid}/ns/{kind}").readlink() for kind in ("net", "mnt", "ipc", "uts", "pid")}
    assert status["Name"] == "ambi-vmm" and "0" not in status["Uid"].split()
    assert {status[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Amb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert root == []
    assert "anon_inode:kvm-vm" in opened
    assert all(path != Path(f"/proc/self/ns/{kind}").readlink() for kind, path in spaces.items())


def test_inspect_shows_exits_and_devices(rig: Rig) -> None:
    with rig.started(["sleep", "1000"]) as running:
        found = running.created.inspect()  # type: ignore[attr-defined]
    assert found["vmm"] == "ambi" and sum(found["exits"].values()) > 0
    assert any(name.startswith("console") for name in found["devices"])


def with_vcpus(plan: LaunchPlan, vcpus: int) -> LaunchPlan:
    return plan._replace(vm=VmShape(vcpus=vcpus))


@pytest.mark.parametrize("vcpus", [1, 2, 4])
def test_every_vcpu_runs(rig: Rig, vcpus: int) -> None:
    with rig.started_plan(with_vcpus(rig.plan(["grep", "-c", "^processor", "/proc/cpuinfo"]), vcpus)) as running:
        assert running.init.finish().out == b"%d\n" % vcpus
