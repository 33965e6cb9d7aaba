"""Attach by websocket with a client of PyPI, as docker-py's `attach_socket(ws=True)` and browsers do it."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import websocket

from tests.harness import EngineUnderTest

pytestmark = pytest.mark.needs("root")
MUCH = b"0123456789abcd\xc3\xa9\n" * 6000


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, busybox_tar: Path) -> Iterator[EngineUnderTest]:
    it = EngineUnderTest(tmp_path_factory.mktemp("ws"))
    it.start()
    it.load_busybox(busybox_tar)
    yield it
    it.destroy()


@contextmanager
def attach(engine: EngineUnderTest, name: str, query: str) -> Iterator[websocket.WebSocket]:
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(60)
        raw.connect(str(engine.socket))
        url = f"ws://localhost/v1.44/containers/{name}/attach/ws?{query}"
        yield websocket.create_connection(url, socket=raw, timeout=60)


def read(client: websocket.WebSocket, length: int) -> bytes:
    found = b""
    while len(found) < length:
        opcode, data = client.recv_data()
        assert opcode == websocket.ABNF.OPCODE_BINARY, (found, data)
        found += data
    return found


def create(engine: EngineUnderTest, isolation: str, *args: str) -> None:
    done = engine.ambi("create", "--isolation", isolation, *args)
    assert done.returncode == 0, done


def test_input_output_and_the_end(engine: EngineUnderTest, isolation: str) -> None:
    name = f"ws-{isolation}"
    script = "cat; echo end >&2; exit 7"
    create(engine, isolation, "-i", "--name", name, "--network", "none", "busybox", "sh", "-c", script)
    with attach(engine, name, "stdin=1&stdout=1&stderr=1&stream=1") as client:
        assert engine.ambi("start", name).returncode == 0
        client.send("text\n")
        assert read(client, 5) == b"text\n"
        client.send_binary(MUCH)
        assert read(client, len(MUCH)) == MUCH, "nothing is framed, and nothing is changed"
        client.ping("here?")
        assert client.recv_data(control_frame=True) == (websocket.ABNF.OPCODE_PONG, b"here?")
        client.close()
    assert engine.ambi("wait", name).stdout.strip() == b"7", "who leaves has ended the input"

    with attach(engine, name, "logs=1&stdout=1&stderr=1") as client:
        whole = b""
        while (frame := client.recv_data())[0] != websocket.ABNF.OPCODE_CLOSE:
            whole += frame[1]
    assert whole == b"text\n" + MUCH + b"end\n"
    assert frame[1] == b"\x03\xe8"
    assert engine.ambi("rm", name).returncode == 0


def test_refusals_are_plain_answers(engine: EngineUnderTest) -> None:
    with pytest.raises(websocket.WebSocketBadStatusException) as caught, attach(engine, "nobody", "stream=1"):
        pass
    assert caught.value.status_code == 404
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(str(engine.socket))
        raw.sendall(b"GET /containers/nobody/attach/ws HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        head, _, body = b"".join(iter(lambda: raw.recv(4096), b"")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["message"] == "this is no websocket handshake"
