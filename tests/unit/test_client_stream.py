"""Frames, detach keys, and the pump between a process's stream and our own descriptors."""

from __future__ import annotations

import os
import random
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ambi.client.client import Hijacked
from ambi.client.stream import DetachKeys, Frames, Session
from ambi.core.errors import Internal


def frame(stream: int, payload: bytes) -> bytes:
    return bytes([stream, 0, 0, 0]) + len(payload).to_bytes(4, "big") + payload


def test_frames_in_pieces_of_any_size() -> None:
    chance = random.Random(1)
    parts = [(chance.choice((1, 2)), chance.randbytes(chance.choice((0, 1, 7, 8, 9, 5000)))) for _ in range(200)]
    data = b"".join(frame(*part) for part in parts)
    want = {stream: b"".join(p for s, p in parts if s == stream) for stream in (1, 2)}
    for step in (1, 3, 8, 4096, len(data)):
        frames, found = Frames(), {1: b"", 2: b""}
        for start in range(0, len(data), step):
            for stream, part in frames.feed(data[start : start + step]):
                found[stream] += part
        assert found == want, step


@pytest.mark.parametrize("header", [b"\x03\0\0\0\0\0\0\1", b"\x01\1\0\0\0\0\0\1", b"HTTP/1.1"])
def test_a_stream_that_is_not_framed_is_refused(header: bytes) -> None:
    with pytest.raises(Internal, match="broken stream"):
        list(Frames().feed(header))


@pytest.mark.parametrize(
    "typed,sent,detached",
    [
        ([b"abc"], b"abc", False),
        ([b"a\x10\x11b"], b"a", True),
        ([b"a\x10", b"\x11"], b"a", True),
        ([b"\x10", b"x"], b"\x10x", False),
        ([b"\x10\x10\x11"], b"\x10", True),
        ([b"\x11\x10"], b"\x11", False),
    ],
)
def test_detach_keys(typed: list[bytes], sent: bytes, detached: bool) -> None:
    keys = DetachKeys(b"\x10\x11")
    results = [keys.feed(data) for data in typed]
    assert b"".join(data for data, _ in results) == sent
    assert results[-1][1] is detached


def test_no_detach_keys_let_everything_through() -> None:
    assert DetachKeys(b"").feed(b"\x10\x11") == (b"\x10\x11", False)


class Peer:
    """The engine's end of an attached stream, and pipes for what a session reads and prints."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.stdin_read, self.stdin = os.pipe()
        pipes = [os.pipe(), os.pipe()]
        self.ends: tuple[int, ...] = (pipes[0][1], pipes[1][1])
        self.printed = {1: b"", 2: b""}
        self._readers = [threading.Thread(target=self._drain, args=(n, read)) for n, (read, _) in enumerate(pipes, 1)]
        for reader in self._readers:
            reader.start()

    def _drain(self, fd: int, read: int) -> None:
        while data := os.read(read, 65536):
            self.printed[fd] += data
        os.close(read)

    def type(self, data: bytes, *, end: bool = False) -> None:
        if data:
            os.write(self.stdin, data)
        if end:
            os.close(self.stdin)
            self.stdin = -1

    def output(self) -> dict[int, bytes]:
        """What was printed on stdout and stderr; nothing more can be."""
        for fd in self.ends:
            os.close(fd)
        self.ends = ()
        for reader in self._readers:
            reader.join()
        return self.printed

    def close(self) -> None:
        if self.ends:
            self.output()
        for fd in (self.stdin, self.stdin_read):
            if fd >= 0:
                os.close(fd)
        self.ours.close()
        self.theirs.close()


@pytest.fixture
def peer() -> Iterator[Peer]:
    it = Peer()
    yield it
    it.close()


def session(peer: Peer, *, framed: bool, received: bytes = b"", **options: Any) -> Session:
    return Session(Hijacked(peer.ours, received), framed=framed, output=(peer.ends[0], peer.ends[1]), **options)


def in_background(action: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=action)
    thread.start()
    return thread


def test_streams_are_told_apart_and_what_came_with_the_head_is_first(peer: Peer) -> None:
    peer.theirs.sendall(frame(1, b"two") + frame(2, b"err"))
    peer.theirs.close()
    received = frame(1, b"one ")
    assert session(peer, received=received, framed=True).run() is False
    assert peer.output() == {1: b"one two", 2: b"err"}


def test_end_of_input_is_a_half_close_and_output_goes_on(peer: Peer) -> None:
    def echo() -> None:
        data = b""
        while part := peer.theirs.recv(65536):
            data += part
        peer.theirs.sendall(frame(1, data[::-1]))
        peer.theirs.close()

    thread = in_background(echo)
    peer.type(b"stdin", end=True)
    session(peer, framed=True, stdin=peer.stdin_read).run()
    thread.join()
    assert peer.output()[1] == b"nidts"


def test_neither_direction_waits_for_the_other(peer: Peer) -> None:
    """A peer that writes before it reads, as `cat` of much does, with more in flight than any buffer holds."""
    much = random.Random(2).randbytes(4 << 20)

    def serve() -> None:
        peer.theirs.sendall(much)
        got = b""
        while part := peer.theirs.recv(1 << 20):
            got += part
        peer.theirs.sendall(b"!" if got == much else b"?")
        peer.theirs.close()

    def write() -> None:
        view = memoryview(much)
        while view:
            view = view[os.write(peer.stdin, view) :]
        peer.type(b"", end=True)

    threads = [in_background(serve), in_background(write)]
    session(peer, framed=False, stdin=peer.stdin_read).run()
    for thread in threads:
        thread.join()
    assert peer.output()[1] == much + b"!"


def test_a_process_that_ends_without_reading_its_input(peer: Peer) -> None:
    peer.type(b"nobody reads this")
    peer.theirs.sendall(b"bye")
    peer.theirs.close()
    assert session(peer, framed=False, stdin=peer.stdin_read).run() is False
    assert peer.output()[1] == b"bye"


def test_detaching_leaves_the_process_alone(peer: Peer) -> None:
    peer.type(b"ls\n\x10\x11more")
    assert session(peer, framed=False, stdin=peer.stdin_read, keys=b"\x10\x11").run() is True
    assert peer.theirs.recv(100) == b"ls\n"
    assert peer.theirs.recv(100) == b""


def test_what_is_watched_is_told(peer: Peer) -> None:
    class Watched:
        def __init__(self) -> None:
            self.read, self.write = os.pipe()
            self.told = 0

        def fileno(self) -> int:
            return -1 if self.told else self.read

        def ready(self) -> None:
            self.told += 1
            os.close(self.read)
            peer.theirs.sendall(b"done")
            peer.theirs.close()

    watched = Watched()
    os.close(watched.write)
    session(peer, framed=False, watch=watched).run()
    assert watched.told == 1
    assert peer.output()[1] == b"done"
