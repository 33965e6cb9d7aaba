#!/usr/bin/env python3
"""What it costs that a VM's tap is joined to its veth by redirection (tc), and not attached to the bridge itself.

    scripts/bench/nic.py [--guest-dir DIR] [--rounds N] [--megabytes N] [--frames-only] [--json FILE]

One bridge, another instance on it, and one tap, which is moved from the one place to the other and back: so the VM, its
guest and the tap are the same, and everything is measured in pairs.

frame       a frame written into the tap until it is dropped at the other instance, nanoseconds: the whole way is in the
            write itself, and no guest takes part. Of 60 and of 1514 bytes
to, from    TCP from the guest to the other instance and back, MB/s, by busybox's nc
trip        one byte from the other instance to the guest and back, microseconds

Printed are medians of all rounds (frame: of their minima), and the ratio of the redirected to the attached: of rates, below
1 is a loss, of times, above 1.
"""

from __future__ import annotations

import argparse
import json
import os
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

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ambi.linux import netlink, tap  # noqa: E402
from ambi.network.host import link_of  # noqa: E402
from hyper.vm import nic  # noqa: E402
from tests import driverkit, netkit, rootfs  # noqa: E402

BATCH, BATCHES = 500, 20
TRIPS = 300
ETH_P_LOCAL = b"\x88\xb5"  # IEEE 802: for experiments; nobody takes it
VNET_HDR = bytes(10)  # struct virtio_net_hdr
PORT = 5001
WAYS = ("redirected", "attached")


class Bench:
    """A bridge in a namespace, a peer on it, and the namespace of a VM, in which the tap `name` is."""

    def __init__(self, lab: netkit.Lab) -> None:
        self.lab = lab
        self.net = netkit.network("10.80.0.0/24")
        self.peer, self.place = lab.instance(self.net), lab.instance(self.net)
        self.name = f"{nic.TAP_PREFIX}0"
        self.way = ""

    def go(self, way: str) -> None:
        """Have the tap where `way` says; it begins, unjoined, in the namespace."""
        if self.way == "attached":
            self._ip(self.lab.host, "link", "set", self.name, "nomaster", "netns", f"/proc/{os.getpid()}/fd/{self.place.fd}")
        elif self.way == "redirected":
            self.place.do(self._part)
        if way == "attached":
            self._ip(self.place, "link", "set", self.name, "netns", f"/proc/{os.getpid()}/fd/{self.lab.host.fd}")
            self._ip(self.lab.host, "link", "set", self.name, "master", link_of(self.net, ""), "up")
        else:
            self.place.do(self._join)
        self.way = way

    @staticmethod
    def _ip(where: netkit.Place, *args: str) -> None:
        where.do(subprocess.run, ["ip", *args], check=True)

    def _join(self) -> None:
        route, veth, end = netlink.Netlink(), socket.if_nametoindex("eth0"), socket.if_nametoindex(self.name)
        route.set_link(end, mtu=1500)
        route.redirect(veth, end)
        route.redirect(end, veth)
        route.close()

    def _part(self) -> None:
        route = netlink.Netlink()
        for name in ("eth0", self.name):
            try:
                route.stop_redirecting(socket.if_nametoindex(name))
            except FileNotFoundError:
                continue
        route.close()


def frame_ns(bench: Bench, fd: int, size: int) -> float:
    """The least of some batches, of one frame."""
    head = bytes.fromhex(bench.peer.nic.mac.replace(":", "") + bench.place.nic.mac.replace(":", "")) + ETH_P_LOCAL
    data = VNET_HDR + head.ljust(size, b"\0")
    taken = []
    for _ in range(BATCHES):
        begin = time.perf_counter_ns()
        for _ in range(BATCH):
            os.write(fd, data)
        taken.append((time.perf_counter_ns() - begin) / BATCH)
    return min(taken)


def frames(rounds: int) -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = {}
    with netkit.Lab() as lab:
        bench = Bench(lab)
        fd = bench.place.do(tap.reserve)
        try:
            bench.place.do(tap.make, fd, bench.name)
            os.set_blocking(fd, True)
            for _ in range(rounds):
                for way in WAYS:
                    bench.go(way)
                    for size in (60, 1514):
                        found.setdefault(f"frame {size} ns", {}).setdefault(way, []).append(frame_ns(bench, fd, size))
        finally:
            os.close(fd)
    return found


