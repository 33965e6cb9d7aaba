"""Namespaces that are shared, joined or left out."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from ambi.core.deadline import Deadline
from ambi.core.errors import InvalidRequest, NotFound
from ambi.core.loop import Loop
from tests.driverkit import NAMESPACES, Rig, Watched
from tests.kernel.runtimekit import rig, tree

__all__ = ["rig", "tree"]


def _without(*kinds: str) -> dict[str, object]:
    return {"namespaces": [{"type": kind} for kind in NAMESPACES if kind not in kinds]}


def _with(kind: str, path: str) -> dict[str, object]:
    return {"namespaces": [*({"type": k} for k in NAMESPACES if k != kind), {"type": kind, "path": path}]}


def test_host_network(rig: Rig) -> None:
    done = rig.run(["readlink", "/proc/self/ns/net"], linux=_without("network"))
    assert done.out.decode().strip() == os.readlink("/proc/self/ns/net")


def test_every_namespace_is_its_own(rig: Rig) -> None:
    names = ("mnt", "pid", "net", "uts", "ipc", "cgroup")
    done = rig.run(["sh", "-c", "; ".join(f"readlink /proc/self/ns/{name}" for name in names)])
    assert not set(done.out.decode().split()) & {os.readlink(f"/proc/self/ns/{name}") for name in names}


def test_joined_network(rig: Rig) -> None:
    holder = subprocess.Popen(["unshare", "-n", "sleep", "1000"])
    try:
        path = f"/proc/{holder.pid}/ns/net"
        own = os.readlink("/proc/self/ns/net")
        while os.readlink(path) == own:
            time.sleep(0.02)
        done = rig.run(["readlink", "/proc/self/ns/net"], linux=_with("network", path))
        assert done.out.decode().strip() == os.readlink(path)
    finally:
        holder.kill()
        holder.wait()


def test_joined_pids(rig: Rig) -> None:
    """The pid namespace of another container: init is not pid 1 there, and both see each other."""
    with rig.started(["sleep", "4711"]) as other:
        path = f"/proc/{other.created.init.pid}/ns/pid"
        done = rig.run(["sh", "-c", "echo $$; ps"], linux=_with("pid", path))
        assert done.code == 0
        assert int(done.out.split()[0]) > 1 and b"sleep 4711" in done.out


def test_host_pids_end_with_init(rig: Rig) -> None:
    """No pid namespace of its own kills what init leaves behind, so the driver does."""
    plan = rig.plan(["sh", "-c", "sleep 1234567 </dev/null >/dev/null 2>&1 & echo $!"], linux=_without("pid"))
    with rig.started_plan(plan) as running:
        pid = int(running.init.finish().out)
        end = time.monotonic() + 10
        while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
            time.sleep(0.02)
        assert not Path(f"/proc/{pid}").exists()


def test_path_that_is_no_namespace(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(InvalidRequest, match="not a namespace"),
        rig.started(["true"], linux=_with("ipc", str(tmp_path / "file"))),
    ):
        pass
    with pytest.raises(NotFound), rig.started(["true"], linux=_with("ipc", str(tmp_path / "nothing"))):
        pass


def test_init_dies_with_its_shim(rig: Rig) -> None:
    """Nobody is left to reap it or to hold its output: PDEATHSIG, also after the user and capabilities changed."""
    plan = rig.plan(["sh", "-c", "echo up; sleep 1000"], user="alice")
    read, write = os.pipe()
    shim = os.fork()
    if shim == 0:
        try:
            loop = Loop()
            created = rig.create(plan, loop)
            watched = Watched(created.init, loop)
            created.start(Deadline.after(30))
            watched.until(lambda: b"up" in watched.out)
            os.write(write, str(created.init.pid).encode())
        finally:
            os._exit(0)
    os.close(write)
    pid = int(os.read(read, 32))
    os.close(read)
    os.waitpid(shim, 0)
    end = time.monotonic() + 10
    while _alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    assert not _alive(pid)
    rig.driver.sweep(plan)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
