"""The host's side of the guest protocol against a peer that is slow, wrong or hostile. The peer is the test itself."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator

import pytest

from ambi.core.deadline import Deadline
from ambi.core.errors import CommandNotFound, DeadlineExceeded, Unavailable
from ambi.core.loop import Loop
from ambi.core.model import ExitStatus
from hyper.guest.protocol import (
    HEADER,
    INITIAL_CREDIT,
    MAGIC,
    SYNC,
    Fields,
    Type,
    encode,
    encode_raw,
)
from hyper.vm.guest_process import GuestProcess
from hyper.vm.link import STUCK_BYTES, Link

SYNCED = encode(Type.SYNCED, 0)
SOON = 10.0


class Peer:
    """A guest's end of the connection, and what the link reports."""

    def __init__(self) -> None:
        self.loop = Loop()
        ours, self.sock = socket.socketpair()
        self.hangup, self.vmm = os.pipe()
        self.lost_reasons: list[str] = []
        self.logged: list[str] = []
        self.link = Link(self.loop, ours, self.hangup, self)

    def lost(self, reason: str) -> None:
        self.lost_reasons.append(reason)

    def log(self, text: str) -> None:
        self.logged.append(text)

    def meet(self) -> None:
        self.sock.sendall(SYNCED)
        self.link.sync(Deadline.after(SOON))
        assert self.take(len(SYNC)) == SYNC

    def take(self, count: int) -> bytes:
        """The next `count` bytes that the host sent."""
        data = b""
        while len(data) < count:
            data += self.sock.recv(count - len(data))
        return data

    def frame(self) -> tuple[int, int, bytes]:
        """The next frame of the host: type, id, body."""
        magic, length, kind, _, ident = HEADER.unpack(self.take(HEADER.size))
        assert magic == MAGIC
        return kind, ident, self.take(length)

    def turn(self) -> None:
        """Let the host serve all that is there now."""
        for _ in range(20):
            self.loop.step(Deadline.after(0))

    def close(self) -> None:
        self.link.close()
        self.sock.close()
        for fd in {self.hangup, self.vmm} - {-1}:
            os.close(fd)


@pytest.fixture
def peer() -> Iterator[Peer]:
    made = Peer()
    yield made
    made.close()


def process(peer: Peer, *, terminal: bool = False, stdin: bool = False) -> Iterator[GuestProcess]:
    made = GuestProcess(peer.loop, peer.link, 1, terminal=terminal, stdin=stdin)
    yield made
    made.abandon()


@pytest.fixture
def quiet(peer: Peer) -> Iterator[GuestProcess]:
    peer.meet()
    yield from process(peer)


@pytest.fixture
def talker(peer: Peer) -> Iterator[GuestProcess]:
    peer.meet()
    yield from process(peer, stdin=True)


@pytest.fixture
def tty(peer: Peer) -> Iterator[GuestProcess]:
    peer.meet()
    yield from process(peer, terminal=True)


def test_noise_before_the_agent_is_dropped(peer: Peer) -> None:
    peer.sock.sendall(b"\0" * 5000 + b"SeaBIOS" + SYNCED)
    peer.link.sync(Deadline.after(SOON))
    assert not peer.lost_reasons


def test_answer_error_and_log(peer: Peer) -> None:
    peer.meet()
    first, second = peer.link.request(Type.STATS), peer.link.request(Type.PING)
    ids = [peer.frame()[1], peer.frame()[1]]
    peer.sock.sendall(encode(Type.LOG, 0, ((1, "hello"),)))
    peer.sock.sendall(encode(Type.ERROR, ids[1], ((1, "CommandNotFound"), (2, "gone\x1b[2J"), (3, ""))))
    peer.sock.sendall(encode(Type.OK, ids[0], ((1, 42),)))
    assert peer.link.wait(first, Deadline.after(SOON), "it").fields.number(1) == 42
    with pytest.raises(CommandNotFound, match=r"gone\?\[2J"):
        peer.link.wait(second, Deadline.after(SOON), "it")
    assert peer.logged == ["hello"]


def test_silence_is_a_deadline(peer: Peer) -> None:
    with pytest.raises(DeadlineExceeded):
        peer.link.sync(Deadline.after(0.05))


def test_answers_before_the_end_of_the_vmm_count(peer: Peer) -> None:
    peer.meet()
    answer = peer.link.request(Type.PING)
    ident = peer.frame()[1]
    peer.sock.sendall(encode(Type.OK, ident))
    os.close(peer.vmm)
    peer.vmm = -1
    assert peer.link.wait(answer, Deadline.after(SOON), "it").kind is Type.OK


def test_end_of_the_vmm_fails_what_waits(peer: Peer) -> None:
    peer.meet()
    answer = peer.link.request(Type.PING)
    os.close(peer.vmm)
    peer.vmm = -1
    with pytest.raises(Unavailable):
        peer.link.wait(answer, Deadline.after(SOON), "the agent")
    assert len(peer.lost_reasons) == 1


@pytest.mark.parametrize(
    "bad",
    [
        b"x" * 64,
        HEADER.pack(MAGIC, 70_000, Type.OK, 0, 1),
        HEADER.pack(MAGIC, 0, Type.RUN, 0, 1),
        encode(Type.OK, 77),
        encode_raw(Type.LOG, 0, b"\1\0\0\0\xff\xff\xff\xff"),
    ],
    ids=["magic", "length", "type", "unasked", "field"],
)
def test_a_wrong_frame_ends_the_vm(peer: Peer, bad: bytes) -> None:
    peer.meet()
    peer.sock.sendall(bad)
    peer.turn()
    assert len(peer.lost_reasons) == 1