def received(listener: socket.socket) -> tuple[int, float]:
    """Bytes of one connection, and seconds from its first byte to its end."""
    client, _ = listener.accept()
    client.settimeout(120)
    total, begin = 0, 0.0
    with client:
        while data := client.recv(1 << 18):
            begin = begin or time.perf_counter()
            total += len(data)
    return total, time.perf_counter() - begin


def to_peer(bench: Bench, running: driverkit.Running, megabytes: int) -> float:
    result: list[tuple[int, float]] = []
    with bench.peer.do(socket.create_server, ("0.0.0.0", PORT)) as listener:
        listener.settimeout(60)
        server = threading.Thread(target=lambda: result.append(received(listener)))
        server.start()
        send = f"dd if=/dev/zero bs=65536 count={megabytes * 16} 2>/dev/null | nc {bench.peer.ip4} {PORT}"
        done = running.exec(["sh", "-c", send])
        server.join()
    assert done.code == 0 and result[0][0] == megabytes << 20, (done, result)
    return result[0][0] / result[0][1] / 1e6


def connected(bench: Bench) -> socket.socket:
    """To what the guest has just begun to listen with."""
    end = time.monotonic() + 30
    while True:
        client = bench.peer.do(socket.socket)
        client.settimeout(60)
        try:
            client.connect((bench.place.ip4, PORT))
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return client
        except OSError:
            client.close()
            assert time.monotonic() < end, "the guest does not listen"
            time.sleep(0.1)


def from_peer(bench: Bench, running: driverkit.Running, megabytes: int) -> float:
    """Until the guest has counted them and says so."""
    watched = running.start_exec(["sh", "-c", f"nc -l -p {PORT} | wc -c"])
    data = bytes(1 << 18)
    with connected(bench) as client:
        begin = time.perf_counter()
        for _ in range(megabytes * 4):
            client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        client.recv(1)
        taken = time.perf_counter() - begin
    assert int(watched.finish().out) == megabytes << 20
    return (megabytes << 20) / taken / 1e6


def trip_us(bench: Bench, running: driverkit.Running) -> float:
    watched = running.start_exec(["nc", "-l", "-p", str(PORT), "-e", "cat"])
    taken = []
    with connected(bench) as client:
        for _ in range(TRIPS):
            begin = time.perf_counter()
            client.send(b"x")
            assert client.recv(1) == b"x"
            taken.append((time.perf_counter() - begin) * 1e6)
    watched.finish()
    return statistics.median(taken)


def guest(rounds: int, megabytes: int, guest_dir: Path) -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = {}
    base = Path(tempfile.mkdtemp(prefix="ambi-bench-", dir="/tmp"))
    subjects: dict[str, Callable[[Bench, driverkit.Running], float]] = {
        "to MB/s": lambda bench, running: to_peer(bench, running, megabytes),
        "from MB/s": lambda bench, running: from_peer(bench, running, megabytes),
        "trip us": trip_us,
    }
    try:
        tree = driverkit.unpack(rootfs.busybox_tar(base / "busybox.tar"), base / "tree")
        rig = driverkit.Rig("vm", base, (driverkit.make_layer(tree, "erofs", base / "base.erofs"),), guest_dir)
        with netkit.Lab() as lab:
            bench = Bench(lab)
            plan = rig.plan(["sleep", "100000"])
            for entry in plan.config["linux"]["namespaces"]:
                if entry["type"] == "network":
                    entry["path"] = f"/proc/{os.getpid()}/fd/{bench.place.fd}"
            with rig.started_plan(plan) as running:
                bench.way = "redirected"
                for _ in range(rounds):
                    for way in WAYS:
                        bench.go(way)
                        for name, measure in subjects.items():
                            found.setdefault(name, {}).setdefault(way, []).append(measure(bench, running))
                bench.go("redirected")
    finally:
        shutil.rmtree(base, ignore_errors=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guest-dir", type=Path, default=ROOT / "build" / "guest")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=32)
    parser.add_argument("--frames-only", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = frames(options.rounds)
    if not options.frames_only:
        found |= guest(options.rounds, options.megabytes, options.guest_dir)
    result = {}
    for name, values in found.items():
        row = {way: statistics.median(values[way]) for way in WAYS}
        result[name] = {**row, "ratio": row["redirected"] / row["attached"]}
        print(f"{name:16} " + "  ".join(f"{key} {value:10.2f}" for key, value in result[name].items()), flush=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
