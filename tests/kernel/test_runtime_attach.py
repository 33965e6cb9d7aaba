"""Mounts into a container that runs: what it sees, what a hostile root cannot do, what is left when they go."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ambi.core.deadline import Deadline
from ambi.core.errors import AmbiError, Conflict, InvalidRequest, NotFound, Unsupported
from ambi.linux import mount
from tests import driverkit
from tests.driverkit import Rig, Running

pytestmark = pytest.mark.needs("root")
SYS_ADMIN = [*driverkit.CAPABILITIES, "CAP_SYS_ADMIN"]


@pytest.fixture(scope="module")
def rig(busybox_tar: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    base = tmp_path_factory.mktemp("rig")
    tree = driverkit.unpack(busybox_tar, base / "tree")
    with driverkit.layers_namespace():
        yield Rig("container", base, (driverkit.make_layer(tree, "dir", base / "none"),), base / "guest")


@pytest.fixture
def running(rig: Rig) -> Iterator[Running]:
    with rig.started(["sleep", "1000"]) as found:
        yield found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "file").write_text("of the host\n")
    return tmp_path / "source"


def bind(source: Path, destination: str, *options: str) -> dict[str, Any]:
    return {"destination": destination, "type": "bind", "source": str(source), "options": ["rbind", "rprivate", *options]}


def attach(running: Running, entry: dict[str, Any]) -> None:
    running.created.attach(entry, Deadline.after(20))  # type: ignore[attr-defined]


def detach(running: Running, destination: str, *, force: bool = False) -> None:
    running.created.detach(destination, Deadline.after(20), force=force)  # type: ignore[attr-defined]


def inside(running: Running, script: str, **changes: Any) -> bytes:
    done = running.exec(["sh", "-c", script], **changes)
    assert done.code == 0, done
    return done.out


def mounted(running: Running) -> list[str]:
    return [line.split()[4] for line in Path(f"/proc/{running.created.init.pid}/mountinfo").read_text().splitlines()]


def test_nothing_of_it_is_on_the_host(running: Running, source: Path) -> None:
    before, fds = mount.table(), os.listdir("/proc/self/fd")
    attach(running, bind(source, "/data"))
    assert mount.table() == before and len(os.listdir("/proc/self/fd")) == len(fds)
    mount.mount("tmpfs", source, "tmpfs", 0, "size=64k")  # of the host, and of nobody else's
    try:
        assert inside(running, "cat /data/file") == b"of the host\n"
    finally:
        mount.umount(source)


@pytest.mark.parametrize(
    "script", ["mkdir /real && ln -s /real /way", "ln -s ../../../../../../real /way", "ln -s real/. /way"]
)
def test_links_stay_inside(running: Running, source: Path, script: str) -> None:
    inside(running, script)
    attach(running, bind(source, "/way/data"))
    assert inside(running, "cat /real/data/file") == b"of the host\n"
    assert "/real/data" in mounted(running) and not Path("/real").exists()
    inside(running, "rm /way && mkdir -p /way/data")
    detach(running, "/way/data")
    assert "/real/data" not in mounted(running)
    assert inside(running, "ls /real/data") == b""


@pytest.mark.parametrize("target", ["/proc/self/attr", "/there", "/sys/there", "/proc"])
def test_not_over_the_kernels_files(running: Running, source: Path, target: str) -> None:
    inside(running, "ln -s /proc/sys /there")
    before = mounted(running)
    with pytest.raises(AmbiError) as error:
        attach(running, bind(source, target))
    assert isinstance(error.value, InvalidRequest) or "read-only" in error.value.message.lower(), error.value
    assert mounted(running) == before


def test_links_that_are_swapped_meanwhile(running: Running, source: Path) -> None:
    """Wherever the mount is, it is inside, and it is what is taken away."""
    inside(running, "mkdir -p /a/x /b/x")
    swapper = running.start_exec(
        ["sh", "-c", "echo go; while :; do ln -sfn /a /way; ln -sfn /b /way; ln -sfn /proc/self/root/../.. /way; done"]
    )
    swapper.until(lambda: swapper.out)
    base, host = len(mounted(running)), mount.table()
    done = 0
    for _ in range(60):
        try:
            attach(running, bind(source, "/way/x"))
        except AmbiError:
            assert len(mounted(running)) == base
            continue
        done += 1
        assert len(mounted(running)) == base + 1
        detach(running, "/way/x")
        assert len(mounted(running)) == base
    assert done and mount.table() == host
    swapper.process.signal(9)
    swapper.finish()


def test_in_use_until_it_is_let_go(running: Running, source: Path) -> None:
    attach(running, bind(source, "/data"))
    holder = running.start_exec(["sh", "-c", "exec 3< /data/file; echo in; read x; cat <&3"], stdin=True)
    holder.until(lambda: holder.out)
    with pytest.raises(Conflict, match="/data is in use"):
        detach(running, "/data")
    assert inside(running, "cat /data/file") == b"of the host\n"
    detach(running, "/data", force=True)
    assert inside(running, "ls /data") == b""
    holder.write(b"\n")
    holder.close_stdin()
    assert holder.finish().out == b"in\nof the host\n"


def test_with_what_is_mounted_below_it(running: Running, source: Path) -> None:
    (source / "below").mkdir()
    mount.mount("tmpfs", source / "below", "tmpfs", 0, "size=64k")
    try:
        (source / "below" / "deep").write_text("deep\n")
        attach(running, bind(source, "/data", "ro", "rro"))
        assert inside(running, "cat /data/below/deep && ! touch /data/x && ! touch /data/below/x") == b"deep\n"
        detach(running, "/data")
        assert not [place for place in mounted(running) if place.startswith("/data")]
    finally:
        mount.umount(source / "below")


def test_what_the_container_mounts_over_it_goes_with_it(rig: Rig, source: Path) -> None:
    capabilities = dict.fromkeys(("bounding", "effective", "permitted"), SYS_ADMIN)
    linux = {"seccomp": None}
    with rig.started(["sleep", "1000"], capabilities=capabilities, linux=linux) as running:
        attach(running, bind(source, "/data"))
        inside(running, "mount -t tmpfs over /data", capabilities=capabilities)
        for force in (False, True):
            detach(running, "/data", force=force)
            assert "/data" not in mounted(running)
            attach(running, bind(source, "/data"))
            inside(running, "mount -t tmpfs over /data/", capabilities=capabilities)
        inside(running, "umount /data && umount /data", capabilities=capabilities)
        detach(running, "/data")  # its own root has done it already
        inside(running, "mkdir /real && ln -s / /x && mount -t tmpfs other /real", capabilities=capabilities)
        attach(running, bind(source, "/x/data"))
        inside(running, "mount --move /data /real 2> /tmp/e || mount -o bind /data /real", capabilities=capabilities)
        detach(running, "/x/data")
        assert "other" in inside(running, "cat /proc/mounts").decode()


def test_a_file_and_a_second_time(running: Running, source: Path) -> None:
    for _ in range(2):
        attach(running, bind(source / "file", "/etc/one"))
        assert inside(running, "cat /etc/one") == b"of the host\n"
        with pytest.raises(Conflict, match="attached at /etc/one already"):
            attach(running, bind(source, "/etc/one"))
        detach(running, "/etc/one")
    with pytest.raises(NotFound, match="nothing is attached at /etc/one"):
        detach(running, "/etc/one")


def test_bad_ones_change_nothing(running: Running, source: Path) -> None:
    before = mounted(running)
    with pytest.raises(NotFound, match="nowhere"):
        attach(running, bind(source / "nowhere", "/data"))
    with pytest.raises(InvalidRequest, match="the root itself"):
        attach(running, bind(source, "/"))
    with pytest.raises(InvalidRequest, match="directory"):
        attach(running, bind(source, "/bin/busybox/x"))
    with pytest.raises(Unsupported, match=r"tmpfs"):
        attach(running, {"destination": "/data", "type": "tmpfs", "source": "tmpfs", "options": []})
    assert mounted(running) == before
