"""The HTTP reader against bytes as engines and others send them, and the client's errors."""

from __future__ import annotations

import io
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ambi.client import starter
from ambi.client.client import Client, command_error, error_of, path_of, quote
from ambi.client.http import Connection, Lost, connect
from ambi.core import errors
from ambi.core.roots import Roots

Serve = Callable[[socket.socket], None]


class Server:
    """Serves connections one after the other, each by the next of `serves`; the last one serves all that follow."""

    def __init__(self, path: Path, *serves: Serve) -> None:
        self.path = path
        self.connections = 0
        self._serves = serves
        self._listener = socket.socket(socket.AF_UNIX)
        folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
        self._listener.bind(f"/proc/self/fd/{folder}/{path.name}")
        os.close(folder)
        self._listener.listen()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            serve = self._serves[min(self.connections, len(self._serves) - 1)]
            self.connections += 1
            with peer:
                serve(peer)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._listener.close()


def head_of(peer: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        part = peer.recv(1)
        if not part:
            return b""
        data += part
    return data


def says(*parts: bytes) -> Serve:
    def serve(peer: socket.socket) -> None:
        for part in parts:
            if not head_of(peer):
                return
            peer.sendall(part)

    return serve


@pytest.fixture
def serve(short_tmp: Path) -> Iterator[Callable[..., Client]]:
    servers: list[Server] = []
    clients: list[Client] = []

    def make(*serves: Serve) -> Client:
        servers.append(Server(short_tmp / f"s{len(servers)}", *serves))
        clients.append(Client(Roots.of(short_tmp, short_tmp, servers[-1].path), starts=False))
        return clients[-1]

    yield make
    for client in clients:
        client.close()
    for server in servers:
        server.close()


JSON = b'HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n{"a":1}'
CHUNKED = b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\n{"a\r\n4\r\n":1}\r\n0\r\nTrailer: x\r\n\r\n'
TO_THE_END = b'HTTP/1.0 200 OK\r\n\r\n{"a":1}'
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n" + JSON


@pytest.mark.parametrize("answer", [JSON, CHUNKED, TO_THE_END, INTERIM], ids=["length", "chunked", "close", "interim"])
def test_bodies(serve: Callable[..., Client], answer: bytes) -> None:
    assert serve(says(answer)).get("/x") == {"a": 1}


def test_a_connection_is_kept(serve: Callable[..., Client]) -> None:
    client = serve(says(JSON, CHUNKED, b"HTTP/1.1 204 No Content\r\n\r\n", JSON), says(b"HTTP/1.1 500 X\r\n\r\n"))
    assert [client.get("/x"), client.get("/x"), client.post("/x"), client.get("/x")] == [{"a": 1}, {"a": 1}, None, {"a": 1}]
    client.close()


def test_a_question_is_asked_again(serve: Callable[..., Client]) -> None:
    """A killed engine may take a connection and drop it; what changes nothing is asked of the next one."""
    client = serve(says(b"HTTP/1.1 200"), says(JSON))
    assert client.get("/x") == {"a": 1}


def test_an_idle_connection_that_was_closed_is_opened_again(serve: Callable[..., Client]) -> None:
    client = serve(says(JSON))
    assert client.get("/x") == client.get("/x") == {"a": 1}
    client.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b'HTTP/1.1 200 OK\r\nContent-Length: 70\r\n\r\n{"a":1}',
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
    ],
)
def test_an_answer_that_breaks_off_is_lost(serve: Callable[..., Client], answer: bytes) -> None:
    with pytest.raises(Lost):
        serve(says(answer)).post("/x")


@pytest.mark.parametrize(
    "answer",
    [
        b"220 mail.example.org ESMTP\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 " + b"x" * 200_000,
    ],
)
def test_an_answer_that_is_none(serve: Callable[..., Client], answer: bytes) -> None:
    with pytest.raises(errors.Internal):
        serve(says(answer)).get("/x")


def test_errors_have_class_message_and_hint(serve: Callable[..., Client]) -> None:
    body = b'{"message":"No such container: x"}'
    answer = b"HTTP/1.1 404 Not Found\r\nAmbi-Hint: ambi ps\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    with pytest.raises(errors.NotFound) as caught:
        serve(says(answer)).get("/x")
    assert (caught.value.message, caught.value.hint) == ("No such container: x", "ambi ps")


