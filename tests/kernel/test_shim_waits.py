"""Clients that wait for the end of a run are answered by its shim when the engine that handed them over is gone."""

import fcntl
import os
import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ambi.core.deadline import Deadline
from ambi.core.errors import InvalidRequest
from ambi.shim import client
from tests.shimkit import Run, ShimLab, read_all, wait_gone

ANSWER = b'11\r\n{"StatusCode":7}\n\r\n0\r\n\r\n'  # Docker's, chunked


@pytest.fixture
def lab(short_tmp: Path) -> Iterator[ShimLab]:
    lab = ShimLab(short_tmp)
    yield lab
    lab.close()


def waiting(run: Run, **fields: object) -> socket.socket:
    """A client's end, whose other end the shim has a copy of, and nobody else."""
    ours, theirs = run.pair()
    with theirs:
        run.call("wait", fds=[theirs.fileno()], **{"chunked": True, **fields})
    return ours


def test_the_shim_answers_for_an_engine_that_is_gone(lab: ShimLab) -> None:
    run = lab.launch("sh", "-c", "read line; exit 7", stdin=True)
    before_start = waiting(run)
    run.call("start")
    while_running, unframed = waiting(run), waiting(run, chunked=False)
    stdin = run.attach(stdin=True)
    run.connection.close()
    run.wait_closed()
    stdin.sendall(b"go\n")
    assert [read_all(sock) for sock in (before_start, while_running, unframed)] == [ANSWER, ANSWER, b'{"StatusCode":7}\n']
    assert (run.plan.data_dir / "deleted").exists(), "the answer came before the driver had removed the run"
    wait_gone(run.connection.pid)


def test_the_shim_leaves_the_answer_to_an_engine_that_lives(lab: ShimLab) -> None:
    run = lab.launch("sh", "-c", "exit 7")
    sock = waiting(run)
    run.call("start")
    assert run.exit_code() == 7
    assert read_all(sock) == b""


def test_another_engine_does_not_answer_for_the_one_that_is_gone(lab: ShimLab) -> None:
    run = lab.launch("sh", "-c", "read line; exit 7", stdin=True)
    first = waiting(run)
    run.call("start")
    stdin = run.attach(stdin=True)
    run.connection.close()
    run.wait_closed()
    successor = client.connect(run.plan.id, run.plan.run_dir)
    assert successor is not None
    ours, theirs = run.pair()
    with theirs:
        successor.call("wait", fds=[theirs.fileno()], chunked=True, by=Deadline.after(30))
    stdin.sendall(b"go\n")
    assert (read_all(first), read_all(ours)) == (ANSWER, b"")
    successor.close()


def test_a_client_that_has_gone_is_let_go(lab: ShimLab) -> None:
    run = lab.start("sleep", "60")
    held = Path(f"/proc/{run.connection.pid}/fd")
    before = len(list(held.iterdir()))
    sock = waiting(run)
    assert len(list(held.iterdir())) == before + 1
    sock.close()
    end = time.monotonic() + 10
    while len(list(held.iterdir())) > before:
        assert time.monotonic() < end, "the shim holds the socket of a client that has gone"
        time.sleep(0.05)


def test_a_client_that_has_only_ended_its_side_still_waits(lab: ShimLab) -> None:
    run = lab.start("sh", "-c", "read line; exit 7", stdin=True)
    sock, stdin = waiting(run), run.attach(stdin=True)
    sock.shutdown(socket.SHUT_WR)
    run.connection.close()
    run.wait_closed()
    stdin.sendall(b"go\n")
    assert read_all(sock) == ANSWER


def test_the_flags_of_the_socket_stay_the_engines(lab: ShimLab) -> None:
    run = lab.start("sleep", "60")
    ours, theirs = run.pair()
    with theirs:
        run.call("wait", fds=[theirs.fileno()], chunked=True)
        run.call("state")
        assert theirs.getblocking() and not select.select([ours], [], [], 0)[0]
        assert not fcntl.fcntl(theirs.fileno(), fcntl.F_GETFL) & os.O_NONBLOCK


@pytest.mark.parametrize("fields", [{}, {"chunked": 1}, {"chunked": None}])
def test_what_is_no_wait_is_refused(lab: ShimLab, fields: dict[str, object]) -> None:
    run = lab.start("sleep", "60")
    ours, theirs = run.pair()
    with theirs, pytest.raises(InvalidRequest, match="chunked"):
        run.call("wait", fds=[theirs.fileno()], **fields)
    assert read_all(ours) == b""
    with pytest.raises(InvalidRequest, match="one descriptor"):
        run.call("wait", chunked=True)
