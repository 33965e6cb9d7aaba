"""Trees that come and go in a VM: what virtiofsd keeps open, what its mount namespace has, what cannot be attached."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ambi.core.deadline import Deadline
from ambi.core.errors import Conflict, InvalidRequest, NotFound, Unsupported
from ambi.linux import mount
from hyper.vm import disk
from tests import driverkit
from tests.driverkit import Running
from tests.harness import guest_dir

pytestmark = pytest.mark.needs("qemu")


@pytest.fixture(scope="module")
def running(busybox_tar: Path) -> Iterator[Running]:
    base = Path(tempfile.mkdtemp(prefix="ambi-", dir="/tmp"))
    tree = driverkit.unpack(busybox_tar, base / "tree")
    (base / "first").mkdir()
    rig = driverkit.Rig("vm", base, (driverkit.make_layer(tree, "erofs", base / "base.erofs"),), guest_dir())
    with rig.started(["sleep", "1000"], mounts=(bind(base / "first", "/first"),)) as found:
        yield found
    shutil.rmtree(base)


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    mount.mount("tmpfs", tmp_path, "tmpfs", 0, "size=1m")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for number in range(20):
        (tmp_path / "deep" / f"file{number}").write_text("content\n")
    yield tmp_path
    mount.umount(tmp_path)


def bind(source: Path, target: str, *options: str) -> dict[str, Any]:
    return {"destination": target, "type": "bind", "source": str(source), "options": ["rbind", "rprivate", *options]}


def attach(running: Running, entry: dict[str, Any]) -> None:
    running.created.attach(entry, Deadline.after(60))  # type: ignore[attr-defined]


def detach(running: Running, target: str, *, force: bool = False) -> None:
    running.created.detach(target, Deadline.after(60), force=force)  # type: ignore[attr-defined]


def servers(running: Running) -> list[int]:
    """The processes of the virtiofsd: the one that we started, and its child."""
    pid = running.created._parts.servers[0].child.pid  # type: ignore[attr-defined]
    return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


def opened(running: Running, device: int) -> int:
    """How many descriptors of the virtiofsd are on the file system `device`."""
    count = 0
    for pid in servers(running):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            try:
                count += os.stat(f"/proc/{pid}/fd/{fd}").st_dev == device
            except FileNotFoundError:
                continue
    return count


def mounts(running: Running) -> list[str]:
    return [line.split()[4] for line in Path(f"/proc/{servers(running)[-1]}/mountinfo").read_text().splitlines()]


def test_virtiofsd_lets_go_of_what_is_taken_away(running: Running, source: Path) -> None:
    device, before = os.stat(source).st_dev, mounts(running)
    attach(running, bind(source, "/late"))
    assert running.exec(["sh", "-c", "cat /late/deep/file* | sort -u; ls -R /late > /dev/null"]).out == b"content\n"
    assert opened(running, device) and len(mounts(running)) == len(before) + 1
    detach(running, "/late")
    assert mounts(running) == before
    end = time.monotonic() + 20
    while opened(running, device):  # it hears of it one by one
        assert time.monotonic() < end, opened(running, device)
        time.sleep(0.05)


def test_what_is_mounted_below_comes_along(running: Running, source: Path) -> None:
    mount.mount("tmpfs", source / "deep" / "er", "tmpfs", 0, "size=64k")
    try:
        (source / "deep" / "er" / "x").write_text("below\n")
        attach(running, bind(source, "/late", "ro", "rro"))
        script = "cat /late/deep/er/x && ! touch /late/x && ! touch /late/deep/er/y"
        assert running.exec(["sh", "-c", script]).out == b"below\n"
        detach(running, "/late")
        assert b"/late" not in running.exec(["cat", "/proc/mounts"]).out
    finally:
        mount.umount(source / "deep" / "er")


def test_links_of_the_root_stay_inside(running: Running, source: Path) -> None:
    assert (
        running.exec(["sh", "-c", "mkdir -p /real && ln -sfn ../../../real /way && ln -sfn /proc/sys /proc-link"]).code == 0
    )
    attach(running, bind(source, "/way/late"))
    assert running.exec(["cat", "/real/late/deep/file1"]).out == b"content\n"
    assert running.exec(["sh", "-c", "rm /way && mkdir -p /way/late"]).code == 0
    detach(running, "/way/late")
    assert running.exec(["ls", "/real/late"]).out == b""
    with pytest.raises(InvalidRequest, match="/proc"):
        attach(running, bind(source, "/proc-link"))


def test_bad_ones_leave_nothing(running: Running, source: Path) -> None:
    before = mounts(running)
    with pytest.raises(NotFound, match="nowhere"):
        attach(running, bind(source / "nowhere", "/late"))
    with pytest.raises(InvalidRequest):
        attach(running, bind(source, "/bin/busybox/late"))
    image = Path(tempfile.mkdtemp(dir="/tmp")) / "image"
    try:
        disk.ensure(image, 16 << 20, image.parent)
        with pytest.raises(Unsupported, match="cannot get a disk while it runs"):
            attach(running, {"destination": "/late", "type": "ambi.disk", "source": str(image), "options": []})
    finally:
        shutil.rmtree(image.parent)
    with pytest.raises(NotFound, match="nothing is attached at /first"):
        detach(running, "/first")
    assert mounts(running) == before
    attach(running, bind(source, "/late"))
    with pytest.raises(Conflict, match="already"):
        attach(running, bind(source, "/late"))
    detach(running, "/late")
    assert mounts(running) == before