@pytest.mark.parametrize(
    "status,kind",
    [(304, "NotModified"), (400, "InvalidRequest"), (403, "Forbidden"), (404, "NotFound"), (409, "Conflict"),
     (501, "Unsupported"), (503, "Unavailable"), (507, "StorageFull"), (500, "Internal"), (418, "Internal")],
)  # fmt: skip
def test_class_of_a_status(status: int, kind: str) -> None:
    assert type(error_of(status, "m")).__name__ == kind


@pytest.mark.parametrize(
    "text,status",
    [
        ('exec: "x": executable file not found in $PATH', 127),
        ("exec /x: no such file or directory", 127),
        ("exec /etc: Permission denied", 126),
        ("exec /etc: is a directory", 126),
        ("the name is taken", 125),
    ],
)
def test_status_of_a_command_that_cannot_run(text: str, status: int) -> None:
    assert command_error(errors.InvalidRequest(text)).exit_status == status


def test_an_answer_comes_while_the_upload_is_read(serve: Callable[..., Client]) -> None:
    """The engine may stop reading: its error is heard all the same, whatever is left of the archive."""

    def refuse(peer: socket.socket) -> None:
        head_of(peer)
        peer.sendall(b'HTTP/1.1 400 Bad\r\nContent-Length: 22\r\n\r\n{"message":"no archiv"}'[:-1] + b"}")

    with pytest.raises(errors.InvalidRequest):
        serve(refuse).upload("/images/load", {}, io.BytesIO(b"x" * (8 << 20)))


def test_an_upload_arrives_whole(serve: Callable[..., Client]) -> None:
    got: dict[str, Any] = {}

    def take(peer: socket.socket) -> None:
        got["head"] = head_of(peer)
        stream, body = peer.makefile("rb"), b""
        while size := int(stream.readline(), 16):
            body += stream.read(size)
            stream.readline()
        got["body"] = body
        peer.sendall(JSON)

    data = os.urandom(3 << 20)
    steps: list[int] = []
    assert serve(take).upload("/images/load", {"quiet": "1"}, io.BytesIO(data), steps.append).read() == b'{"a":1}'
    assert got["body"] == data and steps[-1] == len(data)
    assert got["head"].startswith(b"POST /v1.44/images/load?quiet=1 HTTP/1.1\r\n")


def test_nothing_of_a_hijacked_stream_is_lost(serve: Callable[..., Client]) -> None:
    head = b"HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
    hijacked = serve(says(head + b"already here")).hijack("/containers/x/attach")
    assert hijacked.received + hijacked.sock.recv(100) == b"already here"
    hijacked.sock.close()


def test_a_background_request_returns_at_its_head(serve: Callable[..., Client]) -> None:
    goes_on = threading.Event()

    def wait(peer: socket.socket) -> None:
        head_of(peer)
        peer.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        goes_on.wait(30)
        peer.sendall(b'10\r\n{"StatusCode":3}\r\n0\r\n\r\n')

    pending = serve(wait).background("/containers/x/wait")
    goes_on.set()
    assert pending.result() == {"StatusCode": 3}


def test_socket_paths_may_be_long(short_tmp: Path) -> None:
    folder = short_tmp / ("d" * 100) / ("e" * 100)
    folder.mkdir(parents=True)
    server = Server(folder / "ambi.sock", says(JSON))
    connection = Connection(folder / "ambi.sock")
    connection.send("GET", "/x", [])
    assert connection.response().read() == b'{"a":1}'
    connection.close()
    server.close()


def test_quoting() -> None:
    assert quote("a/b c%ü\n") == "a%2Fb%20c%25%C3%BC%0A"
    assert path_of("containers", "../x?y", "json") == "/containers/..%2Fx%3Fy/json"


def test_no_engine(short_tmp: Path) -> None:
    roots = Roots.of(short_tmp, short_tmp, short_tmp / "none.sock")
    with pytest.raises(errors.Unavailable) as caught:
        Client(roots, starts=False).get("/info")
    assert str(roots.socket) in caught.value.message and caught.value.hint == "ambi engine start"
    with pytest.raises(FileNotFoundError):
        connect(roots.socket)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_an_engine_that_cannot_start_says_why(short_tmp: Path) -> None:
    """A file where its data should be: the error is the engine's own, and comes at once."""
    (short_tmp / "data").write_text("a file")
    roots = Roots.of(short_tmp / "data", short_tmp / "run", short_tmp / "run" / "ambi.sock")
    with pytest.raises(errors.AmbiError, match="cannot start the engine") as caught:
        starter.start(roots, lambda _: None)
    assert str(roots.data) in caught.value.message
