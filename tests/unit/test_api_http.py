"""The HTTP layer over real sockets: parsing, framing, keep-alive, hijack, and what it makes of garbage."""

from __future__ import annotations

import json
import random
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import h11
import pytest

from ambi.api import http
from ambi.api.exchange import Call, Reply, json_reply
from ambi.api.router import Route, Router
from ambi.api.server import Server, listen
from ambi.core.errors import Conflict, Internal

HOST = b"Host: x\r\n"


def echo(call: Call) -> Reply:
    digest = sum(call.request.body.readall() or b"") if call.query.flag("sum") else None
    return json_reply({"name": call.name, "version": list(call.version), "sum": digest})


def body(call: Call) -> Reply:
    return json_reply(call.json_body())


def fail(call: Call) -> Reply:
    raise Conflict("it is taken\nreally", hint="take another")


def crash(call: Call) -> Reply:
    raise ZeroDivisionError("one by zero")


def drip(call: Call) -> None:
    stream = call.stream("text/plain")
    for piece in (b"one", b"", b"two"):
        stream.write(piece)
    stream.end()


def break_off(call: Call) -> None:
    call.stream("text/plain").write(b"half")
    raise Internal("no more")


def raw(call: Call) -> None:
    def give(sock: socket.socket, pending: bytes, write_head: Callable[[], None]) -> None:
        if call.query.flag("refuse"):
            raise Conflict("not now")
        mine = sock.dup()
        write_head()
        threading.Thread(target=_shout, args=(mine, pending)).start()

    call.hand_over(give, framed=call.query.flag("framed"))


def _shout(sock: socket.socket, data: bytes) -> None:
    """Echo in capitals until the client ends its direction, then say so."""
    with sock:
        while True:
            sock.sendall(data.upper())
            data = sock.recv(4096)
            if not data:
                sock.sendall(b"<end>")
                return


