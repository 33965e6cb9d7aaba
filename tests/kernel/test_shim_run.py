"""One run through a real zygote and shim; the driver runs local processes, so what is seen is the shim's doing."""

import base64
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ambi.core.errors import CommandNotFound, Conflict, InvalidRequest, NotFound, Unavailable
from ambi.linux import unix
from ambi.shim import client, leave, logread
from tests.shimkit import ShimLab, read_all, state, unframe, wait_gone


@pytest.fixture
def lab(short_tmp: Path) -> Iterator[ShimLab]:
    lab = ShimLab(short_tmp)
    yield lab
    lab.close()


def logged(run: object) -> bytes:
    return b"".join(entry.line for entry in logread.entries(run.plan.supervision.log))  # type: ignore[attr-defined]


def test_output_exit_and_what_is_left(lab: ShimLab) -> None:
    run = lab.launch("sh", "-c", "echo out; echo err >&2; exit 7")
    client_end = run.attach(framed=True)
    assert run.call("start")["pid"] > 1
    assert unframe(read_all(client_end)) == {1: b"out\n", 2: b"err\n"}
    assert run.exit_code() == 7
    run.wait_closed()
    status = leave.read_exit(run.plan.data_dir)
    assert status is not None and status.code == 7 and status.finished_ns > 10**18
    assert {(e.stream, e.line) for e in logread.entries(run.plan.data_dir / "log")} == {
        ("stdout", b"out\n"),
        ("stderr", b"err\n"),
    }
    assert (run.plan.data_dir / "deleted").exists(), "the driver has not been told to remove what it made"
    assert not (run.plan.run_dir / "shim.sock").exists()
    wait_gone(run.connection.pid)
    assert lab.log() == ""


def test_exit_is_on_disk_before_it_is_told(lab: ShimLab) -> None:
    run = lab.launch("true")
    seen: list[bool] = []
    run.connection._on_event = lambda body: seen.append((run.plan.data_dir / "exit.json").exists()) or run._on_event(body)
    run.call("start")
    assert run.exit_code() == 0
    assert seen == [True]


def test_half_close_gives_stdin_its_end(lab: ShimLab) -> None:
    run = lab.launch("cat", stdin=True)
    sock = run.attach(stdin=True)
    run.call("start")
    sock.sendall(b"to the end")
    sock.shutdown(socket.SHUT_WR)
    assert read_all(sock) == b"to the end"
    assert run.exit_code() == 0


def test_input_sent_before_the_start_and_with_the_request_comes_first(lab: ShimLab) -> None:
    run = lab.launch("cat", stdin=True)
    sock = run.attach(stdin=True, pending=base64.b64encode(b"one ").decode())
    sock.sendall(b"two")
    sock.shutdown(socket.SHUT_WR)
    run.call("start")
    assert read_all(sock) == b"one two"


def test_a_client_that_goes_away_at_once_has_still_typed(lab: ShimLab) -> None:
    run = lab.launch("cat", stdin=True)
    sock = run.attach(stdin=True)
    sock.sendall(b"last words\n")
    sock.close()
    run.call("start")
    assert run.exit_code() == 0
    run.wait_closed()
    assert logged(run) == b"last words\n"


def test_stdin_that_is_for_many_outlives_one_client(lab: ShimLab) -> None:
    run = lab.start("cat", stdin=True, stdin_once=False)
    first = run.attach(stdin=True)
    first.sendall(b"1\n")
    assert first.recv(10) == b"1\n"
    first.shutdown(socket.SHUT_WR)
    assert read_all(first) == b"", "docker lets the client go with its output"
    second = run.attach(stdin=True)
    second.sendall(b"2\n")
    assert second.recv(10) == b"2\n"
    run.call("signal", signal=15)
    assert run.exit_code() == 143


def test_stdin_is_not_taken_from_a_client_that_did_not_ask(lab: ShimLab) -> None:
    run = lab.start("cat", stdin=True)
    watcher, typist = run.attach(), run.attach(stdin=True)
    watcher.sendall(b"not this\n")
    typist.sendall(b"this\n")
    typist.shutdown(socket.SHUT_WR)
    assert read_all(watcher) == read_all(typist) == b"this\n"


