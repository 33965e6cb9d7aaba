"""What a kill -9 of zygote, shim or engine may cost, as the design's table says."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ambi.core.errors import Unavailable
from ambi.linux import unix
from ambi.shim import leave, logread
from tests.shimkit import Run, ShimLab, read_all, start_zygote, state, wait_gone

ENGINE = """
import json, os, sys
sys.path.insert(0, {root!r})
from ambi.linux import unix
listener = unix.listen({run!r} + "/notify.sock")
sock, _ = listener.accept()
body = unix.receive(sock).body
unix.send(sock, {{"ok": {{}}}})
facts = {{"body": body, "mnt": os.readlink("/proc/self/ns/mnt"), "sid": os.getsid(0), "pid": os.getpid(),
         "fds": sorted(os.readlink(f"/proc/self/fd/{{n}}") for n in (0, 1, 2)), "cwd": os.getcwd()}}
with open({run!r} + "/facts", "w") as file:
    json.dump(facts, file)
os.rename({run!r} + "/facts", {run!r} + "/facts.json")
"""


@pytest.fixture
def lab(short_tmp: Path) -> Iterator[ShimLab]:
    lab = ShimLab(short_tmp)
    yield lab
    lab.close()


def waiting(lab: ShimLab) -> tuple[Run, Path]:
    """A run that ends with status 3 when something is written to the fifo."""
    fifo = lab.base / "fifo"
    os.mkfifo(fifo)
    return lab.start("sh", "-c", f"echo up; read x < {fifo}; echo $x; exit 3"), fifo


def test_killed_zygote_costs_nothing(lab: ShimLab) -> None:
    run, fifo = waiting(lab)
    namespace = os.readlink(f"/proc/{run.connection.pid}/ns/mnt")
    old = lab.zygote_pid()
    os.kill(old, signal.SIGKILL)
    wait_gone(old)
    assert read_all(run.exec("e", "echo", "alive")) == b"alive\n"
    start_zygote(lab.run_root)
    assert lab.zygote_pid() != old
    assert os.readlink(f"/proc/{lab.zygote_pid()}/ns/mnt") == namespace, "the layers namespace is that of the living shim"
    assert lab.start("sh", "-c", "exit 6").exit_code() == 6
    fifo.write_text("done\n")
    assert run.exit_code() == 3


def test_a_zygote_that_was_killed_is_started_again_by_whoever_needs_it(short_tmp: Path) -> None:
    from ambi.shim.client import ZygoteClient

    zygote = ZygoteClient(short_tmp)
    try:
        first = zygote.ping()["pid"]
        os.kill(first, signal.SIGKILL)
        wait_gone(first)
        second = zygote.ping()["pid"]
        assert second != first and state(second) != "gone"
    finally:
        zygote.stop()
    wait_gone(second)


def test_killed_shim_takes_its_instance_along_and_keeps_what_was_read(lab: ShimLab) -> None:
    run, _ = waiting(lab)
    sock = run.attach(logs=True)
    assert sock.recv(10) == b"up\n"
    init = run.call("state")["pid"]
    os.kill(run.connection.pid, signal.SIGKILL)
    run.wait_closed()
    wait_gone(init)
    assert sock.recv(10) == b""
    assert leave.read_exit(run.plan.data_dir) is None, "that is how the engine knows"
    assert [e.line for e in logread.entries(run.plan.data_dir / "log")] == [b"up\n"]
    with pytest.raises(Unavailable, match="has ended"):
        run.call("state")
    assert lab.start("true").exit_code() == 0


def test_an_exit_without_connection_is_told_to_the_engine_that_listens(lab: ShimLab) -> None:
    run, fifo = waiting(lab)
    with unix.listen(lab.run_root / "notify.sock") as listener:
        listener.settimeout(30)
        run.connection.close()
        run.wait_closed()
        fifo.write_text("done\n")
        sock, _ = listener.accept()
        with sock:
            message = unix.receive(sock)
            assert message is not None
            assert message.body["event"] == "exit" and message.body["id"] == run.plan.id
            assert message.body["exit"]["code"] == 3
            assert leave.read_exit(run.plan.data_dir) is not None
        wait_gone(run.connection.pid)


def test_an_exit_that_nobody_hears_starts_an_engine(lab: ShimLab) -> None:
    run, fifo = waiting(lab)
    script = ENGINE.format(root=str(Path(__file__).parents[2]), run=str(lab.run_root))
    (lab.run_root / "engine.json").write_text(json.dumps({"argv": [sys.executable, "-c", script]}))
    run.connection.close()
    run.wait_closed()
    fifo.write_text("done\n")
    facts = wait_for_json(lab.run_root / "facts.json")
    assert facts["body"]["id"] == run.plan.id and facts["body"]["exit"]["code"] == 3
    assert facts["mnt"] == os.readlink("/proc/self/ns/mnt"), "not in the layers namespace"
    assert facts["sid"] not in (os.getsid(0), facts["pid"]) and facts["fds"] == ["/dev/null"] * 3 and facts["cwd"] == "/"
    wait_gone(run.connection.pid)
    wait_gone(facts["pid"])


def wait_for_json(path: Path) -> dict[str, Any]:
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end, f"{path} does not appear"
        time.sleep(0.05)
    return dict(json.loads(path.read_text()))


@pytest.mark.parametrize("text", [None, "", "[]", '{"argv": []}', '{"argv": ["/nonexistent"]}', '{"argv": [1]}'])
def test_an_exit_is_left_on_disk_when_there_is_no_engine(lab: ShimLab, text: str | None) -> None:
    run, fifo = waiting(lab)
    if text is not None:
        (lab.run_root / "engine.json").write_text(text)
    run.connection.close()
    run.wait_closed()
    fifo.write_text("done\n")
    wait_gone(run.connection.pid)
    status = leave.read_exit(run.plan.data_dir)
    assert status is not None and status.code == 3
    assert (run.plan.data_dir / "deleted").exists()


def test_clients_stay_attached_when_the_engine_is_killed(lab: ShimLab) -> None:
    run, fifo = waiting(lab)
    sock = run.attach(logs=True)
    assert sock.recv(10) == b"up\n"
    run.connection.close()
    run.wait_closed()
    fifo.write_text("done\n")
    assert read_all(sock) == b"done\n"
