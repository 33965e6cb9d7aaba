"""What networks cost: ours against dockerd, side by side in one private network namespace with both engines' own bridges.

Usage: .venv/bin/python scripts/bench/network.py [--rounds N] [--json FILE] [NAME ...]

One round does each thing once with either engine, in turn; medians, and their ratio (below 1: ours is faster; of throughput,
above 1 is). The docker command is the client of both: its own start is part of every command's time.

run         `docker run --rm` of /bin/true on the default bridge
publish     the same with a published port
network     `docker network create` and `rm`
parallel    20 containers on one network, started by 20 connections at once
tcp         iperf3 between two containers on one network, gigabits a second
port        one byte there and back through a published port on 127.0.0.1, microseconds; a new connection with it
compose     the project of tests/cli/compose: up until healthy, and down -v
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ambi.linux import process  # noqa: E402
from ambi.network import namespaces  # noqa: E402
from tests import composekit  # noqa: E402
from tests.harness import EngineUnderTest  # noqa: E402
from tests.peers import Dockerd  # noqa: E402
from tests.rootfs import busybox_tar  # noqa: E402

PARALLEL = 20
ROUND_TRIPS = 1000
CONNECTIONS = 100
WARM_UP = 1


class Side:
    """One of the two engines, by its socket."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path

    def docker(self, *args: str) -> str:
        environment = {**os.environ, "DOCKER_HOST": f"unix://{self.path}"}
        done = subprocess.run(
            ["docker", *args], check=False, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 0, (self.name, args, done.stderr)
        return done.stdout.strip()

    def timed(self, *args: str) -> float:
        begin = time.perf_counter()
        self.docker(*args)
        return (time.perf_counter() - begin) * 1000

    def start(self, id: str) -> None:
        connection = http.client.HTTPConnection("engine")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(self.path))
        connection.request("POST", f"/containers/{id}/start", headers={"Content-Length": "0"})
        answer = connection.getresponse()
        assert answer.status == 204, (self.name, answer.read())
        connection.close()

    def pid(self, id: str) -> str:
        return self.docker("inspect", "-f", "{{.State.Pid}}", id)


def run(side: Side) -> dict[str, float]:
    return {"ms": side.timed("run", "--rm", "bb", "true")}


def publish(side: Side) -> dict[str, float]:
    return {"ms": side.timed("run", "--rm", "-p", "127.0.0.1:0:80", "bb", "true")}


def network(side: Side) -> dict[str, float]:
    name = f"n{secrets.token_hex(4)}"
    return {"create ms": side.timed("network", "create", name), "rm ms": side.timed("network", "rm", name)}


def parallel(side: Side) -> dict[str, float]:
    side.docker("network", "create", "many")
    ids = [side.docker("create", "--network", "many", "bb", "sleep", "1000") for _ in range(PARALLEL)]
    threads = [threading.Thread(target=side.start, args=(id,)) for id in ids]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = (time.perf_counter() - begin) * 1000
    running = side.docker("ps", "-q", "--filter", "network=many").split()
    assert len(running) == PARALLEL, (side.name, len(running))
    side.docker("rm", "-f", *ids)
    side.docker("network", "rm", "many")
    return {"ms": took}