def test_a_process_that_does_not_read_holds_back_its_client_only(lab: ShimLab) -> None:
    run = lab.start("sh", "-c", "read x < $0; cat | wc -c", str(fifo(lab)), stdin=True)
    sock = run.attach(stdin=True)
    sock.settimeout(1)
    sent = 0
    try:
        while sent < 64 << 20:
            sent += sock.send(b"x" * 65536)
    except TimeoutError:
        pass
    assert 256 << 10 <= sent < 8 << 20, f"{sent} bytes went nowhere without anybody reading them"
    assert run.exec("e", "echo", "alive").recv(100) == b"alive\n"
    (lab.base / "fifo").write_text("go\n")
    sock.settimeout(30)
    sock.shutdown(socket.SHUT_WR)
    assert read_all(sock) == b"%d\n" % sent


def fifo(lab: ShimLab) -> Path:
    os.mkfifo(lab.base / "fifo")
    return lab.base / "fifo"


def test_terminal_detach_keys_and_size(lab: ShimLab) -> None:
    run = lab.launch("sh", "-c", "stty size; stty -echo; read a; read b; echo $a-$b", stdin=True, terminal=True)
    run.call("resize", rows=33, columns=99)
    first = run.attach(stdin=True, detach_keys=[16, 17])
    run.call("start")
    assert first.recv(100) == b"33 99\r\n"
    first.sendall(b"one\n\x10x")
    first.sendall(b"\x10")
    first.sendall(b"\x11ignored")
    assert read_all(first) in (b"", b"^P", b"^Px")
    assert run.event("detach")["exec_id"] is None
    second = run.attach(stdin=True, detach_keys=[16, 17])
    second.sendall(b"\n")
    assert b"one-" in read_all(second)
    assert run.exit_code() == 0


def test_resize_of_a_running_terminal(lab: ShimLab) -> None:
    run = lab.launch("sh", "-c", "stty -echo; read a; stty size", stdin=True, terminal=True)
    sock = run.attach(stdin=True)
    run.call("start")
    run.call("resize", rows=11, columns=22)
    sock.sendall(b"\n")
    assert b"11 22\r\n" in read_all(sock)
    with pytest.raises(InvalidRequest, match="cannot have 0 rows"):
        lab.launch("true").call("resize", rows=0, columns=1)


def test_logs_come_before_what_follows(lab: ShimLab) -> None:
    run = lab.start("sh", "-c", "echo old; printf part; read x; echo new", stdin=True)
    while not logged(run):
        time.sleep(0.02)
    sock = run.attach(logs=True, stdin=True)
    only_logs = run.attach(logs=True, stream=False)
    assert read_all(only_logs) == b"old\npart"
    sock.sendall(b"\n")
    assert read_all(sock) == b"old\npartnew\n"


def test_a_stalled_client_stalls_nobody_and_loses_nothing(lab: ShimLab) -> None:
    size = 24 << 20
    run = lab.launch("sh", "-c", f"head -c {size} /dev/zero | tr '\\0' x")
    stalled, quick = run.attach(), run.attach()
    run.call("start")
    assert len(read_all(quick)) == size
    assert run.exit_code() == 0
    run.wait_closed()
    wait_gone(run.connection.pid)
    left = [int(p) for p in os.listdir("/proc") if p.isdigit() and serves(int(p), lab)]
    assert len(left) == 1, "one process serves the slow client on"
    assert os.listdir(f"/proc/{left[0]}/fd").__len__() <= 8
    assert not [p for p in run.plan.data_dir.iterdir() if "spool" in p.name]
    assert read_all(stalled) == b"x" * size
    wait_gone(left[0])


