"""The same promises of the engine for a VM as for a container, with the same calls."""

import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ambi.core.deadline import Deadline
from ambi.core.errors import CommandNotFound, InvalidRequest, Unsupported
from ambi.core.model import Isolation, Status
from ambi.core.roots import Roots
from ambi.engine.types import Attach, CreateSpec
from tests.harness import guest_dir
from tests.kernel.test_engine_life import Opened, attached, created, opened_with_busybox, output, read_all, shim_pid, until

pytestmark = pytest.mark.needs("qemu")


@pytest.fixture(scope="module")
def opened(busybox_tar: Path) -> Iterator[Opened]:
    base = Path(tempfile.mkdtemp(prefix="ambi-", dir="/tmp"))
    roots = Roots.of(base / "data", base / "run", base / "run" / "ambi.sock")
    for path in (roots.data, roots.run):
        path.mkdir(mode=0o711)
    roots.guest.symlink_to(guest_dir())
    with opened_with_busybox(roots, busybox_tar) as it:
        yield it
    shutil.rmtree(base)


@pytest.fixture(params=["container", "vm"])
def runtime(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def slow() -> Deadline:
    return Deadline.after(120)


def test_the_same_run(opened: Opened, runtime: str) -> None:
    script = "id -un; hostname; cat /etc/hostname; echo $A; exit 3"
    config = {"Image": "busybox", "Cmd": ["sh", "-c", script], "User": "alice", "Hostname": "box", "Env": ["A=b"]}
    id, _ = opened.engine.create(None, CreateSpec(config, {"NetworkMode": "none", "Runtime": runtime}, {}))
    assert opened.engine.get(id).isolation is Isolation(runtime)
    ticket = opened.engine.wait(id, "next-exit")
    opened.engine.start(id)
    assert ticket.result(slow()).code == 3
    assert output(opened.engine, id) == b"alice\nbox\nbox\nb\n"
    opened.engine.remove(id)
    assert not opened.roots.instance_data(id).exists() and not opened.roots.instance_run(id).exists()


def test_a_program_that_is_not_there(opened: Opened, runtime: str) -> None:
    id = created(opened.engine, "nope", Runtime=runtime)
    with pytest.raises(CommandNotFound, match="executable file not found"):
        opened.engine.start(id)
    assert opened.engine.get(id).state.exit_code == 127
    opened.engine.remove(id)


def test_execs_signals_and_usage(opened: Opened, runtime: str) -> None:
    engine = opened.engine
    id = created(engine, "sh", "-c", "trap 'exit 9' TERM; echo ready; while :; do sleep 0.1; done", Runtime=runtime)
    engine.start(id)
    until(lambda: output(engine, id) == b"ready\n", "the trap")
    exec_id = engine.exec_create(id, {"Cmd": ["sh", "-c", "cat; exit 4"], "AttachStdin": True, "AttachStdout": True})
    ours, theirs = socket.socketpair()
    with theirs:
        engine.exec_start(exec_id, Attach(True, True, True, framed=False), theirs, b"pending ", lambda: None)
    with ours:
        ours.sendall(b"then more")
        ours.shutdown(socket.SHUT_WR)
        assert read_all(ours) == b"pending then more"
    assert engine.exec_get(exec_id).exit_code == 4
    assert engine.usage(id).memory_bytes > 0
    assert any("sh -c" in row["command"] for row in engine.top(id))
    assert engine.machine(id).get("vmm") == (None if runtime == "container" else "qemu")
    engine.stop(id, 60)
    assert engine.get(id).state.exit_code == 9
    engine.start(id)
    assert engine.get(id).state.running
    engine.remove(id, force=True)


def test_the_engine_may_go_and_come_back(opened: Opened, runtime: str) -> None:
    engine = opened.engine
    id = created(engine, "sh", "-c", "read line; echo got $line; exit 5", Runtime=runtime, OpenStdin=True)
    with attached(engine, id, stdin=True) as sock:
        engine.start(id)
        engine.close()
        engine = opened.again()
        assert engine.get(id).state.running
        ticket = engine.wait(id, "next-exit")
        sock.sendall(b"it\n")
        assert ticket.result(slow()).code == 5
        assert read_all(sock) == b"got it\n"
    engine.remove(id)


def test_a_killed_shim_takes_its_instance_along(opened: Opened, runtime: str) -> None:
    engine = opened.engine
    id = created(engine, "sleep", "1000", Runtime=runtime)
    engine.start(id)
    ticket = engine.wait(id, "next-exit")
    os.kill(shim_pid(opened.roots, id), signal.SIGKILL)
    status = ticket.result(slow())
    assert (status.code, status.reason) == (137, "the shim was killed")
    assert engine.get(id).state.status is Status.EXITED
    until(lambda: not processes_naming(id), "the end of every process of the instance")
    engine.remove(id)


def processes_naming(id: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if id.encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def test_what_a_vm_cannot_share_is_refused_at_create(opened: Opened) -> None:
    for host in ({"NetworkMode": "host"}, {"PidMode": "host"}, {"Devices": [{"PathOnHost": "/dev/null"}]}):
        with pytest.raises((InvalidRequest, Unsupported), match="VM"):
            opened.engine.create(None, CreateSpec({"Image": "busybox", "Cmd": ["true"]}, {**host, "Runtime": "vm"}, {}))


def test_doctor_knows_both_drivers(opened: Opened) -> None:
    checks = {check.name: check for check in opened.engine.doctor()}
    assert checks["driver container"].status == checks["driver vm"].status == "ok"
    assert checks["layer form"].detail and checks["zygote"].status == "ok"
    assert time.time_ns() > opened.engine.info().started_ns


def test_a_vm_that_grows_says_so_at_its_next_start(opened: Opened) -> None:
    """The disk grows at once, and what was asked for is there after a restart, too."""
    disk = {"StorageOpt": {"size": "200m"}, "Runtime": "vm", "NetworkMode": "none", "NanoCpus": 2_000_000_000}
    config = {"Image": "busybox", "Cmd": ["sh", "-c", "df -k / | tail -1; nproc; exec sleep 1000"]}
    id, _ = opened.engine.create(None, CreateSpec(config, disk, {}))
    try:
        opened.engine.start(id)
        assert opened.engine.update(id, {"StorageOpt": {"size": "400m"}, "NanoCpus": 1_000_000_000}) == []
        file = opened.roots.instance_data(id) / "upper" / "disk.img"
        assert file.stat().st_size == 400 << 20
        with pytest.raises(InvalidRequest, match="cannot shrink from 400 MiB to 300 MiB"):
            opened.engine.update(id, {"StorageOpt": {"size": "300m"}})
        opened.engine.restart(id, 0)
        until(lambda: len(output(opened.engine, id).splitlines()) == 4, "what both runs say")
        before, cpus_before, after, cpus_after = (line.split() for line in output(opened.engine, id).decode().splitlines())
        assert int(after[1]) - int(before[1]) > 150 << 10 and (cpus_before, cpus_after) == (["2"], ["1"])
        assert opened.engine.get(id).spec.host["StorageOpt"] == {"size": "400m"}
    finally:
        opened.engine.remove(id, force=True)


def test_annotations_of_ours_are_checked_by_name(opened: Opened) -> None:
    for runtime, value, text in (
        ("container", "auto", "not supported for a container"),
        ("vm", "x", "vsock=x is no number"),
    ):
        with pytest.raises(InvalidRequest, match=text):
            created(opened.engine, "true", Runtime=runtime, Annotations={"ambi.vsock": value})
    id = created(opened.engine, "true", Annotations={"com.example.note": "x"})
    assert opened.engine.get(id).spec.host["Annotations"] == {"com.example.note": "x"}
    opened.engine.remove(id)
