"""What a hostile image or caller tries, one test for each class of hole that runtimes have had."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from ambi.core.errors import AmbiError, Internal, InvalidRequest
from ambi.linux import process
from runtime import users
from tests.driverkit import MOUNTS, Rig
from tests.kernel.runtimekit import rig, tree

__all__ = ["rig", "tree"]


def _bind(source: Path, destination: str) -> dict[str, Any]:
    return {"destination": destination, "type": "bind", "source": str(source), "options": ["rbind", "rprivate"]}


def test_proc_as_a_link(rig: Rig, tree: Path) -> None:
    """CVE-2019-19921, CVE-2023-27561: /proc of the image is a link, so the real one would lie elsewhere."""
    (tree / "proc").rmdir()
    (tree / "proc").symlink_to("/fake")
    (tree / "fake").mkdir()
    with pytest.raises(InvalidRequest, match="/proc"), rig.started(["true"]):
        pass


@pytest.mark.parametrize("destination", ["/proc/self", "/proc/sys", "/proc/../proc/1", "/proc/sys/kernel/core_pattern"])
def test_mount_over_proc(rig: Rig, tmp_path: Path, destination: str) -> None:
    """CVE-2019-16884: a volume over /proc/self/attr takes the security label away."""
    with pytest.raises(InvalidRequest, match="below /proc"), rig.started(["true"], mounts=(_bind(tmp_path, destination),)):
        pass


def test_mount_through_a_link_into_proc(rig: Rig, tree: Path, tmp_path: Path) -> None:
    (tree / "way").symlink_to("/proc")
    with (
        pytest.raises(InvalidRequest, match="leads into /proc"),
        rig.started(["true"], mounts=(_bind(tmp_path, "/way/bus"),)),
    ):
        pass


def test_mount_through_a_link_stays_inside(rig: Rig, tree: Path, tmp_path: Path) -> None:
    """CVE-2021-30465: the destination is a link to a directory of the host."""
    host, source = tmp_path / "host", tmp_path / "source"
    host.mkdir()
    source.mkdir()
    (source / "mark").write_text("bound")
    (tree / "way").symlink_to(host)
    (tree / "up").symlink_to("../../../../../..")
    done = rig.run(["cat", f"{host}/x/mark", "/y/mark"], mounts=(_bind(source, "/way/x"), _bind(source, "/up/y")))
    assert done.out == b"boundbound"
    assert not any(host.iterdir())


@pytest.mark.parametrize("cwd", ["/proc/self/fd/3", "/proc/self/fd/7", "/proc/self/fd/11", "/proc/self/fd/../../../.."])
def test_directory_by_a_leaked_descriptor(rig: Rig, cwd: str) -> None:
    """CVE-2024-21626: the working directory is a descriptor of the runtime's that leads out."""
    fds = [os.open("/", os.O_RDONLY) for _ in range(10)]
    for fd in fds:
        os.set_inheritable(fd, True)
    try:
        with rig.started(["sleep", "1000"]) as running:
            if ".." not in cwd:
                with pytest.raises(InvalidRequest):
                    rig.run(["pwd"], cwd=cwd)
                with pytest.raises(InvalidRequest):
                    running.exec(["pwd"], cwd=cwd)
            assert running.exec(["ls", "/proc/self/fd"]).out.split() == [b"0", b"1", b"2", b"3"]
        assert rig.run(["ls", "/proc/self/fd"]).out.split() == [b"0", b"1", b"2", b"3"]
    finally:
        for fd in fds:
            os.close(fd)


def test_null_device_of_the_image(rig: Rig, tree: Path) -> None:
    """CVE-2025-31133: masked files are binds of /dev/null, which the image has replaced by a link elsewhere."""
    (tree / "target").write_text("untouched")
    (tree / "dev" / "null").symlink_to("/target")
    without_dev = [m for m in MOUNTS if m["destination"] not in ("/dev", "/dev/pts", "/dev/mqueue", "/dev/shm")]
    plan = rig.plan(["sh", "-c", "echo changed > /proc/keys; cat /target; stat -c %t:%T /proc/keys"])
    plan.config["mounts"] = without_dev
    with rig.started_plan(plan) as running:
        assert running.init.finish().out == b"untouched1:3\n"