ROUTES = (
    Route("GET", "/things/json", echo),
    Route("GET", "/things/{}/json", echo),
    Route("DELETE", "/things/{}", echo),
    Route("POST", "/sum", echo),
    Route("POST", "/body", body),
    Route("GET", "/fail", fail),
    Route("GET", "/crash", crash),
    Route("GET", "/drip", drip),
    Route("GET", "/break", break_off),
    Route("POST", "/raw", raw),
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("api") / "a.sock"
    server = Server(None, listen(path), Router(ROUTES))  # type: ignore[arg-type]  # no handler here has an engine
    server.start()
    yield path
    server.close()


def dial(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(20)
    sock.connect(str(path))
    return sock


def talk(path: Path, *parts: bytes) -> bytes:
    """Send, end our direction, and read to the end."""
    with dial(path) as sock:
        for part in parts:
            sock.sendall(part)
        sock.shutdown(socket.SHUT_WR)
        return read_all(sock)


def read_all(sock: socket.socket) -> bytes:
    data = b""
    while part := sock.recv(1 << 16):
        data += part
    return data


def get(target: str, *headers: str, method: str = "GET") -> bytes:
    return "\r\n".join((f"{method} {target} HTTP/1.1", "Host: x", *headers, "", "")).encode()


def split(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    head, _, rest = answer.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    return int(lines[0].split()[1]), dict(line.split(": ", 1) for line in lines[1:]), rest


def test_a_route_may_have_a_second_name_at_its_end() -> None:
    routes = (
        Route("DELETE", "/things/{}/parts/{}", echo),
        Route("DELETE", "/things/{}", fail),
        Route("GET", "/things/{}/parts", drip),
    )
    router = Router(routes)
    assert router.match("DELETE", "/v1.44/things/a/parts/b?x=1")[::2] == (echo, "a/b")
    assert router.match("DELETE", "/things/a%3A1/parts/b.c")[::2] == (echo, "a:1/b.c")
    assert router.match("GET", "/things/a/parts")[::2] == (drip, "a")
    for path in ("/things/a", "/things/a/parts/", "/things/a/others/b", "/things/a/parts/b/c"):
        assert router.match("DELETE", path).handler is fail


def test_versions_names_and_common_headers(path: Path) -> None:
    status, headers, rest = split(talk(path, get("/v1.30/things/a%2Fb/c:1/json?x=1")))
    assert status == 200 and json.loads(rest) == {"name": "a/b/c:1", "version": [1, 30], "sum": None}
    assert headers["Api-Version"] == "1.44" and headers["Ostype"] == "linux" and headers["Docker-Experimental"] == "true"
    assert int(headers["Content-Length"]) == len(rest)
    assert json.loads(split(talk(path, get("/things/json")))[2])["version"] == [1, 44]
    assert json.loads(split(talk(path, get("/things/json", method="DELETE")))[2])["name"] == "json"


@pytest.mark.parametrize(
    "target,status,text",
    [
        ("/v1.999/things/json", 400, "client version 1.999 is too new. Maximum supported API version is 1.44"),
        ("/v2/things/json", 400, "client version 2 is too new. Maximum supported API version is 1.44"),
        ("/v1.23/things/json", 400, "client version 1.23 is too old. Minimum supported API version is 1.24, "
         "please upgrade your client to a newer version"),
        ("/v1.44/nothing", 404, "page not found"),
        ("/", 404, "page not found"),
        ("/things//json", 404, "page not found"),
        ("/volcano", 404, "page not found"),
        ("/body", 405, "method GET is not allowed for /body"),
        ("/crash", 500, "internal error: ZeroDivisionError: one by zero"),
    ],
)  # fmt: skip
def test_errors_are_json(path: Path, target: str, status: int, text: str) -> None:
    got, headers, rest = split(talk(path, get(target)))
    assert (got, json.loads(rest)) == (status, {"message": text})
    assert headers["Content-Type"] == "application/json"


def test_a_hint_is_a_header_and_cannot_break_out_of_it(path: Path) -> None:
    status, headers, rest = split(talk(path, get("/fail")))
    assert status == 409 and headers["Ambi-Hint"] == "take another"
    assert json.loads(rest) == {"message": "it is taken\nreally"}


def test_keep_alive_and_pipelining(path: Path) -> None:
    answer = talk(path, get("/things/json") * 3, get("/drip", "Connection: close"), get("/things/json"))
    assert answer.count(b"HTTP/1.1 200 OK") == 4, "the request after `close` must not be answered"
    assert answer.endswith(b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n")


def test_http_1_0_is_answered_without_chunks(path: Path) -> None:
    status, headers, rest = split(talk(path, b"GET /drip HTTP/1.0\r\n\r\n"))
    assert (status, rest) == (200, b"onetwo") and "Transfer-Encoding" not in headers and headers["Connection"] == "close"


def test_head_has_no_body(path: Path) -> None:
    with dial(path) as sock:
        sock.sendall(get("/things/json", method="HEAD") + get("/drip", "Connection: close", method="HEAD"))
        answer = read_all(sock)
    assert answer.count(b"\r\n\r\n") == 2 and answer.endswith(b"\r\n\r\n") and b"{" not in answer


def test_a_stream_that_fails_is_cut_and_not_completed(path: Path) -> None:
    answer = talk(path, get("/break"), get("/things/json"))
    assert answer.endswith(b"4\r\nhalf\r\n")


def chunked(data: bytes, sizes: list[int]) -> bytes:
    out, at = b"", 0
    for size in sizes:
        piece = data[at : at + size]
        at += size
        if piece:
            out += b"%X;ext=1\r\n%b\r\n" % (len(piece), piece)
    return out + b"0\r\nTrailer: x\r\n\r\n"


@pytest.mark.parametrize("size", [0, 1, 70_000, 3_000_000])
def test_bodies_with_a_length_and_in_chunks(path: Path, size: int) -> None:
    rng = random.Random(size)
    data = rng.randbytes(size)
    sizes = [rng.choice((1, 7, 4096, 100_000)) for _ in range(size)][: 2000 if size < 80_000 else None]
    for head, sent in (
        (b"Content-Length: %d\r\n" % size, data),
        (b"Transfer-Encoding: chunked\r\n", chunked(data, [*sizes, size])),
    ):
        answer = talk(path, b"POST /sum?sum=1 HTTP/1.1\r\n" + HOST + head + b"\r\n" + sent + get("/things/json"))
        assert answer.count(b"HTTP/1.1 200 OK") == 2
        assert b'"sum":%d}' % sum(data) in answer


def test_a_body_nobody_reads_does_not_become_a_request(path: Path) -> None:
    inner = get("/things/json")
    answer = talk(path, b"GET /fail HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % len(inner), inner)
    assert answer.count(b"HTTP/1.1") == 1


def test_a_large_unread_upload_still_gets_its_answer(path: Path) -> None:
    with dial(path) as sock:
        sock.sendall(b"GET /fail HTTP/1.1\r\n" + HOST + b"Content-Length: 100000000\r\n\r\n")
        try:
            for _ in range(100):
                sock.sendall(bytes(1 << 16))
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert b"409 Conflict" in sock.recv(1 << 16)


def test_whoever_writes_first_and_reads_then_gets_the_answer(path: Path) -> None:
    with dial(path) as sock:
        sock.sendall(b"GET /fail HTTP/1.1\r\n" + HOST + b"Content-Length: 100000000\r\n\r\n")
        sock.sendall(bytes(8 << 20))
        assert b"409 Conflict" in sock.recv(1 << 16)


def test_expect_continue(path: Path) -> None:
    with dial(path) as sock:
        sock.sendall(b"POST /body HTTP/1.1\r\n" + HOST + b"Content-Length: 7\r\nExpect: 100-continue\r\n\r\n")
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b'{"a":1}')
        assert sock.recv(4096).startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize("sent", [b"{", b"[]", b'"x"', b'{"a":NaN}', b"[" * 100_000, b"\xff\xfe"])
def test_a_json_body_that_is_none(path: Path, sent: bytes) -> None:
    status, _, rest = split(talk(path, b"POST /body HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % len(sent), sent))
    assert status == 400 and json.loads(rest)["message"].startswith("the request body is not")


def test_a_json_body_that_is_too_large(path: Path) -> None:
    head = b"POST /body HTTP/1.1\r\n" + HOST + b"Content-Length: 9000000\r\n\r\n"
    status, _, rest = split(talk_tolerant(path, head + bytes(5 << 20)))
    assert status == 400 and "too large" in json.loads(rest)["message"]


@pytest.mark.parametrize(
    "head,kind",
    [
        (b"Connection: Upgrade\r\nUpgrade: tcp\r\n", "multiplexed-stream"),
        (b"", "raw-stream"),
    ],
)
def test_hijack_with_half_close(path: Path, head: bytes, kind: str) -> None:
    with dial(path) as sock:
        sock.sendall(b"POST /v1.44/raw?framed=1 HTTP/1.1\r\n" + HOST + head + b"\r\nahead ")
        sock.sendall(b"and later")
        sock.shutdown(socket.SHUT_WR)
        status, headers, rest = split(read_all(sock))
    assert status == (101 if head else 200) and "Content-Length" not in headers
    assert headers["Content-Type"] == f"application/vnd.docker.{kind}"
    assert rest == b"AHEAD AND LATER<end>"
    assert headers.get("Upgrade") == ("tcp" if head else None)


def test_before_1_42_an_upgraded_stream_is_called_raw(path: Path) -> None:
    _, headers, _ = split(talk(path, get("/v1.41/raw?framed=1", "Connection: Upgrade", "Upgrade: tcp", method="POST")))
    assert headers["Content-Type"] == "application/vnd.docker.raw-stream"


def test_a_hijack_that_is_refused_is_an_ordinary_answer(path: Path) -> None:
    upgrade = ("Connection: Upgrade", "Upgrade: tcp", "Content-Length: 0")
    answer = talk(path, get("/raw?refuse=1", *upgrade, method="POST"), get("/things/json"))
    assert answer.startswith(b"HTTP/1.1 409") and b"HTTP/1.1 200 OK" in answer


@pytest.mark.parametrize(
    "sent,status",
    [
        (b"GET / HTTP/1.1\n" + b"Host: x\n\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET  / HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"GET /a b HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"GET * HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"G(T / HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\n", 505),
        (b"GET / HTTP/1.1\r\n" + HOST + HOST + b"\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + HOST + b"A : b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + HOST + b"A: b\r\n c\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + HOST + b"A: b\0c\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + HOST + b"A: b\nContent-Length: 3\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + HOST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + HOST + b"Content-Length: -1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + HOST + b"Content-Length: 1_0\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 501),
        (b"GET / HTTP/1.1\r\n" + HOST + b"A: b\r\n" * 101 + b"\r\n", 431),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost", 400),
    ],
)
def test_what_is_no_request_is_answered_and_ends_the_connection(path: Path, sent: bytes, status: int) -> None:
    answer = talk(path, sent, get("/things/json"))
    got, headers, rest = split(answer)
    assert got == status and headers["Connection"] == "close" and json.loads(rest)["message"]
    assert answer.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize(
    "framing", [b"5\r\nabc", b"zz\r\nabc\r\n", b"3\r\nabcd\r\n0\r\n\r\n", b"-1\r\n", b"\r\n", b"9" * 5000]
)
def test_broken_chunks_are_a_400(path: Path, framing: bytes) -> None:
    head = b"POST /sum?sum=1 HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"
    answer = talk(path, head, framing)
    assert split(answer)[0] == 400 and answer.count(b"HTTP/1.1 ") == 1


def test_mutated_requests_never_hang_or_crash_the_server(path: Path) -> None:
    """Whatever comes is answered, or the connection ends; and a head that we accept, h11 accepts as the same."""
    rng = random.Random(20261124)
    seeds = [
        get("/v1.44/things/a/json?all=1", "User-Agent: fuzz"),
        b"POST /sum?sum=1 HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\n\r\nhello",
        b"POST /sum?sum=1 HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        b"POST /body HTTP/1.1\r\n" + HOST + b'Content-Length: 9\r\n\r\n{"a":"b"}',
    ]
    for _ in range(1500):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            match rng.randrange(4):
                case 0:
                    data[at] = rng.randrange(256)
                case 1:
                    del data[at : at + rng.randint(1, 8)]
                case 2:
                    data[at:at] = rng.choice(
                        (b"\r\n", b"\n", b" ", b"\0", b":", b"%00", b"\r\n\r\n", b"Content-Length: 1\r\n")
                    )
                case _:
                    data[at:at] = rng.randbytes(3)
            data = data or bytearray(b"x")
        answer = talk(path, bytes(data))
        assert not answer or answer.startswith(b"HTTP/1.1 "), data
        assert b"HTTP/1.1 500" not in answer, data
        compare_with_h11(bytes(data))
    assert split(talk(path, get("/things/json")))[0] == 200


def compare_with_h11(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        try:
            request = http.Connection(ours).next_request()
        except http.Malformed:
            return
    if request is None:
        return
    while data.startswith(b"\r\n"):  # which a server should ignore (RFC 9112 2.2) and h11 does not
        data = data[2:]
    oracle = h11.Connection(h11.SERVER)
    oracle.receive_data(data)
    try:
        event = oracle.next_event()
    except h11.RemoteProtocolError as error:
        if "Host" in str(error):
            return  # h11 looks at the characters of a host, which nobody here uses
        raise AssertionError(f"accepted {data!r}, which h11 refuses: {error}") from error
    assert isinstance(event, h11.Request), data
    assert (event.method.decode(), event.target.decode().removeprefix("http://x")) == (request.method, request.target)
    lengths = [value for name, value in event.headers if name == b"content-length"]
    assert [int(value) for value in lengths] == [int(request.headers[name]) for name in ("content-length",) if lengths]


def test_too_many_clients_are_turned_away_and_then_served(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ambi.api.server.MAX_CLIENTS", 2)
    first, second = dial(path), dial(path)
    with first, second:
        for sock in (first, second):
            sock.sendall(get("/things/json"))
            assert b"200 OK" in sock.recv(4096)
        answer = talk_tolerant(path, get("/things/json"))
        assert answer.startswith(b"HTTP/1.1 503") and b"Ambi-Hint" in answer
        first.sendall(get("/things/json"))
        assert b"200 OK" in first.recv(4096)


def talk_tolerant(path: Path, data: bytes) -> bytes:
    with dial(path) as sock:
        try:
            sock.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            pass
        answer = b""
        try:
            while part := sock.recv(4096):
                answer += part
        except ConnectionResetError:
            pass
        return answer


def test_the_socket_is_private_and_a_stale_one_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / ("d" * 90) / "ambi.sock"
    first = listen(path)
    assert path.stat().st_mode & 0o7777 == 0o660
    with pytest.raises(Conflict, match="another process answers"):
        listen(path)
    first.close()
    listen(path).close()
    path.unlink()
    path.write_text("precious")
    with pytest.raises(Conflict, match="is no socket"):
        listen(path)
    assert path.read_text() == "precious"


def test_client_gone_means_closed_and_not_half_closed() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        connection = http.Connection(ours)
        assert not connection.client_gone()
        theirs.shutdown(socket.SHUT_WR)
        assert not connection.client_gone()
        theirs.close()
        assert connection.client_gone()
