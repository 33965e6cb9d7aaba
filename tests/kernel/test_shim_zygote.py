"""The zygote as it is really started: what it runs from, what it carries, and that bad input costs it nothing."""

import os
import shutil
import socket
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from ambi.core.errors import InvalidRequest, Unavailable
from ambi.linux import mount, process, unix
from ambi.shim import launch
from ambi.shim.client import ZygoteClient
from tests.shimkit import ShimLab, state, wait_gone

ROOT = Path(__file__).parents[2]
RSS_LIMIT_KIB = 16 << 10


@pytest.fixture
def zygote(short_tmp: Path) -> Iterator[ZygoteClient]:
    zygote = ZygoteClient(short_tmp)
    yield zygote
    pid = zygote.ping()["pid"]
    zygote.stop()
    wait_gone(pid)


def test_it_runs_from_a_file_that_cannot_be_written(zygote: ZygoteClient) -> None:
    pid = zygote.ping()["pid"]
    exe = os.open(f"/proc/{pid}/exe", os.O_RDONLY)
    try:
        assert os.fstatvfs(exe).f_flag & os.ST_RDONLY
        assert os.path.samestat(os.fstat(exe), os.stat(sys.executable))
        with pytest.raises(OSError):
            os.open(f"/proc/self/fd/{exe}", os.O_WRONLY)
    finally:
        os.close(exe)


def test_what_it_holds(zygote: ZygoteClient) -> None:
    pid = zygote.ping()["pid"]
    assert os.readlink(f"/proc/{pid}/ns/mnt") != os.readlink("/proc/self/ns/mnt")
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert os.getsid(pid) != os.getsid(0)
    assert Path(f"/proc/{pid}/comm").read_text() == "ambi-zygote\n"
    held = {number: os.readlink(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd")}
    assert held["0"] == held["1"] == "/dev/null" and held["2"] == str(zygote.run_root / "zygote.log")
    others = [target for number, target in held.items() if int(number) > 2]
    assert all(target.startswith(("mnt:", "pipe:", "socket:")) for target in others), held
    assert os.readlink("/proc/self/ns/mnt") in others, "the engines' namespace, to start one in"


def test_its_memory(zygote: ZygoteClient) -> None:
    status = Path(f"/proc/{zygote.ping()['pid']}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    assert fields["Threads"].strip() == "1"
    assert int(fields["VmRSS"].split()[0]) < RSS_LIMIT_KIB


def test_shims_are_not_dumpable(short_tmp: Path) -> None:
    """Else a process with the same ids could trace them and follow their /proc links."""
    lab = ShimLab(short_tmp)
    try:
        assert lab.start("sleep", "60").call("processes")["processes"][0]["shim_dumpable"] == 0
    finally:
        lab.close()


def test_what_it_loads() -> None:
    code = "import ambi.shim.zygote, ambi.shim.drivers as d, sys; print(d.preload()); print(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    failures, *modules = done.stdout.splitlines()
    assert failures == "{}"
    assert {"runtime.driver", "hyper.driver"} <= set(modules)
    heavy = {"asyncio", "concurrent.futures", "dataclasses", "hashlib", "inspect", "logging", "secrets", "sqlite3", "ssl"}
    assert not heavy & set(modules)
    assert not {"subprocess", "threading", "traceback", "tokenize", "ambi.shim.client"} & set(modules)


def test_it_works_from_an_installed_copy(short_tmp: Path) -> None:
    """As a wheel lies: packages in the site directory of a virtual environment, nothing of this checkout in the path."""
    home = short_tmp / "venv"
    venv.create(home, symlinks=True)
    site = next(home.glob("lib/python*/site-packages"))
    for package in ("ambi", "runtime", "hyper"):
        shutil.copytree(ROOT / package, site / package, ignore=shutil.ignore_patterns("__pycache__"))
    run = short_tmp / "run"
    run.mkdir()
    code = "import sys, pathlib; from ambi.shim.launch import ensure; ensure(pathlib.Path(sys.argv[1]))"
    subprocess.run([home / "bin/python", "-I", "-c", code, run], check=True, cwd="/")
    zygote = ZygoteClient(run)
    pid = zygote.ping()["pid"]
    assert Path(f"/proc/{pid}/cmdline").read_bytes().startswith(bytes(home / "bin/python") + b"\0")
    maps = Path(f"/proc/{pid}/maps").read_text()
    assert str(ROOT) not in maps
    assert (run / "zygote.log").read_text() == "", "a driver was not found"
    zygote.stop()
    wait_gone(pid)


def test_a_start_that_fails_says_why(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.sys, "executable", "/bin/false")
    with pytest.raises(Unavailable, match="did not start"):
        launch.ensure(short_tmp)
    monkeypatch.setattr(launch.sys, "executable", "/nonexistent/python")
    with pytest.raises(Unavailable, match="cannot start the zygote"):
        launch.ensure(short_tmp)


@pytest.mark.parametrize(
    "data", [b"x", b"[]", b"{", b"\xff" * 1000, b'{"memfd": 7}', b'{"memfd": -1, "op": "ping"}', b"1" * 5000]
)
def test_garbage_ends_that_connection_only(zygote: ZygoteClient, data: bytes) -> None:
    pid = zygote.ping()["pid"]
    with unix.connect(zygote.run_root / "zygote.sock") as sock:
        sock.send(data)
        sock.settimeout(30)
        assert sock.recv(100) == b""
    assert zygote.ping()["pid"] == pid


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"op": None},
        {"op": ["spawn"]},
        {"op": "spawn"},
        {"op": "spawn", "id": "x", "isolation": "container", "data_dir": "relative", "run_dir": "/r", "run_root": "/r"},
        {"op": "spawn", "id": "x", "isolation": "jail", "data_dir": "/d", "run_dir": "/r", "run_root": "/r"},
        {"op": "spawn", "id": "x", "isolation": "container", "data_dir": "/d", "run_dir": "/r", "run_root": "/r"},
        {"op": "spawn", "id": 5, "isolation": "container", "data_dir": "/d", "run_dir": "/r", "run_root": "/r"},
        {"op": "forget"},
        {"op": "forget", "layers": "abc"},
        {"op": "forget", "layers": ["../../etc"]},
        {"op": "forget", "layers": [".."]},
        {"op": "forget", "layers": [""]},
        {"op": "forget", "layers": ["a\0b"]},
    ],
)
def test_wrong_requests_are_refused(zygote: ZygoteClient, body: dict[str, object]) -> None:
    pid = zygote.ping()["pid"]
    with pytest.raises(InvalidRequest):
        zygote._call(body)
    assert zygote.ping()["pid"] == pid


