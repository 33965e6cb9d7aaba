"""The VM driver over QEMU with a KVM that works: bodies of the conformance suite which depend on how a guest is run.

`scripts/test` runs this folder inside of `scripts/kvm-lab`, where a KVM that cannot be used is a failure.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hyper import backends, probe
from tests.conformance.test_driver import (
    test_bind_mounts,
    test_exec,
    test_sigkill_is_137,
    test_stdin_and_its_end,
    test_terminal,
    test_usage_and_processes,
)
from tests.driverkit import Rig

__all__ = [
    "test_bind_mounts",
    "test_exec",
    "test_sigkill_is_137",
    "test_stdin_and_its_end",
    "test_terminal",
    "test_usage_and_processes",
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "variant" in metafunc.fixturenames:
        metafunc.parametrize("variant", [("vm", "erofs")], ids=["vm-kvm"], indirect=True)


@pytest.fixture(scope="module", autouse=True)
def over_qemu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(backends.CHOICE, backends.QEMU)
        yield


def test_the_probe_finds_kvm(tmp_path: Path) -> None:
    assert probe.host(tmp_path).kvm_problem == ""
    assert probe.host(tmp_path).kvm, "what was kept says otherwise"


def test_the_driver_says_that_it_uses_kvm(rig: Rig) -> None:
    assert rig.driver.probe().details["accelerator"] == "kvm"


def test_the_vmm_uses_kvm_without_rights(rig: Rig) -> None:
    """QEMU has the device open, which a VMM that emulates has not, and is nobody on the host."""
    with rig.started(["sleep", "1000"]) as running:
        pid = running.created._parts.monitor.child.pid  # type: ignore[attr-defined]
        opened = {link.readlink().name for link in Path(f"/proc/{pid}/fd").iterdir()}
        status = Path(f"/proc/{pid}/status").read_text()
        cgroup = Path(f"/proc/{pid}/cgroup").read_text()
    assert "anon_inode:kvm-vm" in opened
    assert "CapEff:\t0000000000000000" in status and "NoNewPrivs:\t1" in status and "Uid:\t0\t" not in status
    assert cgroup.startswith("0::/ambi/"), cgroup
