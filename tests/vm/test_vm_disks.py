"""Volumes of a VM: disks of its own, binds that are filled the first time, paths below a source; limits and figures."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ambi.core.deadline import Deadline
from ambi.core.errors import AmbiError, Conflict, InvalidRequest, NotFound, Unsupported
from ambi.core.loop import Loop
from ambi.core.undo import Undo
from tests import driverkit
from tests.harness import guest_dir

pytestmark = pytest.mark.needs("qemu")
NET_RAW = struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0)  # struct vfs_cap_data, linux/capability.h
LOOK = "find . -mindepth 1 | sort | xargs stat -c '%n %A %u %g %Y %h'; readlink data/link"


@pytest.fixture(scope="module")
def rig(busybox_tar: Path) -> Iterator[driverkit.Rig]:
    base = Path(tempfile.mkdtemp(prefix="ambi-", dir="/tmp"))
    tree = driverkit.unpack(busybox_tar, base / "tree")
    fill(tree / "srv")
    fill(tree / "opt")
    yield driverkit.Rig("vm", base, (driverkit.make_layer(tree, "erofs", base / "base.erofs"),), guest_dir())
    shutil.rmtree(base)


def fill(top: Path) -> None:
    """What an image may have where a volume is mounted."""
    data = top / "data"
    data.mkdir(parents=True)
    (data / "file").write_text("content\n")
    os.chown(data / "file", 1000, 50)
    (data / "file").chmod(0o4750)
    os.setxattr(data / "file", "security.capability", NET_RAW)
    os.link(data / "file", top / "second")
    (data / "link").symlink_to("/nowhere/at/all")
    os.mkfifo(data / "fifo", 0o620)
    os.mknod(data / "null", 0o20666, os.makedev(1, 3))
    os.chown(data, 7, 8)
    data.chmod(0o1771)
    os.utime(data / "file", (1_000_000_000, 1_000_000_000))
    os.utime(data, (1_100_000_000, 1_100_000_000))
    os.chown(top, 33, 34)
    top.chmod(0o2750)


def bind(source: Path, target: str, *options: str) -> dict[str, Any]:
    return {"destination": target, "type": "bind", "source": str(source), "options": ["rbind", "rprivate", *options]}


def disk(source: Path, target: str, *options: str) -> dict[str, Any]:
    return {"destination": target, "type": "ambi.disk", "source": str(source), "options": list(options)}


def make_disk(path: Path) -> Path:
    with open(path, "xb") as file:
        file.truncate(32 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", path], check=True)
    return path


def listed(where: Path | str) -> str:
    return subprocess.run(["sh", "-c", LOOK], cwd=where, check=True, capture_output=True, text=True).stdout


def test_volumes_are_filled_once_and_disks_keep_what_was_written(rig: driverkit.Rig, short_tmp: Path) -> None:
    empty, full, half = short_tmp / "empty", short_tmp / "full", short_tmp / "half"
    for directory in (empty, full, half):
        directory.mkdir()
    (full / "own").write_text("mine\n")
    (half / ".ambi-copy").mkdir()  # of a copy that was cut off, with part of it in place
    (half / "second").write_text("cut o")
    image = make_disk(short_tmp / "disk.img")
    mounts = (
        bind(empty, "/srv", "ambi.copy", "ro"),
        bind(full, "/srv/data", "ambi.copy"),
        bind(half, "/opt", "ambi.copy"),
        disk(image, "/disk"),
    )
    script = "ls /srv; cat /srv/data/own; echo kept > /disk/file; stat -f -c %T /disk; sync; touch /srv/x 2>&1"
    with rig.started(["sleep", "1000"], mounts=mounts) as running:
        done = running.exec(["sh", "-c", script])
        assert done.out.split() == [
            b"data",
            b"second",
            b"mine",
            b"ext2/ext3",
            *b"touch: /srv/x: Read-only file system".split(),
        ]
        with pytest.raises(Conflict, match=r"disk\.img is in use by another"), Undo() as undo:
            rig.driver.create(rig.plan(["true"], mounts=(disk(image, "/disk"),)), undo, Deadline.after(60), Loop())
    original = rig.base / "tree/srv"
    assert listed(empty) == listed(original)
    assert os.getxattr(empty / "data/file", "security.capability") == NET_RAW
    assert (empty.stat().st_uid, empty.stat().st_gid, empty.stat().st_mode & 0o7777) == (33, 34, 0o2750)
    assert os.listdir(full) == ["own"]
    assert listed(half) == listed(original)
    again = (bind(empty, "/a", "ambi.subpath=data", "ro"), disk(image, "/disk", "ro"), bind(empty, "/srv", "ambi.copy"))
    (empty / "second").unlink()
    done = rig.run(["sh", "-c", "cat /a/file /disk/file; ls /srv; touch /disk/x"], mounts=again)
    assert done.out == b"content\nkept\ndata\n" and b"Read-only" in done.err


@pytest.mark.parametrize("subpath", ["../..", "up", "/absolute", "abs", "self", "loop", "missing"])
def test_a_subpath_stays_in_its_source(rig: driverkit.Rig, short_tmp: Path, subpath: str) -> None:
    """Whatever it and the links below say: what it means is inside of the source, or not there."""
    (short_tmp / "outside").write_text("secret\n")
    source = short_tmp / "source"
    (source / "etc").mkdir(parents=True)
    (source / "up").symlink_to("../..")
    (source / "abs").symlink_to("/etc")
    (source / "self").symlink_to("/proc/self/root")
    (source / "loop").symlink_to("/loop")
    from hyper import translate
    from hyper.vm import share

    plan = rig.plan(["true"], mounts=(bind(source, "/x", f"ambi.subpath={subpath}"),))
    (found,) = translate.binds(plan)
    if subpath in ("/absolute", "self", "loop", "missing"):
        with pytest.raises(InvalidRequest if subpath == "loop" else NotFound):
            share.check_sources((found,))
        return
    fd = found.open()
    try:
        assert os.path.samestat(os.fstat(fd), os.stat(source / "etc" if subpath == "abs" else source))
    finally:
        os.close(fd)


def test_limits_change_while_it_runs(rig: driverkit.Rig) -> None:
    with rig.started(["sleep", "1000"], resources={"pids": {"limit": 100}}) as running:
        update = running.created.update  # type: ignore[attr-defined]
        show = "cd /sys/fs/cgroup; cat memory.max cpu.max pids.max cpu.weight"
        update(
            {"memory": {"limit": 64 << 20}, "cpu": {"quota": 20_000, "period": 50_000, "shares": 512}}, Deadline.after(20)
        )
        assert running.exec(["sh", "-c", show]).out == b"67108864\n20000 50000\n100\n20\n"
        assert running.created.usage().memory_limit_bytes == 64 << 20
        update({"cpu": {"quota": -1}, "pids": {"limit": -1}}, Deadline.after(20))
        assert running.exec(["sh", "-c", show]).out == b"67108864\nmax 50000\nmax\n20\n"
        for refused, named in (
            ({"memory": {"limit": 1 << 40}}, "memory"),
            ({"cpu": {"quota": 300_000, "period": 100_000}}, "CPUs"),
            ({"cpu": {"cpus": "0"}, "pids": {"limit": 3}}, r"cpu\.cpus"),
        ):
            with pytest.raises(Unsupported, match=named):
                update(refused, Deadline.after(20))
        assert running.exec(["sh", "-c", show]).out == b"67108864\nmax 50000\nmax\n20\n"
        before = running.created.usage()
        running.exec(["sh", "-c", "head -c 1000000 /dev/zero > /file; sync"])
        after = running.created.usage()
        assert before.block_read_bytes > 0
        assert after.block_write_bytes - before.block_write_bytes >= 1_000_000


def test_a_disk_that_has_no_file_system_says_so(rig: driverkit.Rig, short_tmp: Path) -> None:
    (short_tmp / "disk.img").write_bytes(bytes(1 << 20))
    with pytest.raises(AmbiError, match="/disk"), Undo() as undo:
        rig.driver.create(
            rig.plan(["true"], mounts=(disk(short_tmp / "disk.img", "/disk"),)), undo, Deadline.after(60), Loop()
        )
