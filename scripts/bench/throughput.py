#!/usr/bin/env python3
"""What disks, NIC and console of a VM carry, by our monitor and by QEMU on the same KVM.

    scripts/kvm-lab --mem 3072 -- scripts/bench/throughput.py [--rounds N] [--cpus N] [--json FILE]

One VM of each kind is started with the same image, disks and network; each job is done in one after the other, in turn.
`vm` and `qemu` have vhost, by which the kernel serves the NIC; `-hand` are without, so that our process and QEMU do.

    read 4k     4 KiB at a time from the layers' disk, past the guest's cache      read 1m     1 MiB at a time
    read 4k x8  eight processes that do so                                       write 1m    to the VM's own disk
    tcp out     bytes from the guest to the host, by the NIC                      tcp in      from the host to the guest
    console     what a process writes, by the agent's channel

Printed are MiB a second: medians, and the ratio of medians of pairs; 1 and more is in our favour.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ambi.core.model import VmShape  # noqa: E402
from hyper import backends  # noqa: E402
from hyper.vm import nic  # noqa: E402
from scripts.bench.restore import scratch  # noqa: E402
from tests import driverkit, netkit, rootfs  # noqa: E402

MIB = 1 << 20
FILE_MIB = 64
KINDS = {"vm": (backends.OURS, True), "qemu": (backends.QEMU, True)}
KINDS |= {"vm-hand": (backends.OURS, False), "qemu-hand": (backends.QEMU, False)}
PAIRS = (("vm", "qemu"), ("vm-hand", "qemu-hand"))
NETWORKS = itertools.count()
PORTS = itertools.count(5001)  # listeners stay until the end
SERVED_BY_KERNEL = ("tcp out", "tcp in")  # with vhost


class Machine:
    """A running VM and what is done in it."""

    def __init__(self, running: driverkit.Running, lab: netkit.Lab, gateway: str) -> None:
        self._running, self._lab, self._gateway = running, lab, gateway

    def jobs(self) -> dict[str, float]:
        """MiB a second of each job."""
        dd = "dd iflag=direct of=/dev/null if=/big"
        readers = " & ".join(f"{dd} bs=4k count=250 skip={n * 1000}" for n in range(8))
        return {
            "read 4k": self._shell(f"{dd} bs=4k count=2000", 2000 / 256),
            "read 4k x8": self._shell(f"{readers} & wait", 2000 / 256),
            "read 1m": self._shell(f"{dd} bs=1M count={FILE_MIB}", FILE_MIB),
            "write 1m": self._shell(f"dd if=/dev/zero of=/mine bs=1M count={FILE_MIB} oflag=direct", FILE_MIB),
            "tcp out": self._tcp(out=True),
            "tcp in": self._tcp(out=False),
            "console": self._shell(f"dd if=/dev/zero bs=64k count={FILE_MIB * 16}", FILE_MIB),
        }

    def _shell(self, script: str, mib: float) -> float:
        begun = time.monotonic()
        done = self._running.exec(["sh", "-c", script])
        assert done.code == 0, done.err
        return mib / (time.monotonic() - begun)

    def _tcp(self, *, out: bool) -> float:
        port = next(PORTS)
        server = self._lab.host.listen(port, self._gateway)
        server.settimeout(60)
        size = FILE_MIB * MIB
        times: list[float] = []

        def serve() -> None:
            connection, _ = server.accept()
            begun, left, piece = time.monotonic(), size, bytes(MIB)
            with connection:
                while left and (count := len(connection.recv(MIB)) if out else connection.send(piece[:left])):
                    left -= count
            times.append(time.monotonic() - begun)

        thread = threading.Thread(target=serve)
        thread.start()
        job = f"dd if=/dev/zero bs=64k count={size >> 16}" if out else "dd of=/dev/null bs=64k"
        done = self._running.exec(["sh", "-c", f"nc {self._gateway} {port} -e {job}"])
        thread.join(60)
        assert done.code == 0 and times, done.err
        return FILE_MIB / times[0]


@contextlib.contextmanager
def machine(kind: str, rig: driverkit.Rig, lab: netkit.Lab, cpus: int) -> Iterator[Machine]:
    os.environ[backends.CHOICE], vhost = KINDS[kind]
    place = lab.instance(netkit.network(f"10.91.{next(NETWORKS)}.0/24"))
    plan = rig.plan(["sleep", "100000"], annotations={"ambi.disposable": "1"})
    for entry in plan.config["linux"]["namespaces"]:
        if entry["type"] == "network":
            entry["path"] = f"/proc/{os.getpid()}/fd/{place.fd}"
    real = nic.open_vhost
    if not vhost:
        nic.open_vhost = lambda: None
    try:
        with rig.started_plan(plan._replace(vm=VmShape(vcpus=cpus))) as running:
            yield Machine(running, lab, place.nic.addresses[0].gateway or "")
    finally:
        nic.open_vhost = real


def report(results: dict[str, list[dict[str, float]]]) -> None:
    for ours, other in PAIRS:
        for job in results[ours][0]:
            if "-" in ours and job not in SERVED_BY_KERNEL:
                continue
            pairs = [(a[job], b[job]) for a, b in zip(results[ours], results[other], strict=True)]
            mine, theirs = zip(*pairs, strict=True)
            ratio = statistics.median(a / b for a, b in pairs)
            print(
                f"{job:10} {ours:8} {statistics.median(mine):8.1f} {other:10} {statistics.median(theirs):8.1f}"
                f"  ratio {ratio:.2f}, of the best {max(mine) / max(theirs):.2f}"
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--guest-dir", default=str(ROOT / "build" / "guest"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    with scratch() as work, netkit.Lab() as lab, driverkit.layers_namespace():
        tree = driverkit.unpack(rootfs.busybox_tar(work / "busybox.tar"), work / "tree")
        (tree / "big").write_bytes(os.urandom(MIB) * FILE_MIB)
        rig = driverkit.Rig("vm", work, (driverkit.make_layer(tree, "erofs", work / "base.erofs"),), Path(options.guest_dir))
        for number in range(options.rounds):
            for kind in KINDS:
                with machine(kind, rig, lab, options.cpus) as it:
                    results[kind].append(it.jobs())
                print(number + 1, kind, {job: round(rate, 1) for job, rate in results[kind][-1].items()}, flush=True)
    report(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