def tcp(side: Side) -> dict[str, float]:
    """iperf3 of the host in the containers' namespaces, so both engines carry the same program."""
    side.docker("network", "create", "pair")
    ids = [side.docker("run", "-d", "--network", "pair", "bb", "sleep", "1000") for _ in range(2)]
    server, client = (side.pid(id) for id in ids)
    address = side.docker("inspect", "-f", "{{.NetworkSettings.Networks.pair.IPAddress}}", ids[0])
    enter = ["nsenter", "--net=/proc/{}/ns/net", "--", "iperf3"]
    with subprocess.Popen(
        [word.format(server) for word in enter] + ["-s", "-1", "--forceflush"], stdout=subprocess.PIPE, text=True
    ) as listening:
        assert listening.stdout is not None
        assert any("listening" in line for line in iter(listening.stdout.readline, "")), side.name
        send = [word.format(client) for word in enter] + ["-c", address, "-t", "2", "-J"]
        done = subprocess.run(send, check=False, capture_output=True, text=True)
        assert done.returncode == 0, (side.name, done.stdout[-500:])
        listening.stdout.read()
    side.docker("rm", "-f", *ids)
    side.docker("network", "rm", "pair")
    return {"Gbit/s": json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"] / 1e9}


def port(side: Side) -> dict[str, float]:
    """The program that answers is a thread here, with a socket of the container's namespace: no fork is measured."""
    id = side.docker("run", "-d", "-p", "127.0.0.1:0:7", "bb", "sleep", "1000")
    number = int(side.docker("port", id, "7").rpartition(":")[2])
    fd = os.open(f"/proc/{side.pid(id)}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    with namespaces.inside(fd, lambda: socket.create_server(("0.0.0.0", 7), backlog=CONNECTIONS)) as listener:
        os.close(fd)
        server = threading.Thread(target=answer, args=(listener, CONNECTIONS + 2), daemon=True)
        server.start()
        try:
            echo(number, 1)
        except OSError as error:
            raise RuntimeError(f"{side.name}: port {number} of the container does not answer: {error}") from error
        trips = echo(number, ROUND_TRIPS)
        connections = [sum(echo(number, 1, whole=True)) for _ in range(CONNECTIONS)]
        server.join()
    side.docker("rm", "-f", id)
    return {"round trip us": statistics.median(trips), "connection us": statistics.median(connections)}


def answer(listener: socket.socket, clients: int) -> None:
    """Give each of `clients`, one after the other, every byte back."""
    for _ in range(clients):
        client, _address = listener.accept()
        with client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while data := client.recv(1):
                client.send(data)


def echo(number: int, times: int, *, whole: bool = False) -> list[float]:
    """Microseconds of each of `times` bytes there and back; whole: with the time to connect."""
    taken, begin = [], time.perf_counter()
    with socket.create_connection(("127.0.0.1", number), 10) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(times):
            begin = begin if whole else time.perf_counter()
            client.send(b"x")
            assert client.recv(1) == b"x"
            taken.append((time.perf_counter() - begin) * 1e6)
    return taken


def compose(side: Side) -> dict[str, float]:
    project = composekit.Compose(composekit.version_2(), side.path, "bench", port=0)
    begin = time.perf_counter()
    project.ok("up", "-d", "--wait")
    middle = time.perf_counter()
    project.ok("down", "-v")
    return {"up ms": (middle - begin) * 1000, "down ms": (time.perf_counter() - middle) * 1000}


SUBJECTS: dict[str, Callable[[Side], dict[str, float]]] = {
    "run": run, "publish": publish, "network": network, "parallel": parallel, "tcp": tcp, "port": port, "compose": compose,
}  # fmt: skip
SLOW = frozenset(("parallel", "tcp", "port", "compose"))  # a quarter of the rounds


def measure(names: list[str], sides: tuple[Side, Side], rounds: int) -> dict[str, Any]:
    """`{"run ms": {"ambi": MEDIAN, "dockerd": MEDIAN, "ratio": R}, ...}`."""
    result: dict[str, Any] = {}
    for name in names:
        times: dict[str, dict[str, list[float]]] = {}
        for number in range((max(1, rounds // 4) if name in SLOW else rounds) + WARM_UP):
            for side in sides:
                for unit, value in SUBJECTS[name](side).items():
                    if number >= WARM_UP:
                        times.setdefault(f"{name} {unit}", {}).setdefault(side.name, []).append(value)
        for title, by_side in times.items():
            row = {side: statistics.median(values) for side, values in by_side.items()}
            result[title] = {**row, "ratio": row["ambi"] / row["dockerd"]}
            print(f"{title:24} " + "  ".join(f"{key} {value:9.2f}" for key, value in result[title].items()), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SUBJECTS)}; all by default")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if wrong := set(options.names) - set(SUBJECTS):
        parser.error(f"no such measurement: {', '.join(sorted(wrong))}")
    process.unshare(process.CLONE_NEWNET)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    base = Path(tempfile.mkdtemp(prefix="ambi-bench-", dir="/tmp"))
    engine, peer = EngineUnderTest(base / "ambi"), Dockerd()
    os.close(engine.netns)
    engine.netns = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    peer.options = ()
    try:
        tar = busybox_tar(base / "busybox.tar")
        engine.start(vm=False)
        with peer:
            sides = Side("ambi", engine.socket), Side("dockerd", peer.socket)
            for side in sides:
                side.docker("import", str(tar), "bb")
                composekit.make_image(side.path, "bb")
            result = measure(options.names or list(SUBJECTS), sides, options.rounds)
    finally:
        engine.destroy()
        shutil.rmtree(base, ignore_errors=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
