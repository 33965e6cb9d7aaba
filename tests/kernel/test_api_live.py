"""The API over a real engine, by hand: what the clients rely on and never show."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import EngineUnderTest
from tests.rawclient import RawClient


@pytest.fixture
def engine(new_engine: Callable[[], EngineUnderTest], busybox_tar: Path) -> EngineUnderTest:
    made = new_engine()
    made.load_busybox(busybox_tar)
    return made


@pytest.fixture
def client(engine: EngineUnderTest) -> Iterator[RawClient]:
    made = RawClient(engine.socket)
    yield made
    made.close()


def create(client: RawClient, *argv: str, name: str = "cc", **config: Any) -> str:
    host = {"NetworkMode": "none", **config.pop("HostConfig", {})}
    body = {"Image": "busybox", "Cmd": list(argv), "HostConfig": host, **config}
    status, answer = client.call("POST", f"/containers/create?name={name}", body)
    assert status == 201, answer
    assert answer["Warnings"] == [] or isinstance(answer["Warnings"], list)
    return str(answer["Id"])


def test_ping_by_both_methods_and_the_headers_of_negotiation(engine: EngineUnderTest) -> None:
    for method in ("GET", "HEAD"):
        client = RawClient(engine.socket)
        client.socket.sendall(f"{method} /_ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        status, headers = client.head()
        assert status == 200 and headers["api-version"] == "1.44" and headers["ostype"] == "linux"
        assert headers["docker-experimental"] == "true" and headers["swarm"] == "inactive"
        assert client.socket.recv(10) == b"" if method == "HEAD" else client.body(headers) == b"OK"
        client.close()


def test_wait_answers_its_head_before_the_start(engine: EngineUnderTest, client: RawClient) -> None:
    create(client, "sh", "-c", "exit 7")
    waiting = RawClient(engine.socket)
    waiting.send("POST", "/containers/cc/wait?condition=next-exit")
    status, headers = waiting.head()
    assert status == 200 and headers["transfer-encoding"] == "chunked"
    assert client.call("POST", "/containers/cc/start")[0] == 204
    assert json.loads(waiting.body(headers)) == {"StatusCode": 7}
    waiting.close()


def test_the_conditions_of_wait(engine: EngineUnderTest, client: RawClient) -> None:
    create(client, "true", HostConfig={"AutoRemove": True})
    waiting = RawClient(engine.socket)
    waiting.send("POST", "/containers/cc/wait?condition=removed")
    _, headers = waiting.head()
    client.call("POST", "/containers/cc/start")
    assert json.loads(waiting.body(headers)) == {"StatusCode": 0}
    assert client.call("GET", "/containers/cc/json")[0] == 404
    status, answer = client.call("POST", "/containers/cc/wait?condition=sometime")
    assert (status, answer["message"]) == (400, 'invalid condition: "sometime"')
    waiting.close()


def test_a_waiting_client_that_goes_away_is_forgotten(engine: EngineUnderTest, client: RawClient) -> None:
    create(client, "sleep", "1000")
    client.call("POST", "/containers/cc/start")
    before = threads(engine)
    gone = [RawClient(engine.socket) for _ in range(5)]
    for number, waiting in enumerate(gone):
        waiting.send(
            *(("POST", "/containers/cc/wait"), ("GET", "/events"), ("GET", "/containers/cc/logs?follow=1&stdout=1"))[
                number % 3
            ]
        )
        assert waiting.head()[0] == 200
        waiting.close()
    end = time.monotonic() + 30
    while threads(engine) > before:
        assert time.monotonic() < end, f"{threads(engine)} threads, {before} before"
        time.sleep(0.3)


def threads(engine: EngineUnderTest) -> int:
    text = Path(f"/proc/{engine.pid}/status").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith("Threads:")))


def test_attach_before_start_and_half_close(engine: EngineUnderTest, client: RawClient) -> None:
    create(client, "cat", OpenStdin=True, StdinOnce=True, AttachStdin=True)
    attached = RawClient(engine.socket)
    sock = attached.hijack("/containers/cc/attach?stream=1&stdin=1&stdout=1&stderr=1")
    client.call("POST", "/containers/cc/start")
    sock.sendall(b"some bytes")
    sock.shutdown(socket.SHUT_WR)
    assert attached.frames() == {1: b"some bytes", 2: b""}
    attached.close()


def test_bytes_sent_with_the_head_of_an_attach_reach_the_program(engine: EngineUnderTest, client: RawClient) -> None:
    create(client, "cat", OpenStdin=True, StdinOnce=True, AttachStdin=True)
    client.call("POST", "/containers/cc/start")
    attached = RawClient(engine.socket)
    head = "POST /v1.44/containers/cc/attach?stream=1&stdin=1&stdout=1 HTTP/1.1\r\nHost: x\r\n"
    attached.socket.sendall(head.encode() + b"Connection: Upgrade\r\nUpgrade: tcp\r\n\r\nearly ")
    attached.socket.sendall(b"late")
    attached.socket.shutdown(socket.SHUT_WR)
    assert attached.head()[0] == 101
    assert attached.frames()[1] == b"early late"
    attached.close()


def test_framing_of_an_exec_follows_its_start(engine: EngineUnderTest, client: RawClient) -> None:
    create(client, "sleep", "1000")
    client.call("POST", "/containers/cc/start")
    for tty, framed in ((False, True), (True, False)):
        body = {"Cmd": ["echo", "hi"], "AttachStdout": True, "AttachStderr": True, "Tty": True}
        status, made = client.call("POST", "/containers/cc/exec", body)
        assert status == 201
        starter = RawClient(engine.socket)
        sock = starter.hijack(f"/exec/{made['Id']}/start", {"Detach": False, "Tty": tty})
        if framed:
            assert starter.frames()[1] == b"hi\r\n"
        else:
            data = starter.buffer
            while part := sock.recv(100):
                data += part
            assert data == b"hi\r\n"
        shown = client.call("GET", f"/exec/{made['Id']}/json")[1]
        assert shown["ExitCode"] == 0 and shown["Running"] is False
        starter.close()


def test_lists_in_both_shapes_of_filters_and_unknown_ones(client: RawClient) -> None:
    create(client, "true", Labels={"tier": "web"})
    create(client, "true", name="dd")
    for filters in ('{"label":["tier=web"]}', '{"label":{"tier=web":true}}'):
        found = client.call("GET", f"/containers/json?all=1&filters={filters}")[1]
        assert [row["Names"] for row in found] == [["/cc"]]
    assert len(client.call("GET", "/containers/json?all=1")[1]) == 2
    assert client.call("GET", "/containers/json")[1] == []
    assert client.call("GET", '/containers/json?filters={"nope":["x"]}')[0] == 400
    row = client.call("GET", "/containers/json?limit=1")[1][0]
    assert row["Names"] == ["/dd"] and row["HostConfig"]["NetworkMode"] == "none" and row["NetworkSettings"]["Networks"]


def test_inspect_probes_end_in_json_404s(client: RawClient) -> None:
    for path in ("/containers/x/json", "/images/x/json", "/networks/x", "/volumes/x", "/plugins/x/json"):
        status, answer = client.call("GET", path)
        assert status == 404 and "x" in answer["message"], path


def test_events_replay_and_follow(engine: EngineUnderTest, client: RawClient) -> None:
    create(client, "true", HostConfig={"AutoRemove": True})
    watching = RawClient(engine.socket)
    watching.send("GET", '/events?since=1&filters={"container":["cc"]}')
    assert watching.head()[0] == 200
    client.call("POST", "/containers/cc/start")
    actions = []
    while "destroy" not in actions:
        size = int(watching._line(), 16)
        for line in watching._exactly(size).splitlines():
            event = json.loads(line)
            assert (
                event["Type"] == "container" and event["Actor"]["Attributes"]["name"] == "cc" and event["scope"] == "local"
            )
            assert event["status"] == event["Action"] and event["timeNano"] // 10**9 == event["time"]
            actions.append(event["Action"])
        watching._line()
    assert actions == ["create", "start", "die", "destroy"]
    watching.close()


def test_stats_have_what_the_client_computes_with(client: RawClient) -> None:
    create(client, "sh", "-c", "while :; do :; done", HostConfig={"NanoCpus": 200_000_000})
    client.call("POST", "/containers/cc/start")
    status, shown = client.call("GET", "/containers/cc/stats?stream=0")
    assert status == 200 and shown["name"] == "/cc"
    used = shown["cpu_stats"]["cpu_usage"]["total_usage"] - shown["precpu_stats"]["cpu_usage"]["total_usage"]
    assert used > 0 and shown["cpu_stats"]["system_cpu_usage"] > shown["precpu_stats"]["system_cpu_usage"]
    assert shown["memory_stats"]["usage"] > 0 and shown["memory_stats"]["limit"] > 0 and shown["pids_stats"]["current"] >= 1
    single = client.call("GET", "/containers/cc/stats?stream=0&one-shot=1")[1]
    assert single["precpu_stats"]["cpu_usage"]["total_usage"] == 0


def test_a_client_that_stalls_holds_nobody(engine: EngineUnderTest, client: RawClient) -> None:
    """Full logs, events and an upload that stops half-way: everybody else goes on."""
    create(client, "sh", "-c", "head -c 3000000 /dev/zero | tr '\\0' x; sleep 1000")
    client.call("POST", "/containers/cc/start")
    stalled = [RawClient(engine.socket) for _ in range(3)]
    stalled[0].send("GET", "/containers/cc/logs?follow=1&stdout=1")
    stalled[1].send("GET", "/events?since=1")
    stalled[2].socket.sendall(b"POST /images/load HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\nhalf")
    create(client, "true", name="dd")
    done: list[int] = []
    worker = threading.Thread(target=lambda: done.append(engine.docker("exec", "cc", "true").returncode))
    worker.start()
    worker.join(30)
    assert done == [0]
    assert client.call("POST", "/containers/cc/kill")[0] == 204
    assert client.call("DELETE", "/containers/cc?force=1")[0] == 204
    assert client.call("DELETE", "/containers/dd")[0] == 204
    for each in stalled:
        each.close()


def test_answers_follow_the_version_that_is_spoken(engine: EngineUnderTest) -> None:
    client = RawClient(engine.socket)

    def at(version: str, path: str) -> Any:
        client.socket.sendall(f"GET /v{version}{path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        status, headers = client.head()
        return status, json.loads(client.body(headers))

    assert "VirtualSize" in at("1.43", "/images/json")[1][0] and "VirtualSize" not in at("1.44", "/images/json")[1][0]
    assert at("1.44", "/images/busybox/json")[1]["ContainerConfig"]["Image"] == ""
    assert at("1.999", "/info")[0] == 400 and at("1.12", "/info")[0] == 400
    assert at("1.24", "/version")[1]["MinAPIVersion"] == "1.24"
    client.close()


def test_what_is_not_there_says_so(client: RawClient) -> None:
    for method, path, text in (
        ("GET", "/images/search?term=x", "searching a registry"),
        ("POST", "/build", "building is not available"),
    ):
        status, answer = client.call(method, path, {})
        assert status == 400 and text in answer["message"], path


def test_engine_and_doctor(engine: EngineUnderTest) -> None:
    shown = raw_get(engine, "/ambi/engine")
    assert shown["pid"] == engine.pid and shown["data_root"] == str(engine.data) and shown["images"] == 1
    checks = raw_get(engine, "/ambi/doctor")
    assert {"name", "status", "detail", "hint"} == set(checks[0]) and {check["status"] for check in checks} <= {
        "ok",
        "warning",
        "problem",
    }
    stopping = RawClient(engine.socket)
    stopping.socket.sendall(b"POST /ambi/engine/stop HTTP/1.1\r\nHost: x\r\n\r\n")
    assert stopping.head()[0] == 204
    assert engine.process is not None and engine.process.wait(20) == 0
    stopping.close()
    engine.start()


def raw_get(engine: EngineUnderTest, path: str) -> Any:
    client = RawClient(engine.socket)
    client.socket.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    status, headers = client.head()
    assert status == 200, path
    value = json.loads(client.body(headers))
    client.close()
    return value