def test_every_byte_arrives_everywhere(lab: ShimLab) -> None:
    """Random bytes through stdin to stdout and stderr, with a second attacher, a stalled one and execs meanwhile."""
    block, count = os.urandom(1 << 20), 16
    run = lab.launch("tee", "/dev/stderr", stdin=True)
    typist, second, stalled = run.attach(stdin=True, framed=True), run.attach(framed=True), run.attach(framed=True)
    run.call("start")

    def type_it() -> None:
        for _ in range(count):
            typist.sendall(block)
        typist.shutdown(socket.SHUT_WR)

    typing = threading.Thread(target=type_it)
    results: dict[str, bytes] = {}
    reading = threading.Thread(target=lambda: results.update(second=read_all(second)))
    typing.start()
    reading.start()
    assert read_all(run.exec("e", "echo", "alive")) == b"alive\n"
    want = {1: block * count, 2: block * count}
    assert unframe(read_all(typist)) == want
    typing.join()
    reading.join()
    assert unframe(results["second"]) == want
    assert run.exit_code() == 0
    assert unframe(read_all(stalled)) == want
    written = {"stdout": bytearray(), "stderr": bytearray()}
    for entry in logread.entries(run.plan.data_dir / "log"):
        written[entry.stream] += entry.line
    assert written["stdout"] == want[1] and written["stderr"] == want[2]


def serves(pid: int, lab: ShimLab) -> bool:
    try:
        return str(lab.run_root).encode() in Path(f"/proc/{pid}/cmdline").read_bytes() and (
            pid != lab.zygote_pid() and state(pid) != "Z"
        )
    except OSError:
        return False


def test_a_client_that_is_cut_off_midway_costs_the_others_nothing(lab: ShimLab) -> None:
    run = lab.launch("sh", "-c", "head -c 3000000 /dev/zero")
    leaver, stayer = run.attach(), run.attach()
    run.call("start")
    leaver.recv(1000)
    leaver.close()
    assert len(read_all(stayer)) == 3_000_000
    assert run.exit_code() == 0


def test_exec_output_input_and_exit(lab: ShimLab) -> None:
    run = lab.start("sleep", "60")
    sock = run.exec("e1", "sh", "-c", "cat; echo err >&2; exit 9", stdin=True, framed=True)
    sock.sendall(b"in")
    sock.shutdown(socket.SHUT_WR)
    assert unframe(read_all(sock)) == {1: b"in", 2: b"err\n"}
    ended = run.event("exec_exit")
    assert ended["exec_id"] == "e1" and ended["exit"]["code"] == 9
    assert run.call("state")["execs"]["e1"]["exit"]["code"] == 9
    assert run.call("state")["status"] == "running"


def test_exec_of_a_missing_program_tells_caller_and_client(lab: ShimLab) -> None:
    run = lab.start("sleep", "60")
    ours, theirs = run.pair()
    with theirs, pytest.raises(CommandNotFound, match="no such file"):
        run.call("exec", exec_id="e", process={"args": ["/missing"]}, attach={"stdout": True}, fds=[theirs.fileno()])
    assert read_all(ours) == b'exec: "/missing": no such file or directory\r\n'


def test_execs_of_a_run_that_ends_end_with_it(lab: ShimLab) -> None:
    run = lab.start("sh", "-c", "read x < $0", str(fifo(lab)))
    sock = run.exec("e", "sh", "-c", "echo up; read x", stdin=True)
    assert sock.recv(10) == b"up\n"
    (lab.base / "fifo").write_text("go\n")
    assert run.exit_code() == 0
    run.wait_closed()
    assert read_all(sock) == b""


def test_output_of_a_child_that_stays_behind_is_not_waited_for_without_end(lab: ShimLab) -> None:
    run = lab.launch("sh", "-c", "sleep 60 & echo $!; exit 4")
    sock = run.attach()
    run.call("start")
    assert run.exit_code() == 4
    child = int(read_all(sock))
    os.kill(child, 9)


def test_start_that_fails_leaves_nothing(lab: ShimLab) -> None:
    run = lab.launch("/missing")
    sock = run.attach()
    with pytest.raises(CommandNotFound, match="no such file"):
        run.call("start")
    assert read_all(sock) == b""
    run.wait_closed()
    assert not (run.plan.data_dir / "exit.json").exists()
    assert run.call("delete") == {}, "a shim that is gone has been deleted"
    wait_gone(run.connection.pid)


