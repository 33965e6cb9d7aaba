"""The VM driver over our own monitor: the bodies of the conformance suite, with one vCPU and with two.

`scripts/test` runs this folder inside of `scripts/kvm-lab`, where a KVM that cannot be used is a failure.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ambi.core.model import VmShape
from ambi.core.plan import LaunchPlan
from ambi.linux import mount, process
from hyper import backends
from hyper.vmm import main as vmm_main
from hyper.vmm.machine import Machine
from tests.conformance.test_driver import (
    test_bind_mounts,
    test_exec,
    test_exec_shares_everything,
    test_full_stdout_blocks_nothing_else,
    test_limits_change_while_it_runs,
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
    "test_limits_change_while_it_runs",
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
        mounts = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
        opened = {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()}
        spaces = {kind: Path(f"/proc/{pid}/ns/{kind}").readlink() for kind in ("net", "mnt", "ipc", "uts", "pid")}
    assert status["Name"] == "ambi-vmm" and "0" not in status["Uid"].split()
    assert {status[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Amb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert root == [] and len(mounts) == 1 and mounts[0].split()[4] == "/"
    assert "anon_inode:kvm-vm" in opened
    assert all(path != Path(f"/proc/self/ns/{kind}").readlink() for kind, path in spaces.items())


ATTEMPTS: dict[str, Callable[[], object]] = {
    "open a file": lambda: os.open("/etc/passwd", os.O_RDONLY),
    "open its root": lambda: os.open("/", os.O_RDONLY),
    "see a process": lambda: os.open("/proc/1/status", os.O_RDONLY),
    "make a socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM),
    "make a local socket": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM),
    "signal another": lambda: os.kill(2, signal.SIGKILL),
    "signal all": lambda: os.kill(-1, signal.SIGTERM),
    "run a program": lambda: os.execv("/bin/sh", ["sh"]),
    "make a process": os.fork,
    "become root": lambda: os.setresuid(0, 0, 0),
    "mount": lambda: mount.mount("none", "/", "tmpfs", 0, ""),
    "leave its namespaces": lambda: process.unshare(process.CLONE_NEWUSER),
}


def test_from_inside_nothing_can_be_reached(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tried in the process of the monitor while its machine runs: what a guest could do that has taken it over."""

    def tried(_: Machine) -> dict[str, Any]:
        return {"attempts": {what: _outcome(attempt) for what, attempt in ATTEMPTS.items()}}

    monkeypatch.setattr(vmm_main, "figures", tried)
    with rig.started(["sleep", "1000"]) as running:
        found = running.created.inspect()["attempts"]  # type: ignore[attr-defined]
        assert running.exec(["echo", "goes on"]).out == b"goes on\n"
    assert found == dict.fromkeys(ATTEMPTS, "EPERM")


def _outcome(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return "done"


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
