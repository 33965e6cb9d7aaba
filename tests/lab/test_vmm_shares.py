"""File trees of VMs of our own monitor: copies of a template that have them, and trees and disks that come and go.

`scripts/test` runs this folder inside of `scripts/kvm-lab`, where a KVM that cannot be used is a failure.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ambi.core.deadline import Deadline
from ambi.core.errors import Conflict
from ambi.core.plan import Directory
from hyper import backends
from hyper.vm import disk
from tests.driverkit import Rig, Running


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "variant" in metafunc.fixturenames:
        metafunc.parametrize("variant", [("vm", "erofs")], ids=["vmm"], indirect=True)


@pytest.fixture(scope="module", autouse=True)
def ours() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(backends.CHOICE, backends.OURS)
        yield


def bind(source: Path, destination: str, *options: str) -> dict[str, object]:
    return {"destination": destination, "type": "bind", "source": str(source), "options": ["rbind", "rprivate", *options]}


def started(running: Running) -> str:
    return str(running.created.inspect()["started"])  # type: ignore[attr-defined]


def memory_of(running: Running) -> list[str]:
    """The fields of /proc/PID/maps of what the guest's memory is."""
    pid = running.created._parts.monitor.child.pid  # type: ignore[attr-defined]
    lines = [line.split(maxsplit=5) for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    return [
        f"{line[1]} {line[5]}" for line in lines if len(line) == 6 and ("guest memory" in line[5] or "templates/" in line[5])
    ]


def kept(rig: Rig) -> set[str]:
    """The templates that there are."""
    return {path.name for path in (rig.guest_dir / "templates").iterdir() if (path / "manifest.json").exists()}


def test_copies_of_one_template_with_and_without_trees(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("of the host\n")
    script = "cat /rw/file && echo of the guest > /rw/made && ! touch /ro/no && cat /one && exec sleep 1000"
    mounts = (bind(tmp_path, "/rw"), bind(tmp_path, "/ro", "ro"), bind(tmp_path / "file", "/one"))
    with rig.started(["sh", "-c", script], mounts=mounts) as running:
        running.init.until(lambda: running.init.out.count(b"\n") == 2)
        assert started(running) == "template"
        assert {line.split()[0] for line in memory_of(running)} == {"rw-s"} and "memfd" in memory_of(running)[0]
        assert (tmp_path / "made").read_text() == "of the guest\n"
        names = [name for name in running.created.inspect()["devices"] if name.startswith("fs")]  # type: ignore[attr-defined]
        assert len(names) == 1
        before = kept(rig)
        with rig.started(["sleep", "1000"]) as other:
            assert started(other) == "template"
            assert {line.split()[0] for line in memory_of(other)} == {"rw-p"}
    assert kept(rig) == before


def test_copy_whose_root_is_a_directory(rig: Rig, tmp_path: Path) -> None:
    plan = rig.plan(["sh", "-c", "echo from the guest > /made && cat /made /bound/file"], mounts=(bind(tmp_path, "/bound"),))
    (tmp_path / "file").write_text("bound\n")
    tree = rig.base / "tree"
    for _ in range(2):
        with rig.started_plan(plan._replace(rootfs=Directory(tree))) as running:
            done = running.init.finish()
            assert started(running) == "template"
        assert (done.code, done.out) == (0, b"from the guest\nbound\n"), done
    assert (tree / "made").read_text() == "from the guest\n"


def attach(running: Running, mount: dict[str, object]) -> None:
    running.created.attach(mount, Deadline.after(60))  # type: ignore[attr-defined]


def detach(running: Running, destination: str, *, force: bool = False) -> None:
    running.created.detach(destination, Deadline.after(60), force=force)  # type: ignore[attr-defined]


def test_tree_comes_into_a_machine_without_any(rig: Rig, tmp_path: Path) -> None:
    """Its memory was its own, and becomes one that virtiofsd can map, while it runs."""
    (tmp_path / "file").write_text("of the host\n")
    with rig.started(["sh", "-c", "n=0; while sleep 0.1; do n=$((n+1)); echo $n > /count; done"]) as running:
        kept = running.start_exec(
            ["sh", "-c", "head -c 3000000 /dev/urandom > /dev/shm/x; sha256sum /dev/shm/x; read a; sha256sum /dev/shm/x"],
            stdin=True,
        )
        kept.until(lambda: kept.out.count(b"\n") == 1)
        assert {line.split()[0] for line in memory_of(running)} == {"rw-p"}
        attach(running, bind(tmp_path, "/late/tree"))
        assert {line.split()[0] for line in memory_of(running)} == {"rw-s"}
        attach(running, bind(tmp_path, "/late/ro", "ro"))
        done = running.exec(["sh", "-c", "cat /late/tree/file && echo back > /late/tree/made && ! touch /late/ro/no"])
        assert (done.code, done.out) == (0, b"of the host\n"), done
        assert (tmp_path / "made").read_text() == "back\n"
        kept.write(b"\n")
        kept.close_stdin()
        first, second = kept.finish().out.splitlines()
        assert first == second
        holder = running.start_exec(["sh", "-c", "cd /late/tree && echo in && exec sleep 1000"])
        holder.until(lambda: holder.out)
        with pytest.raises(Conflict, match="/late/tree is in use"):
            detach(running, "/late/tree")
        detach(running, "/late/tree", force=True)
        detach(running, "/late/ro")
        assert running.exec(["ls", "/late/tree", "/late/ro"]).out == b"/late/ro:\n\n/late/tree:\n"
        holder.process.signal(9)
        holder.finish()
        one = int(running.exec(["cat", "/count"]).out)
        assert int(running.exec(["sh", "-c", "sleep 0.3; cat /count"]).out) > one


def test_disks_come_and_go(rig: Rig, tmp_path: Path) -> None:
    images = [tmp_path / name for name in ("one", "two")]
    for image in images:
        disk.ensure(image, 64 << 20, rig.guest_dir / "disks")
    mounts = [
        {"destination": f"/disk/{image.name}", "type": "ambi.disk", "source": str(image), "options": []} for image in images
    ]
    with rig.started(["sleep", "1000"]) as running:
        for _ in range(3):
            for mount in mounts:
                attach(running, mount)
            assert running.exec(["sh", "-c", "echo x >> /disk/one/n; echo y >> /disk/two/n; sync; cat /disk/*/n"]).code == 0
            for mount in reversed(mounts):
                detach(running, str(mount["destination"]))
        assert not [name for name in running.created.inspect()["devices"] if name.startswith("blk")][2:]  # type: ignore[attr-defined]
        attach(running, mounts[0])
        assert running.exec(["cat", "/disk/one/n"]).out == b"x\nx\nx\n"
    with rig.started(["sleep", "1000"]) as running:
        attach(running, mounts[1])
        assert running.exec(["cat", "/disk/two/n"]).out == b"y\ny\ny\n"


def test_disk_that_is_taken_away_in_mid_flight(rig: Rig, tmp_path: Path) -> None:
    """Whatever the guest does with it: here its agent is passed over."""
    image = tmp_path / "disk"
    disk.ensure(image, 256 << 20, rig.guest_dir / "disks")
    with rig.started(["sleep", "1000"]) as running:
        attach(running, {"destination": "/disk", "type": "ambi.disk", "source": str(image), "options": []})
        writer = running.start_exec(
            ["sh", "-c", "echo go; while dd if=/dev/zero of=/disk/x bs=1M count=64 conv=fsync; do :; done"]
        )
        writer.until(lambda: writer.out)
        attached = running.created._attachments._attached["/disk"]  # type: ignore[attr-defined]
        running.created._parts.monitor.unplug(attached.slot, Deadline.after(60))  # type: ignore[attr-defined]
        assert running.exec(["echo", "alive"]).out == b"alive\n"
        writer.process.signal(9)
        running.loop.run(lambda: bool(writer.exits), Deadline.after(5))
        writer.release()
