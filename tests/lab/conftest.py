"""Fixtures of the driver conformance suite, for the tests that run inside of `scripts/kvm-lab`."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.test_real_engine import OnDemand
from tests.conformance.conftest import idle, rig

__all__ = ["idle", "rig"]


@pytest.fixture(scope="session")
def variant(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(driver, form of its layers), which each module gives for itself."""
    found: tuple[str, str] = request.param
    return found


@pytest.fixture(scope="session", autouse=True)
def mounted_as_by_systemd() -> None:
    """cgroup2 with systemd's flag, by which nobody in a cgroup namespace may bring a process in from outside of it."""
    subprocess.run(["mount", "-o", "remount,nsdelegate", "/sys/fs/cgroup"], check=True)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, busybox_tar: Path) -> Iterator[OnDemand]:
    """One with an image `bb`."""
    it = OnDemand(tmp_path_factory.mktemp("lab"))
    it.start()
    it.ok("import", str(busybox_tar), "bb")
    yield it
    it.destroy()
