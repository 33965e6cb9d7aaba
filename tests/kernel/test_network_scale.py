"""50 networks and 100 instances at once: all reach whom they should, the engine dies meanwhile, and nothing is left."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ambi.network import namespaces
from tests.harness import EngineUnderTest
from tests.rawclient import RawClient

NETWORKS, EACH, CLIENTS, SECONDS = 50, 2, 8, 60.0


@pytest.fixture
def engine(busybox_tar: Path) -> Iterator[EngineUnderTest]:
    it = EngineUnderTest(Path(tempfile.mkdtemp(prefix="ambi-", dir="/tmp")))
    try:
        it.start(vm=False)
        it.load_busybox(busybox_tar)
        yield it
    finally:
        it.destroy()


def call(engine: EngineUnderTest, method: str, path: str, body: Any = None) -> Any:
    client = RawClient(engine.socket)
    with client.socket:
        status, answer = client.call(method, path, body)
    assert status < 300, (method, path, status, answer)
    return answer


def start(engine: EngineUnderTest, number: int) -> None:
    """Instance `number` on network `number // EACH`, with a published port; it says its number to whoever connects."""
    network = f"net{number // EACH}"
    host = {"NetworkMode": network, "PortBindings": {"80/tcp": [{"HostPort": str(10000 + number)}]}}
    body = {"Image": "busybox", "Cmd": ["nc", "-ll", "-p", "80", "-e", "echo", str(number)], "HostConfig": host}
    call(engine, "POST", f"/containers/create?name=i{number}", body)
    call(engine, "POST", f"/containers/i{number}/start")


def fetch(engine: EngineUnderTest, number: int) -> str:
    """What instance `number` says by its published port; asked until its program listens."""

    def ask() -> str:
        end = time.monotonic() + SECONDS
        while True:
            try:
                with socket.create_connection(("127.0.0.1", 10000 + number), timeout=10) as sock:
                    if said := sock.recv(100):
                        return said.decode().strip()
            except OSError:
                assert time.monotonic() < end, number
            time.sleep(0.2)

    return namespaces.inside(engine.netns, ask)


def links(engine: EngineUnderTest) -> set[str]:
    return namespaces.inside(engine.netns, lambda: {name for _, name in socket.if_nameindex()})


def settled(look: Callable[[], object], wanted: object) -> None:
    """`look()` becomes `wanted`."""
    end = time.monotonic() + SECONDS
    while (found := look()) != wanted:
        assert time.monotonic() < end, found
        time.sleep(0.2)


def elements(engine: EngineUnderTest) -> list[str]:
    """What our table has for networks of the test and their ports."""
    argv = [*engine.entering, "nft", "list", "ruleset"]
    shown = subprocess.run(argv, capture_output=True, check=True, text=True).stdout
    return re.findall(r"10\.\d+\.0\.\S+", shown)


def test_fifty_networks_and_a_hundred_instances(engine: EngineUnderTest) -> None:
    numbers = range(NETWORKS * EACH)
    with ThreadPoolExecutor(CLIENTS) as pool:

        def each(what: Any, over: range = numbers) -> list[Any]:
            return list(pool.map(what, over))

        def network(number: int) -> str:
            ipam = {"Config": [{"Subnet": f"10.{number}.0.0/24"}]}
            return str(call(engine, "POST", "/networks/create", {"Name": f"net{number}", "IPAM": ipam})["Id"])

        ids = each(network, range(NETWORKS))
        each(lambda number: start(engine, number))
        bridges = {f"ambi-{id[:10]}" for id in ids}
        assert bridges <= links(engine)
        assert len([name for name in links(engine) if name.startswith("vea")]) == len(numbers)
        assert each(lambda number: fetch(engine, number)) == [str(number) for number in numbers]
        assert len(elements(engine)) > len(numbers)
        answer = engine.docker("exec", "i7", "nc", "-w", "5", "i6", "80")
        assert answer.stdout == b"6\n", "the other one of its network has a name"
        apart = engine.docker("exec", "i7", "nc", "-w", "1", "10.0.0.2", "80")
        assert apart.returncode != 0, "networks are apart"

        engine.kill()
        engine.start(vm=False)
        assert each(lambda number: fetch(engine, number)) == [str(number) for number in numbers]
        each(lambda number: call(engine, "DELETE", f"/containers/i{number}?force=1"))
        each(lambda number: call(engine, "DELETE", f"/networks/net{number}"), range(NETWORKS))

    settled(lambda: {name for name in links(engine) if not name.startswith("ambi0")}, {"lo"})
    settled(lambda: elements(engine), [])
    assert engine.shims() == {}
    assert list((engine.run / "instances").iterdir()) == list((engine.data / "instances").iterdir()) == []
    assert engine.process is not None
    os.kill(engine.process.pid, signal.SIGTERM)
    engine.process.wait(SECONDS)
    assert links(engine) == {"lo"}
