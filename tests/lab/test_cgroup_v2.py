"""The container driver where cgroup v2 is the only hierarchy: what of the conformance suite depends on it.

`scripts/test` runs this folder, and the tests of the runtime's own cgroups, inside of `scripts/kvm-lab`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime import cgroups
from tests.conformance.test_driver import (
    test_delete_kills,
    test_exec_ends_with_init,
    test_exit_code,
    test_init_reaps,
    test_kernel_file_systems,
    test_memory_limit,
    test_pids_limit,
    test_sigkill_is_137,
    test_sweep_after_a_dead_shim,
    test_terminal,
    test_upper_stays,
    test_usage_and_processes,
)
from tests.driverkit import Rig

__all__ = [
    "test_delete_kills",
    "test_exec_ends_with_init",
    "test_exit_code",
    "test_init_reaps",
    "test_kernel_file_systems",
    "test_memory_limit",
    "test_pids_limit",
    "test_sigkill_is_137",
    "test_sweep_after_a_dead_shim",
    "test_terminal",
    "test_upper_stays",
    "test_usage_and_processes",
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "variant" in metafunc.fixturenames:
        metafunc.parametrize("variant", [("container", "erofs")], ids=["container-v2"], indirect=True)


def test_there_is_version_2_alone() -> None:
    found = cgroups.hierarchies()
    assert (str(found.v2), list(found.v1)) == ("/sys/fs/cgroup", [])


@pytest.mark.parametrize("allowed", [False, True])
def test_devices_are_denied_by_a_program(rig: Rig, allowed: bool) -> None:
    """On version 2 a BPF program at the instance's group decides; 1:11 is kmsg, which no default allows."""
    rules: list[dict[str, object]] = [{"allow": False, "access": "rwm"}]
    rules += [{"allow": True, "type": "c", "major": 1, "minor": 11, "access": "rwm"}] if allowed else []
    done = rig.run(["sh", "-c", "mknod /k c 1 11; (: > /k) && echo opened"], resources={"devices": rules})
    assert done.out == (b"opened\n" if allowed else b"")
    assert allowed or b"not permitted" in done.err


def test_only_its_own_group_is_seen(rig: Rig) -> None:
    with rig.started(["sleep", "1000"]) as running:
        group = Path(f"/proc/{running.created.init.pid}/cgroup").read_text().strip()
        assert group.startswith("0::/ambi/test-")
        assert running.exec(["cat", "/proc/self/cgroup"]).out == b"0::/\n"
        assert b"pids.max" in running.exec(["ls", "/sys/fs/cgroup"]).out
