#!/usr/bin/env python3
"""From the call of the driver to the first byte of a VM's process: booted and from a template, by our monitor and by QEMU.

    scripts/kvm-lab --mem 3072 -- scripts/bench/restore.py [--rounds N] [--only NAME,..] [--memory MIB] [--cpus N]
                                                           [--json FILE]

All have the same kernel, initramfs, disks, NIC and workload, and are measured in turn, behind one that is not counted;
a container of the same image is beside them. What a start is made of is shown by spans: when each step was done, in
milliseconds from the call. Behind them the kernel's own counts for the whole start, from debugfs: exits, those to user space
(tracepoint), page faults of the guest (pf_fixed), and faults of the VMM's process. Memory is the VMM's PSS once the workload
waits, `exec` the time of `true` in it. QEMU's template is its own best: the memory a private mapping of a file, not read.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ambi.core.model import VmShape  # noqa: E402
from ambi.core.plan import LaunchPlan  # noqa: E402
from hyper import backends  # noqa: E402
from hyper.vm import jail, template, template_store  # noqa: E402
from hyper.vm.link import Link  # noqa: E402
from hyper.vm.machine import VirtualMachine  # noqa: E402
from hyper.vmm import filter as syscalls  # noqa: E402
from hyper.vmm import main as vmm_main  # noqa: E402
from hyper.vmm import start as vmm_start  # noqa: E402
from hyper.vmm.machine import Machine  # noqa: E402
from scripts.bench.vmm import clear_counts, counts, mount_tracefs  # noqa: E402
from tests import driverkit, netkit, rootfs  # noqa: E402

LIMIT_S = 120.0
DEBUGFS = Path("/sys/kernel/debug")
STEPS = (
    "open", "fork", "jail", "vm", "state", "filter", "resume", "resumed", "agent", "hello", "nic", "mounts", "process",
    "first",
)  # fmt: skip
KINDS = {  # of VMs: the monitor, and whether from a template
    "vm": (backends.OURS, "on"),
    "vm-boot": (backends.OURS, "off"),
    "qemu": (backends.QEMU, "on"),
    "qemu-boot": (backends.QEMU, "off"),
}
ANSWERS = ("hello", "nic", "mounts", "process")  # of the agent, in this order


class Marks:
    """When each step was done, in memory that the processes forked from this one share."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, mmap.PAGESIZE)
        self._answers = 0

    def begin(self) -> None:
        self._map[:] = bytes(len(self._map))
        self._answers = 0
        self.begun = time.monotonic_ns()

    def mark(self, step: str) -> None:
        struct.pack_into("<q", self._map, 8 * STEPS.index(step), time.monotonic_ns())

    def answered(self) -> None:
        if self._answers < len(ANSWERS):
            self.mark(ANSWERS[self._answers])
        self._answers += 1

    def milliseconds(self) -> dict[str, float]:
        times = struct.unpack_from(f"<{len(STEPS)}q", self._map)
        return {step: round((at - self.begun) / 1e6, 1) for step, at in zip(STEPS, times, strict=True) if at}


def behind(owner: Any, name: str, then: Callable[..., None], *, before: bool = False) -> None:
    """Have `then` called with the arguments of owner.name, after it or before."""
    real = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before:
            then(*args)
        try:
            return real(*args, **kwargs)
        finally:
            if not before:
                then(*args)

    setattr(owner, name, wrapped)


def instrument(marks: Marks) -> None:
    """Both back-ends have `agent` and what follows; the monitor's own steps are ours alone."""
    behind(template_store.Store, "open", lambda *_: marks.mark("open"))
    behind(jail, "fork", lambda *_: marks.mark("fork"))
    behind(vmm_start, "_become", lambda *_: marks.mark("jail"), before=True)
    behind(Machine, "__init__", lambda *_: marks.mark("vm"))
    behind(vmm_main, "_begin", lambda *_: marks.mark("state"))
    behind(syscalls, "load", lambda *_: marks.mark("filter"))
    behind(Machine, "resume", lambda *_: marks.mark("resume"))
    behind(template, "start", lambda *_: marks.mark("resumed"))
    behind(Link, "sync", lambda *_: marks.mark("agent"))
    behind(Link, "_dispatch", lambda _, message: marks.answered() if message.kind.name in ("OK", "HELLO_OK") else None)