def test_sysctl_of_a_fake_proc(rig: Rig, tree: Path) -> None:
    """CVE-2025-52881: writes that are meant for /proc go to a file of the image."""
    fake = tree / "proc" / "sys" / "net" / "ipv4"
    fake.mkdir(parents=True)
    (fake / "ip_unprivileged_port_start").write_text("fake")
    plan = rig.plan(["cat", "/proc/sys/net/ipv4/ip_unprivileged_port_start"])
    plan.config["mounts"] = [m for m in MOUNTS if m["destination"] != "/proc"]
    plan.config["linux"]["sysctl"] = {"net.ipv4.ip_unprivileged_port_start": "99"}
    plan.config["linux"]["maskedPaths"] = plan.config["linux"]["readonlyPaths"] = []
    with rig.started_plan(plan) as running:
        assert running.init.finish().out == b"fake"


def test_terminal_of_a_fake_devpts(rig: Rig, tree: Path) -> None:
    """CVE-2025-52565: /dev/pts/ptmx is something else."""
    (tree / "dev" / "pts").mkdir()
    os.mknod(tree / "dev" / "pts" / "ptmx", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    plan = rig.plan(["true"], terminal=True)
    plan.config["mounts"] = [m for m in MOUNTS if not m["destination"].startswith("/dev")]
    with pytest.raises(InvalidRequest, match="devpts"), rig.started_plan(plan):
        pass


def test_interpreter_by_its_own_link(rig: Rig, tree: Path) -> None:
    """CVE-2019-5736: the entrypoint is /proc/self/exe, the runtime's own program."""
    (tree / "bin" / "evil").symlink_to("/proc/self/exe")
    with pytest.raises(AmbiError), rig.started(["/bin/evil", "-c", "print(1)"]):
        pass
    with rig.started(["sleep", "1000"]) as running, pytest.raises(AmbiError):
        running.exec(["/bin/evil", "-c", "print(1)"])


def test_nothing_is_imported_inside(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """An import after entering the root would run the image's Python files as root of the host."""

    def identify(*_: object) -> object:
        import colorsys

        return colorsys

    monkeypatch.setattr(users, "identify", identify)
    with pytest.raises(Internal, match=r"colorsys|sys\.meta_path is empty"), rig.started(["true"]):
        pass


def test_child_cannot_be_inspected(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of the container must not reach our memory or program through /proc while we are inside."""

    def identify(*_: object) -> object:
        raise InvalidRequest(f"dumpable: {process.prctl(process.PR_GET_DUMPABLE)}")

    with rig.started(["sleep", "1000"]) as running:
        monkeypatch.setattr(users, "identify", identify)
        with pytest.raises(InvalidRequest, match="dumpable: 0"):
            running.exec(["true"])
    with pytest.raises(InvalidRequest, match="dumpable: 0"), rig.started(["true"]):
        pass


def test_devices_of_the_host(rig: Rig) -> None:
    done = rig.run(["sh", "-c", "mknod /disk b 254 0 && mknod /mem c 1 1; cat /disk; cat /mem; cat /dev/null && echo null"])
    assert done.err.count(b"Operation not permitted") == 2
    assert done.out == b"null\n"


@pytest.mark.parametrize(
    "spoil",
    [
        os.mkfifo,
        lambda path: path.symlink_to("/proc/self/mem"),
        lambda path: path.write_bytes(b"x:" * (2 << 20)),
        lambda path: path.write_bytes(b"\xff\x00:::\nalice:x:-1:0::\nalice:x:99999999999999999999:0::/:\nshort\n"),
        lambda path: path.mkdir(),
    ],
    ids=["fifo", "link", "huge", "garbage", "directory"],
)
def test_hostile_passwd(rig: Rig, tree: Path, spoil: Any) -> None:
    path = tree / "etc" / "passwd"
    path.unlink()
    spoil(path)
    assert rig.run(["grep", "Uid", "/proc/self/status"], user="1234").out.split()[1] == b"1234"
    with pytest.raises(InvalidRequest, match="alice"), rig.started(["true"], user="alice"):
        pass


def test_environment_of_ours_stays_outside(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    done = rig.run(["env"], env=["A=1", "=bad", "novalue"])
    assert sorted(done.out.split()) == [b"A=1", b"HOME=/root"]


def test_root_of_the_host_is_gone(rig: Rig) -> None:
    done = rig.run(
        ["sh", "-c", "cat /proc/self/mountinfo | wc -l; grep -c -e /tmp/ambi -e ' /mnt' /proc/self/mountinfo; ls /"]
    )
    lines = done.out.split()
    assert int(lines[0]) < 60 and lines[1] == b"0"


def test_host_sysctls_are_refused(rig: Rig) -> None:
    for key in ("kernel.panic", "vm.swappiness", "net/../kernel.panic", "kernel.hostname"):
        problems = rig.driver.check(rig.plan(["true"], linux={"sysctl": {key: "1"}}))
        assert problems and key in problems[0].message
