"""SEQPACKET messages with descriptors: whole or refused, and no descriptor is ever left behind."""

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from ambi.core.errors import InvalidRequest
from ambi.linux import unix


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = unix.pair()
    with one, other:
        yield one, other


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_objects_and_descriptors_arrive(pair: tuple[socket.socket, socket.socket]) -> None:
    read, write = os.pipe()
    unix.send(pair[0], {"op": "x", "text": "ä\ud800"}, [read, write])
    message = unix.receive(pair[1])
    assert message is not None and message.body == {"op": "x", "text": "ä\ud800"}
    assert len(message.fds) == 2
    os.write(message.fds[1], b"through")
    assert os.read(read, 10) == b"through"
    assert not os.get_inheritable(message.fds[0])
    message.close()
    assert message.fds == []
    os.close(read)
    os.close(write)


@pytest.mark.parametrize("length", [unix.MAX_MESSAGE - 20, unix.MAX_MESSAGE, 1 << 20, unix.MAX_BODY - 20])
def test_long_objects_arrive(pair: tuple[socket.socket, socket.socket], length: int) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    before = open_descriptors()
    unix.send(pair[0], {"text": "x" * length}, [null])
    message = unix.receive(pair[1])
    assert message is not None and message.body == {"text": "x" * length}
    assert len(message.fds) == 1
    message.close()
    assert open_descriptors() == before
    os.close(null)


def test_too_long_or_too_many_is_refused(pair: tuple[socket.socket, socket.socket]) -> None:
    with pytest.raises(InvalidRequest, match="too long"):
        unix.send(pair[0], {"text": "x" * unix.MAX_BODY})
    with pytest.raises(InvalidRequest, match="at most 8 descriptors"):
        unix.send(pair[0], {}, [0] * 9)


def test_the_end_is_none(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].close()
    assert unix.receive(pair[1]) is None


@pytest.mark.parametrize(
    "data",
    [
        b"x",
        b"[]",
        b"3",
        b"null",
        b'"a"',
        b"\xff",
        b"{" * 100_000,
        b"[" * 100_000,
        b'{"memfd":1}',
        b'{"memfd":1,"x":1}',
        b"{}" * 70_000,
    ],
)
@pytest.mark.parametrize("count", [0, 1, 8])
def test_bad_messages_are_refused_and_their_descriptors_closed(
    pair: tuple[socket.socket, socket.socket], data: bytes, count: int
) -> None:
    before = open_descriptors()
    if count:
        socket.send_fds(pair[0], [data], [pair[0].fileno()] * count)
    else:
        pair[0].send(data)
    with pytest.raises(InvalidRequest):
        unix.receive(pair[1])
    assert open_descriptors() == before


def test_too_many_descriptors_are_refused_and_closed(pair: tuple[socket.socket, socket.socket]) -> None:
    before = open_descriptors()
    socket.send_fds(pair[0], [b"{}"], [0] * 40)
    with pytest.raises(InvalidRequest, match="too many descriptors"):
        unix.receive(pair[1])
    assert open_descriptors() == before


def test_a_memfd_that_is_shorter_than_it_says(pair: tuple[socket.socket, socket.socket]) -> None:
    memfd = os.memfd_create("short")
    os.write(memfd, b'{"a":')
    socket.send_fds(pair[0], [b'{"memfd":1000}'], [memfd])
    os.close(memfd)
    with pytest.raises(InvalidRequest, match="not JSON"):
        unix.receive(pair[1])


def test_sockets_below_long_paths(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    with unix.listen(deep / "s.sock") as listener, unix.connect(deep / "s.sock", 5) as client:
        server, _ = listener.accept()
        with server:
            assert unix.peer(server) == (os.getpid(), os.getuid(), os.getgid())
            unix.send(client, {"n": 1})
            message = unix.receive(server)
            assert message is not None and message.body == {"n": 1}
        assert stat.S_IMODE((deep / "s.sock").stat().st_mode) == 0o600


def test_listen_replaces_a_stale_socket_and_connect_tells_a_dead_one(tmp_path: Path) -> None:
    unix.listen(tmp_path / "s").close()
    with pytest.raises(ConnectionRefusedError):
        unix.connect(tmp_path / "s")
    with unix.listen(tmp_path / "s"), unix.connect(tmp_path / "s"):
        pass
    with pytest.raises(FileNotFoundError):
        unix.connect(tmp_path / "none")