class Bench:
    """One image, one network, and a machine of each kind after the other."""

    def __init__(self, work: Path, options: argparse.Namespace, lab: netkit.Lab) -> None:
        tree = driverkit.unpack(rootfs.busybox_tar(work / "busybox.tar"), work / "tree")
        layer = driverkit.make_layer(tree, "erofs", work / "base.erofs")
        (work / "containers").mkdir()
        self._rigs = {
            "vm": driverkit.Rig("vm", work, (layer,), Path(options.guest_dir)),
            "container": driverkit.Rig("container", work / "containers", (driverkit.make_layer(tree, "dir", tree),), work),
        }
        self._lab = lab
        self._shape = VmShape(vcpus=options.cpus, memory_bytes=options.memory << 20)
        self._number = 0
        self._marks = Marks()
        instrument(self._marks)

    def _plan(self, rig: driverkit.Rig) -> LaunchPlan:
        """Of a process that says one line, in a network namespace of its own with an interface, as of `run --rm`."""
        self._number += 1
        place = self._lab.instance(netkit.network(f"10.90.{self._number % 250}.0/24", name=f"bench{self._number}"))
        plan = rig.plan(["sh", "-c", "echo up; exec sleep 1000"], annotations={"ambi.disposable": "1"})
        for entry in plan.config["linux"]["namespaces"]:
            if entry["type"] == "network":
                entry["path"] = f"/proc/{os.getpid()}/fd/{place.fd}"
        return plan._replace(vm=self._shape) if rig.name == "vm" else plan

    def run(self, kind: str) -> dict[str, Any]:
        rig = self._rigs["container" if kind == "container" else "vm"]
        os.environ[backends.CHOICE], os.environ[template.CHOICE] = KINDS.get(kind, ("", ""))
        plan = self._plan(rig)
        clear_counts()
        self._marks.begin()
        with rig.started_plan(plan) as running:
            running.init.until(lambda: running.init.out, LIMIT_S)
            self._marks.mark("first")
            found: dict[str, Any] = {"spans": self._marks.milliseconds()}
            found["first_byte_s"] = found["spans"]["first"] / 1000
            if kind != "container":
                assert isinstance(running.created, VirtualMachine)
                pid = running.created._parts.monitor.child.pid
                found |= {"to_user_space": sum(counts().values()), **kernel_counts(pid), "faults": faults(pid)}
            else:
                pid = running.created.init.pid
                running.exec(["true"])  # by then the shell has become `sleep`
            found["pss_mib"], found["private_mib"] = memory(pid)
            before = time.monotonic()
            assert running.exec(["true"]).code == 0
            found["exec_s"] = time.monotonic() - before
            return found


def kernel_counts(pid: int) -> dict[str, int]:
    """KVM's statistics of the VM of this process."""
    homes = list((DEBUGFS / "kvm").glob(f"{pid}-*"))
    found: dict[str, int] = {}
    for name in ("exits", "pf_fixed", "pf_taken", "halt_exits", "irq_injections"):
        files = [home / name for home in homes] + [file for home in homes for file in home.glob(f"vcpu*/{name}")]
        found[name] = sum(int(file.read_text()) for file in files if file.exists())
    return found


def faults(pid: int) -> int:
    """Minor page faults of a process and its threads, those that KVM causes among them."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])


def memory(pid: int) -> tuple[float, float]:
    """PSS and private pages of a process, in MiB."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    sizes = {name: int(size) / 1024 for name, size in (line.split()[:2] for line in text.splitlines()[1:])}
    return sizes["Pss:"], sizes["Private_Dirty:"] + sizes["Private_Clean:"]


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    work = Path(tempfile.mkdtemp(prefix="ambi-bench-", dir="/tmp"))
    try:
        yield work
    finally:
        shutil.rmtree(work)


def report(results: dict[str, list[dict[str, Any]]]) -> None:
    names = ["first_byte_s", "exec_s", "pss_mib", "private_mib", "to_user_space", "exits", "pf_fixed", "faults"]
    for kind, rounds in results.items():
        found = {name: [round_[name] for round_ in rounds if name in round_] for name in names}
        print(f"{kind:10}", "  ".join(f"{name} {_text(values)}" for name, values in found.items() if values))
        spans = {step: statistics.median(r["spans"][step] for r in rounds) for step in rounds[0]["spans"]}
        print(" " * 10, "  ".join(f"{step} {at:.0f}" for step, at in sorted(spans.items(), key=lambda item: item[1])))
    for ours, other in (("vm", "vm-boot"), ("vm", "qemu"), ("vm-boot", "qemu-boot"), ("container", "vm")):
        if ours in results and other in results:
            pairs = zip(results[ours], results[other], strict=True)
            ratio = statistics.median(a["first_byte_s"] / b["first_byte_s"] for a, b in pairs)
            least = min(r["first_byte_s"] for r in results[ours]) / min(r["first_byte_s"] for r in results[other])
            print(f"first byte, {ours} of {other}: {ratio:.3f}; of minima {least:.3f}")


def _text(values: list[float]) -> str:
    return f"{statistics.median(values):.4g} (least {min(values):.4g})"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--guest-dir", default=str(ROOT / "build" / "guest"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join((*KINDS, "container")))
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--memory", type=int, default=256, metavar="MIB")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    mount_tracefs()
    subprocess.run(["mount", "-t", "debugfs", "debugfs", DEBUGFS], check=False, stderr=subprocess.DEVNULL)
    kinds = options.only.split(",")
    results: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    with scratch() as work, netkit.Lab() as lab, driverkit.layers_namespace():
        bench = Bench(work, options, lab)
        for number in range(options.rounds + 1):
            for kind in kinds:
                found = bench.run(kind)
                print(number, kind, json.dumps(found), file=sys.stderr, flush=True)
                if number:
                    results[kind].append(found)
    report(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
