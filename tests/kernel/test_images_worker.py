"""The jail of the worker, seen from inside and from outside."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ambi.core.errors import AmbiError, Corrupt, Internal
from ambi.linux import unix
from images.layers.frames import FrameReader
from images.layers.nursery import Nursery
from images.layers.supervisor import Worker, pipe
from tests.layerkit import member, tar_bytes, write_tar

# Enters the jail as the worker does, then tries what hostile code would; prints what succeeded.
PROBE = """
import os, socket, sys, signal
from images.layers import jail
sock, other = socket.socketpair()
secret = os.open("/etc/hostname", os.O_RDONLY)
jail.enter(sock.fileno())
def attempt(name, action):
    try:
        action()
    except OSError:
        return
    os.write(1, name.encode() + b" ")
attempt("open", lambda: os.open("/", os.O_RDONLY))
attempt("open-proc", lambda: os.open("/proc/self/mem", os.O_RDWR))
attempt("inherited", lambda: os.read(secret, 1))
attempt("socket", lambda: socket.socket(socket.AF_INET))
attempt("unix", lambda: socket.socket(socket.AF_UNIX))
attempt("fork", os.fork)
attempt("exec", lambda: os.execv("/bin/true", ["true"]))
attempt("kill", lambda: os.kill(1, 0))
attempt("setuid", lambda: os.setuid(0))
attempt("mkdir", lambda: os.mkdir("x"))
attempt("chroot", lambda: os.chroot("."))
attempt("mount", lambda: __import__("ambi.linux.mount").linux.mount.umount("/"))
os.write(1, b"done pid=%d" % os.getpid())
"""


def test_the_jail_allows_nothing_but_its_descriptors() -> None:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done pid=1"


def test_the_workers_ids_and_namespaces() -> None:
    with Worker() as worker:
        worker.wait_ready()
        outer = worker.pid
        (inner,) = Path(f"/proc/{outer}/task/{outer}/children").read_text().split()
        status = dict(
            line.split(":\t", 1) for line in Path(f"/proc/{inner}/status").read_text().splitlines() if ":\t" in line
        )
        uids = set(status["Uid"].split())
        assert len(uids) == 1
        assert int(uids.pop()) >= 0x70000000
        assert int(status["Gid"].split()[0]) >= 0x70000000
        assert status["Groups"].strip() == ""
        for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(status[name], 16) == 0, name
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        for namespace in ("mnt", "net", "ipc", "uts", "pid"):
            theirs, ours = (os.readlink(f"/proc/{pid}/ns/{namespace}") for pid in (inner, "self"))
            assert theirs != ours, namespace
        descriptors = sorted(Path(f"/proc/{inner}/fd").iterdir(), key=lambda path: int(path.name))
        assert [os.readlink(path).partition(":")[0] for path in descriptors[3:]] == ["socket"]


def test_a_worker_that_is_killed_is_an_error_and_not_a_hang(short_tmp: Path) -> None:
    read_end, write_end = pipe()
    target = os.open(short_tmp / "layer", os.O_RDWR | os.O_CREAT)
    try:
        with pytest.raises(Internal, match="died"), Worker() as worker:
            worker.start({"do": "erofs", "limit": 1 << 30}, read_end, target)
            os.write(write_end, tar_bytes(member("f", b"x" * 9000))[:2000])
            os.kill(worker.pid, signal.SIGKILL)
            worker.converted()
    finally:
        for fd in (read_end, write_end, target):
            os.close(fd)


@pytest.mark.parametrize("data", [gzip.compress(os.urandom(9 << 20), 1), b"", b"\x1f\x8b" + bytes(9000)])
def test_decompressing_ahead_changes_nothing(short_tmp: Path, data: bytes) -> None:
    """The same layer, or the same error, with and without the second thread; a worker goes on after the former."""
    archive = short_tmp / "archive"
    archive.write_bytes(gzip.compress(tar_bytes(member("f", data)), 1) if len(data) > 9100 else data)
    told: list[tuple[object, bytes]] = []
    for ahead in (False, True):
        with contextlib.suppress(Corrupt), Worker(ahead=ahead) as worker:
            for number in range(2):
                with open(archive, "rb") as source, open(short_tmp / f"{ahead}{number}", "w+b") as target:
                    worker.start({"do": "erofs", "limit": 1 << 30}, source.fileno(), target.fileno())
                    try:
                        told.append((worker.converted(), (short_tmp / f"{ahead}{number}").read_bytes()))
                    except Corrupt as error:
                        told.append((error.message, b""))
                        raise
    assert told[: len(told) // 2] == told[len(told) // 2 :] and len(told) in (2, 4)


def test_a_nursery_that_is_killed_is_started_again(short_tmp: Path) -> None:
    """What runs then fails; nothing of it lives on."""
    nursery = Nursery()
    nursery.keep()
    try:
        for _ in range(2):
            ours, theirs = unix.pair()
            with ours, theirs:
                pid = nursery.fork(theirs, ahead=False)
                theirs.close()
                assert unix.receive(ours).body == {"ready": True}  # type: ignore[union-attr]
                stat = Path(f"/proc/{pid}/stat").read_text()
                os.kill(int(stat.rpartition(")")[2].split()[1]), signal.SIGKILL)
                assert unix.receive(ours) is None  # the worker had the other end
                assert nursery.status(pid) == 128 + signal.SIGKILL
                nursery.leave(pid, kill=False)
    finally:
        nursery.release()


def test_an_idle_nursery_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not while a worker is there; and the next worker has a new one."""
    monkeypatch.setattr("images.layers.nursery.IDLE_S", 0.05)
    nursery = Nursery()
    nursery.keep()
    try:
        for _ in range(2):
            ours, theirs = unix.pair()
            with ours, theirs:
                pid = nursery.fork(theirs, ahead=False)
                assert unix.receive(ours).body == {"ready": True}  # type: ignore[union-attr]
                process = nursery._process
                assert process is not None
                time.sleep(0.2)
                assert process.poll() is None
            while Path(f"/proc/{pid}").exists():  # its end is seen when it comes, not with the next request
                time.sleep(0.05)
            assert process.poll() is None
            nursery.leave(pid, kill=False)
            assert process.wait(timeout=30) == 0
    finally:
        nursery.release()