def test_unwanted_descriptors_do_not_stay(zygote: ZygoteClient) -> None:
    pid = zygote.ping()["pid"]
    before = len(os.listdir(f"/proc/{pid}/fd"))
    for _ in range(50):
        with pytest.raises(InvalidRequest):
            zygote._call({"op": "nonsense"}, [0, 1, 2])
    with unix.connect(zygote.run_root / "zygote.sock") as sock:
        socket.send_fds(sock, [b"garbage"], [0] * 30)
        sock.settimeout(30)
        assert sock.recv(10) == b""
    assert zygote.ping()["pid"] == pid
    assert len(os.listdir(f"/proc/{pid}/fd")) <= before


def test_more_connections_than_it_keeps(zygote: ZygoteClient) -> None:
    pid = zygote.ping()["pid"]
    socks = [unix.connect(zygote.run_root / "zygote.sock") for _ in range(100)]
    assert zygote.ping()["pid"] == pid
    for sock in socks:
        sock.close()
    assert zygote.ping()["pid"] == pid


def test_forget_unmounts_what_is_not_read(zygote: ZygoteClient) -> None:
    namespace = os.open(f"/proc/{zygote.ping()['pid']}/ns/mnt", os.O_RDONLY)
    layers = zygote.run_root / "layers"
    go_read, go_write = os.pipe()
    ready_read, ready_write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            process.setns(namespace, process.CLONE_NEWNS)
            for name in ("idle", "busy"):
                (layers / name).mkdir()
                mount.mount("test", layers / name, "tmpfs")
            held = os.open(layers / "busy", os.O_RDONLY)
            os.write(ready_write, b"!")
            os.read(go_read, 1)
            os.close(held)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(namespace)
    assert os.read(ready_read, 1) == b"!"
    assert zygote.forget(["idle", "busy", "never"]) == ["idle", "never"]
    assert sorted(p.name for p in layers.iterdir()) == ["busy"]
    os.write(go_write, b"!")
    assert os.waitpid(child, 0)[1] == 0
    assert zygote.forget(["busy"]) == ["busy"]
    for fd in (go_read, go_write, ready_read, ready_write):
        os.close(fd)


def test_layers_do_not_show_on_the_host(zygote: ZygoteClient) -> None:
    zygote.ping()
    assert str(zygote.run_root) not in Path("/proc/self/mountinfo").read_text()


def test_one_of_another_version_is_replaced(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zygote = ZygoteClient(short_tmp)
    first = zygote.ping()["pid"]
    zygote.close()
    monkeypatch.setattr(launch.record, "VERSION", 0)
    with pytest.raises(ConnectionRefusedError, match="another version"):
        launch.connect(short_tmp)
    wait_gone(first)
    monkeypatch.undo()
    assert zygote.ping()["pid"] != first
    zygote.stop()


def test_stop_leaves_shims_running(short_tmp: Path) -> None:
    lab = ShimLab(short_tmp)
    try:
        run = lab.start("sleep", "60")
        pid = lab.zygote_pid()
        ZygoteClient(lab.run_root).stop()
        wait_gone(pid)
        assert run.call("state")["status"] == "running"
        assert state(run.connection.pid) != "gone"
    finally:
        lab.close()


def test_it_reaps(short_tmp: Path) -> None:
    lab = ShimLab(short_tmp)
    try:
        runs = [lab.start("true") for _ in range(5)]
        for run in runs:
            run.wait_closed()
            wait_gone(run.connection.pid)
        assert lab.start("true").exit_code() == 0
        children = Path(f"/proc/{lab.zygote_pid()}/task/{lab.zygote_pid()}/children").read_text().split()
        assert not {str(run.connection.pid) for run in runs} & set(children)
    finally:
        lab.close()