def test_delete_of_a_running_one(lab: ShimLab) -> None:
    run = lab.launch("sh", "-c", "echo up; sleep 60")
    sock = run.attach()
    pid = run.call("start")["pid"]
    assert sock.recv(10) == b"up\n"
    assert run.call("delete") == {}
    assert run.exit_code() == 137
    assert state(pid) == "gone"
    assert read_all(sock) == b""


def test_delete_of_one_that_was_only_attached_to(lab: ShimLab) -> None:
    run = lab.launch("true")
    sock = run.attach()
    assert run.call("delete") == {}
    assert read_all(sock) == b""
    run.wait_closed()
    assert not (run.plan.data_dir / "exit.json").exists()


def test_a_shim_nobody_asks_anything_ends(lab: ShimLab) -> None:
    run = lab.launch("true")
    run.call("state")
    run.connection.close()
    wait_gone(run.connection.pid)


def test_a_second_start_and_requests_at_the_wrong_time(lab: ShimLab) -> None:
    run = lab.launch("sleep", "60")
    for op in ("usage", "processes"):
        with pytest.raises(Conflict, match="is not running"):
            run.call(op)
    with pytest.raises(Conflict, match="is not running"):
        run.call("signal", signal=9)
    run.call("start")
    with pytest.raises(Conflict, match="started already"):
        run.call("start")
    with pytest.raises(NotFound, match="no such exec"):
        run.call("signal", signal=9, exec_id="nope")
    assert run.call("usage")["pids"] == 1


def test_answers_may_be_long(lab: ShimLab) -> None:
    run = lab.start("sleep", "60", blow_up=3_000_000)
    assert len(run.call("processes")["processes"][0]["command"]) == 3_000_000
    env = [f"V{n}={'x' * 1000}" for n in range(1000)] + ["PATH=/usr/bin:/bin"]
    sock_ours, theirs = run.pair()
    with theirs:
        process = {"args": ["sh", "-c", "echo ${#V999}"], "env": env}
        run.call("exec", exec_id="e", process=process, attach={"stdout": True}, fds=[theirs.fileno()])
    assert read_all(sock_ours) == b"1000\n"


def test_bad_requests_cost_their_connection_at_most(lab: ShimLab) -> None:
    run = lab.start("sleep", "60")
    for op in ("nonsense", "exec", "signal", "resize", "attach"):
        with pytest.raises(InvalidRequest):
            run.call(op)
    for data in (b"not json", b"[1]", b"\0", b'{"memfd":5}', b"x" * 200_000):
        with unix.connect(run.plan.run_dir / "shim.sock") as other:
            other.send(data)
            other.settimeout(30)
            assert other.recv(100) == b""
    assert run.call("state")["status"] == "running"
    assert not run.connection.closed


def test_a_connection_that_is_not_read_is_ended(lab: ShimLab) -> None:
    run = lab.start("sleep", "60")
    with unix.connect(run.plan.run_dir / "shim.sock") as deaf:
        deaf.settimeout(30)
        with pytest.raises(OSError):  # its queue is full of answers, then it is closed
            for n in range(100_000):
                unix.send(deaf, {"op": "state", "seq": n})
        answers = 0
        while deaf.recv(10_000):
            answers += 1
        assert answers > 0
    assert run.call("state")["status"] == "running"


def test_adoption(lab: ShimLab) -> None:
    run = lab.launch("sh", "-c", "read x < $0; exit 5", str(fifo(lab)))
    run.call("start")
    run.connection.close()
    run.wait_closed()
    with pytest.raises(Unavailable, match="has ended"):
        run.call("state")
    events: list[dict[str, object]] = []
    adopted = client.connect(run.plan.id, run.plan.run_dir, on_event=events.append)
    assert adopted is not None and adopted.call("state")["status"] == "running"
    body = json.loads((run.plan.run_dir / "shim.json").read_text())
    assert body["pid"] == adopted.pid and body["version"] == 1
    (lab.base / "fifo").write_text("go\n")
    wait_gone(adopted.pid)
    assert leave.read_exit(run.plan.data_dir) is not None
    assert client.connect(run.plan.id, run.plan.run_dir) is None
