"""Docker Compose of both generations and testcontainers, unmodified, told of nothing but the engine's socket."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ambi.network import namespaces
from tests import composekit
from tests.composekit import Compose
from tests.harness import ROOT, EngineUnderTest

FILES = Path(__file__).parent / "files"
VM = Path(__file__).parent / "compose" / "vm.yaml"
SECONDS = 20.0


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, busybox_tar: Path) -> Iterator[EngineUnderTest]:
    it = EngineUnderTest(tmp_path_factory.mktemp("compose"))
    try:
        it.start()
        it.load_busybox(busybox_tar, "bb")
        composekit.make_image(it.socket, "bb")
        yield it
    finally:
        it.destroy()


Start = Callable[..., Compose]


@pytest.fixture(
    params=[
        pytest.param(composekit.version_1, id="compose-1", marks=pytest.mark.needs("compose-1")),
        pytest.param(composekit.version_2, id="compose-2", marks=pytest.mark.needs("compose-2")),
    ]
)
def start(request: pytest.FixtureRequest, engine: EngineUnderTest) -> Iterator[Start]:
    """A factory of projects; whatever of them is left at the end of the test is taken down."""
    started: list[Compose] = []

    def make(name: str, **options: Any) -> Compose:
        started.append(Compose(request.param(), engine.socket, name, **options))
        return started[-1]

    yield make
    for project in started:
        project.run("down", "-v")


def out(engine: EngineUnderTest, *args: str) -> str:
    done = engine.docker(*args)
    assert done.returncode == 0, (args, done.stderr)
    return done.stdout.decode().strip()


def ids(engine: EngineUnderTest, service: str) -> list[str]:
    """Of what runs for a service, in either generation's naming."""
    return out(engine, "ps", "-q", "--no-trunc", "--filter", f"label=com.docker.compose.service={service}").split()


def inspect(engine: EngineUnderTest, id: str) -> dict[str, Any]:
    shown: dict[str, Any] = json.loads(out(engine, "inspect", id))[0]
    return shown


def page(engine: EngineUnderTest, path: str = "/cgi-bin/ask") -> str:
    """What the project's web server says on its published port, asked from the engine's host."""
    bindings = inspect(engine, ids(engine, "web")[0])["NetworkSettings"]["Ports"]["80/tcp"]
    port = int(bindings[0]["HostPort"])

    def ask() -> str:
        with socket.create_connection(("127.0.0.1", port), 10) as client:
            client.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            return b"".join(iter(lambda: client.recv(4096), b"")).decode().partition("\r\n\r\n")[2]

    end = time.monotonic() + SECONDS
    while True:  # the program inside listens a moment after its start
        try:
            if answer := namespaces.inside(engine.netns, ask):
                return answer
        except ConnectionError:
            pass
        assert time.monotonic() < end
        time.sleep(0.2)


def nothing_is_left(engine: EngineUnderTest) -> None:
    assert out(engine, "ps", "-aq") == ""
    assert sorted(out(engine, "network", "ls", "--format", "{{.Name}}").split()) == ["bridge", "host", "none"]
    assert out(engine, "volume", "ls", "-q") == ""


def test_a_project_lives(engine: EngineUnderTest, start: Start) -> None:
    """Health before dependants, names, an internal network, copy-up, ports; scale; then what changes is made anew."""
    project = start("life", port=0)
    project.ok("up", "-d")
    (store,), (web,) = ids(engine, "store"), ids(engine, "web")
    health = inspect(engine, store)["State"]["Health"]
    assert health["Status"] == "healthy"
    assert inspect(engine, web)["State"]["StartedAt"] > inspect(engine, store)["State"]["StartedAt"]
    assert page(engine) == "hello, from the image\n"  # by name, from a volume that was filled from the image

    asked = project.ok("exec", "-T", "worker", "wget", "-q", "-O", "-", "http://site/cgi-bin/ask")
    assert asked == "hello, from the image\n"
    unknown = project.run("exec", "-T", "worker", "nslookup", "store")
    assert unknown.returncode != 0 and "NXDOMAIN" in unknown.stdout
    route = project.ok("exec", "-T", "store", "ip", "route")
    assert "default" not in route and "dev eth0" in route
    assert "working" in project.ok("logs", "worker") and "starting" in project.ok("logs", "store")
    assert "httpd -f -p 8000" in project.ok("top", "store")
    assert project.ok("port", "web", "80").strip() == "127.0.0.1:" + out(engine, "port", web, "80").rpartition(":")[2]

    project.ok("exec", "-T", "store", "sh", "-c", "echo kept > /srv/index.html")
    changed = {"GREETING": "good morning"}
    project.ok("up", "-d", "--scale", "worker=3", **changed)
    assert ids(engine, "store") == [store] and len(ids(engine, "worker")) == 3
    assert len(ids(engine, "web")) == 1 and ids(engine, "web") != [web]
    assert page(engine) == "good morning, kept\n"
    listed = project.ok("ps", **changed)
    assert all(listed.count(word) >= times for word, times in (("store", 1), ("web", 1), ("worker", 3), ("->80/tcp", 1)))

    before = {service: ids(engine, service) for service in ("store", "web", "worker")}
    project.ok("stop", **changed)
    assert out(engine, "ps", "-q") == ""
    project.ok("start", **changed)
    project.ok("restart", "web", **changed)
    assert {service: ids(engine, service) for service in before} == before
    assert page(engine) == "good morning, kept\n"
    project.ok("kill", "worker", **changed)
    assert ids(engine, "worker") == []
    project.ok("rm", "-f", "worker", **changed)
    assert "one-off" in project.ok("run", "--rm", "--no-deps", "worker", "echo", "one-off")
    assert "worker" not in out(engine, "ps", "-a", "--format", "{{.Names}}")

    project.ok("down", "-v", **changed)
    nothing_is_left(engine)


@pytest.mark.needs("qemu", "compose-2")
def test_a_service_that_is_a_vm(engine: EngineUnderTest) -> None:
    """The store is a VM and nothing else changes: its health, its volume, and its name for a container."""
    project = Compose(composekit.version_2(), engine.socket, "mixed", port=0, files=(VM,))
    try:
        project.ok("up", "-d")
        (store,) = ids(engine, "store")
        assert inspect(engine, store)["HostConfig"]["Runtime"] == "vm"
        assert project.ok("exec", "-T", "store", "cat", "/proc/sys/kernel/hostname").strip() == store[:12]
        assert page(engine) == "hello, from the image\n"
        assert "httpd -f -p 8000" in project.ok("top", "store")
    finally:
        project.ok("down", "-v", "-t", "0")
    nothing_is_left(engine)


def test_containers_in_tests(engine: EngineUnderTest) -> None:
    """testcontainers: a network with aliases, a port, logs that are waited for, exec, a shared directory."""
    environment = {**os.environ, "DOCKER_HOST": f"unix://{engine.socket}", "TESTCONTAINERS_RYUK_DISABLED": "true"}
    argv = [*engine.entering, sys.executable, str(FILES / "containers_in_tests.py")]
    done = subprocess.run(argv, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    nothing_is_left(engine)
