"""`--storage-opt size=` of containers on ext4 and XFS with project quotas, which this kernel has and hosts need not have."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ambi.linux import quota
from tests.cli.test_real_engine import OnDemand

FILL = "dd if=/dev/zero of=/big bs=64k count=1000 2>&1; stat -c %s /big"


MAKE = {
    "ext4": ["mkfs.ext4", "-q", "-O", "quota,project", "-E", "quotatype=prjquota"],
    "xfs": ["mkfs.xfs", "-q"],
}


@pytest.fixture(scope="module", params=MAKE)
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, busybox_tar: Path
) -> Iterator[OnDemand]:
    base = tmp_path_factory.mktemp("quota")
    subprocess.run(["modprobe", "-a", "loop", "quota_v2", request.param], check=True)
    with open(base / "disk.img", "wb") as file:
        file.truncate(512 << 20)
    subprocess.run([*MAKE[request.param], base / "disk.img"], check=True)
    (base / "disk").mkdir()
    subprocess.run(["mount", "-o", "loop,prjquota", base / "disk.img", base / "disk"], check=True)
    it = OnDemand(base / "disk")
    try:
        it.start()
        it.ok("import", str(busybox_tar), "bb")
        yield it
    finally:
        it.destroy()
        subprocess.run(["umount", "-l", base / "disk"], check=True)


def limits(engine: OnDemand) -> dict[int, int]:
    """Bytes by project, of all uppers that have one."""
    found = {}
    for upper in (engine.data / "instances").glob("*/upper"):
        fd = os.open(upper, os.O_RDONLY)
        try:
            if number := quota.project(fd):
                found[number] = quota.usage(fd, number).limit
        finally:
            os.close(fd)
    return found


def test_a_container_holds_no_more_than_its_size(engine: OnDemand) -> None:
    """Root too; what it removes it may write again; another is not touched; and the limit goes with the container."""
    engine.ok("create", "--name=small", "--network=none", "--storage-opt=size=8m", "bb", "sh", "-c", FILL)
    said = engine.ok("start", "-a", "small")
    assert "Disk quota exceeded" in said or "No space left" in said, said
    assert 6 << 20 < int(said.split()[-1]) <= 8 << 20
    assert json.loads(engine.ok("inspect", "small"))[0]["HostConfig"]["StorageOpt"] == {"size": "8m"}
    ((project, found),) = limits(engine).items()
    assert found == 8 << 20
    free = engine.ok("run", "--rm", "--network=none", "bb", "sh", "-c", FILL)
    assert "1000+0 records out" in free
    thrice = "for i in 1 2 3; do dd if=/dev/zero of=/big bs=1M count=12 2>&1 && rm /big; done && echo all"
    again = engine.ok("run", "--rm", "--network=none", "--storage-opt=size=16m", "bb", "sh", "-c", thrice)
    assert again.endswith("all\n")
    engine.ok("rm", "small")
    root = os.open(engine.data, os.O_RDONLY)
    left = quota.usage(root, project)
    os.close(root)
    assert (left.limit, left.used) == (0, 0)