def test_output_and_its_end(peer: Peer, quiet: GuestProcess) -> None:
    peer.sock.sendall(encode_raw(Type.STDOUT, 1, b"out") + encode_raw(Type.STDERR, 1, b"err") + encode(Type.STDOUT_END, 1))
    peer.turn()
    assert os.read(quiet.streams.stdout, 10) == b"out" and os.read(quiet.streams.stdout, 10) == b""
    assert quiet.streams.stderr is not None and os.read(quiet.streams.stderr, 10) == b"err"


def test_more_output_than_credit_ends_the_vm(peer: Peer, quiet: GuestProcess) -> None:
    chunk = encode_raw(Type.STDOUT, 1, b"x" * 32768)
    for _ in range(2 * INITIAL_CREDIT // 32768):  # a pipe takes some of it, which gives credit back
        peer.sock.sendall(chunk)
        peer.turn()
    assert peer.lost_reasons == ["the guest sent more output than it may"]


def test_credit_comes_back_as_the_reader_takes(peer: Peer, quiet: GuestProcess) -> None:
    total = 4 * INITIAL_CREDIT
    allowed, sent, taken = INITIAL_CREDIT, 0, 0
    peer.sock.setblocking(False)
    for _ in range(10_000):
        if taken == total:
            break
        count = min(allowed, 16384, total - sent)
        if count:
            peer.sock.send(encode_raw(Type.STDOUT, 1, b"x" * count))
            sent, allowed = sent + count, allowed - count
        peer.turn()
        try:
            taken += len(os.read(quiet.streams.stdout, 65536))
        except BlockingIOError:
            pass
        while select.select([peer.sock], [], [], 0)[0]:
            kind, _, body = peer.frame()
            assert kind == Type.CREDIT and Fields(body).number(1) == 1
            allowed += Fields(body).number(2)
    assert taken == total and not peer.lost_reasons


def test_reader_that_went_away_does_not_stall_the_guest(peer: Peer, quiet: GuestProcess) -> None:
    os.close(quiet.streams.stdout)
    quiet.streams = quiet.streams._replace(stdout=os.open("/dev/null", os.O_RDONLY))
    peer.sock.sendall(encode_raw(Type.STDOUT, 1, b"x" * 65536) * 2)
    peer.turn()
    kind, ident, body = peer.frame()
    assert (kind, ident, Fields(body).number(2) >= 65536) == (Type.CREDIT, 1, True)


def test_stdin_flows_after_the_start_and_within_credit(peer: Peer, talker: GuestProcess) -> None:
    assert talker.streams.stdin is not None
    os.write(talker.streams.stdin, b"early")
    peer.turn()
    assert not select.select([peer.sock], [], [], 0)[0]
    talker.started(100)
    peer.turn()
    assert peer.frame() == (Type.STDIN, 1, b"early")
    sent = 5
    for _ in range(100):
        try:
            os.write(talker.streams.stdin, b"y" * 4096)
        except BlockingIOError:
            break
        peer.turn()
        while select.select([peer.sock], [], [], 0)[0]:
            sent += len(peer.frame()[2])
    assert sent == INITIAL_CREDIT
    peer.sock.sendall(encode(Type.STDIN_CREDIT, 1, ((1, 100),)))
    peer.turn()
    assert len(peer.frame()[2]) == 100


def test_end_of_stdin(peer: Peer, talker: GuestProcess) -> None:
    assert talker.streams.stdin is not None
    talker.started(100)
    os.close(talker.streams.stdin)
    talker.streams = talker.streams._replace(stdin=None)
    peer.turn()
    assert peer.frame()[0] == Type.CLOSE_STDIN


def test_exit_is_told_once_from_the_loop(peer: Peer, quiet: GuestProcess) -> None:
    told: list[ExitStatus] = []
    quiet.on_exit = told.append
    end = encode(Type.STDOUT_END, 1) + encode(Type.STDERR_END, 1)
    peer.sock.sendall(encode_raw(Type.STDOUT, 1, b"last") + end + encode(Type.EXITED, 1, ((1, 3), (2, 1))) * 2)
    peer.turn()
    assert [(status.code, status.oom_killed) for status in told] == [(3, True)]
    assert os.read(quiet.streams.stdout, 10) == b"last" and os.read(quiet.streams.stdout, 10) == b""


def test_terminal_reads_to_its_end_though_input_was_left(peer: Peer, tty: GuestProcess) -> None:
    assert tty.streams.stdin == tty.streams.stdout and tty.streams.stderr is None
    os.write(tty.streams.stdout, b"typed and never read")
    peer.sock.sendall(encode_raw(Type.STDOUT, 1, b"$ ") + encode(Type.STDOUT_END, 1))
    peer.turn()
    assert os.read(tty.streams.stdout, 10) == b"$ " and os.read(tty.streams.stdout, 10) == b""


def test_guest_that_reads_nothing_ends_the_vm(peer: Peer) -> None:
    peer.meet()
    entry = ((1, b"x" * 30_000),) * 34
    for _ in range(STUCK_BYTES // 1_000_000 + 3):
        peer.link.tell(Type.PING, 5, entry)
    assert peer.lost_reasons == ["the guest does not read what it is sent"]


def test_loss_ends_the_process_behind_its_output(peer: Peer, quiet: GuestProcess) -> None:
    told: list[ExitStatus] = []
    quiet.on_exit = told.append
    peer.sock.sendall(encode_raw(Type.STDOUT, 1, b"before"))
    peer.turn()
    quiet.lost(137, "the VMM was killed")
    peer.turn()
    assert [(status.code, status.reason) for status in told] == [(137, "the VMM was killed")]
    assert os.read(quiet.streams.stdout, 10) == b"before" and os.read(quiet.streams.stdout, 10) == b""