def test_no_worker_outlives_a_broken_use() -> None:
    with pytest.raises(ZeroDivisionError), Worker() as worker:
        pid = worker.pid
        raise ZeroDivisionError
    assert not Path(f"/proc/{pid}").exists()


def test_workers_run_jobs_until_one_fails(short_tmp: Path) -> None:
    good = write_tar(short_tmp / "good.tar", member("f", b"x"))
    bad = short_tmp / "bad.tar"
    bad.write_bytes(b"\x01" * 2048)
    with Worker() as worker:
        for number, archive in enumerate((good, good, bad)):
            with open(archive, "rb") as source, open(short_tmp / f"layer{number}", "w+b") as target:
                worker.start({"do": "erofs", "limit": 1 << 30}, source.fileno(), target.fileno())
                if archive is bad:
                    with pytest.raises(Corrupt):
                        worker.converted()
                else:
                    assert worker.converted().content_bytes == 1


def test_a_worker_keeps_nothing_of_the_layers_before(short_tmp: Path) -> None:
    archive = write_tar(short_tmp / "many.tar", *(member(f"d/{number}", b"") for number in range(8000)))
    taken = []
    with Worker() as worker:
        for _ in range(8):
            with open(archive, "rb") as source, open(short_tmp / "layer", "w+b") as target:
                worker.start({"do": "erofs", "limit": 1 << 30}, source.fileno(), target.fileno())
                assert worker.converted().entries == 8002
            (jailed,) = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
            status = Path(f"/proc/{jailed}/status").read_text()
            taken.append(int(status.partition("VmRSS:")[2].split()[0]))
    assert taken[-1] - taken[1] < 8000, f"KiB after each layer: {taken}"


@pytest.mark.parametrize(
    "sent",
    [b"\xff\xff\xff\xff", b"\x02\x00\x00\x00{}", b"\x05\x00\x00\x00[1,2]", b'\x0b\x00\x00\x00{"data":-1}',
     b"\x09\x00\x00\x00{", b"\x04\x00\x00\x00\xff\xfe{}"],
)  # fmt: skip
def test_frames_of_another_form_are_refused(sent: bytes) -> None:
    read_end, write_end = pipe()
    try:
        os.write(write_end, sent)
        os.close(write_end)
        with pytest.raises(Corrupt):
            FrameReader(read_end).frame()
    finally:
        os.close(read_end)


ATTRIBUTES = {"mode": 511, "uid": 0, "gid": 0, "mtime_ns": 0, "xattrs": {}, "shared": None, "data": 0}
HOSTILE = {
    "path": [{"op": "symlink", "name": "../x", "link": "y", **ATTRIBUTES}],
    "dots": [{"op": "directory", "name": "..", **ATTRIBUTES}],
    "up too far": [{"op": "up", "data": 0}] * 2,
    "shared path": [{"op": "again", "name": "a", "shared": "../../etc/passwd", "data": 0}],
    "body path": [{"op": "file", "name": "a", "body": "../x", **ATTRIBUTES}],
    "unknown": [{"op": "chroot", "data": 0}],
    "hole without a body": [{"op": "hole", "size": 5, "data": 0}],
    "body in a body": [{"op": "body", "data": 0}] * 2,
    "never left": [],
}


@pytest.mark.parametrize("case", HOSTILE)
def test_the_applier_believes_no_worker(case: str, short_tmp: Path) -> None:
    """What a worker under foreign control might send is refused, and nothing appears beside the tree."""
    from images.layers.apply import apply

    root = {"op": "directory", "name": "", **ATTRIBUTES}
    frames = [json.dumps(x).encode() for x in (root, *HOSTILE[case], {"op": "end", "end": True, "data": 0})]
    read_end, write_end = pipe()
    sender = threading.Thread(target=_send, args=(write_end, frames))
    sender.start()
    try:
        with pytest.raises(AmbiError):
            apply(read_end, short_tmp / "tree")
    finally:
        os.close(read_end)
        sender.join()
    assert {path.name for path in short_tmp.iterdir()} <= {"tree", "tree.bodies"}
    assert list((short_tmp / "tree").iterdir()) == []


def _send(fd: int, frames: list[bytes]) -> None:
    try:
        os.write(fd, b"".join(len(frame).to_bytes(4, "little") + frame for frame in frames))
    except BrokenPipeError:
        pass
    finally:
        os.close(fd)
