#!/usr/bin/env python3
"""How long our monitor takes from its start to the agent's first message, and how often it leaves the kernel, against QEMU.

    scripts/kvm-lab -- scripts/bench/vmm.py [--rounds N] [--cpus N] [--memory MIB] [--against M,..] [--json FILE]

Ours, `qemu-system-x86_64 -M microvm` and `-M q35` boot the same kernel and initramfs on the same KVM, in turn, with the same
CPUs, memory, words and console, and nothing but the agent's channel and a source of entropy. Ours is a copy of a warm
process, as the driver starts it; QEMU is executed, as the driver starts that. Exits to user space are the kernel's own count
(tracepoint kvm:kvm_userspace_exit, by reason: 2 is a port, 6 is MMIO), for root alone. Printed are medians, minima, ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ambi.core.deadline import Deadline  # noqa: E402
from ambi.core.loop import Loop  # noqa: E402
from hyper import boot_files  # noqa: E402
from hyper.guest.client import GuestClient  # noqa: E402
from hyper.guest.protocol import PORT_NAME  # noqa: E402
from hyper.kvm.code import tsc_khz  # noqa: E402
from hyper.vm.words import WORDS  # noqa: E402
from hyper.vmm.config import Config  # noqa: E402
from hyper.vmm.machine import Machine  # noqa: E402

LIMIT_S = 120.0
TRACEFS = Path("/sys/kernel/tracing")
HISTOGRAM = "hist:keys=reason"
MICROVM = ["-M", "microvm,pit=off,pic=off,rtc=on,acpi=on,usb=off,auto-kernel-cmdline=off"]
MICROVM += ["-global", "virtio-mmio.force-legacy=false", "-device", "virtio-serial-device,max_ports=2"]
MICROVM += ["-device", "virtio-rng-device"]
Q35 = ["-M", "q35", "-device", "virtio-serial-pci,max_ports=2", "-device", "virtio-rng-pci"]


class Shape:
    """What all of them boot."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.files = boot_files.find(Path(options.guest_dir))
        self.cpus: int = options.cpus
        self.memory_mib: int = options.memory
        words = [*WORDS, f"tsc_early_khz={tsc_khz()}", *(["noreplace-smp"] if self.cpus == 1 else [])]
        self.words = " ".join(words)


def start_ours(shape: Shape, agent: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        files = shape.files
        config = Config(
            kvm=os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC),
            kernel=os.open(files.kernel, os.O_RDONLY),
            initramfs=os.open(files.initramfs, os.O_RDONLY),
            cmdline=shape.words,
            vcpus=shape.cpus,
            memory_bytes=shape.memory_mib << 20,
            console=os.open("/dev/null", os.O_WRONLY),
            agent=agent,
        )
        machine = Machine(config, Loop())
        machine.boot()
        machine.run()
    finally:
        os._exit(1)


def start_qemu(machine: list[str], shape: Shape, agent: int) -> int:
    words = shape.words if "microvm" in machine[1] else shape.words.replace("pci=off", "").replace("i8042.nopnp", "")
    argv = [
        *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *("-accel", "kvm", "-cpu", "host", "-smp", str(shape.cpus), "-m", f"{shape.memory_mib}M"),
        *("-kernel", str(shape.files.kernel), "-initrd", str(shape.files.initramfs), "-append", words),
        *("-chardev", "null,id=console", "-serial", "chardev:console", *machine),
        *("-chardev", f"socket,id=agent,fd={agent}", "-device", f"virtserialport,nr=1,chardev=agent,name={PORT_NAME}"),
    ]
    return subprocess.Popen(argv, pass_fds=(agent,)).pid


def boot(start: Callable[[Shape, int], int], shape: Shape) -> tuple[float, dict[str, int]]:
    """Seconds to the agent's first message, and exits by reason up to then."""
    ours, theirs = socket.socketpair()
    clear_counts()
    began = time.monotonic()
    pid = start(shape, theirs.fileno())
    theirs.close()
    client = GuestClient(ours)
    try:
        client.connect(Deadline.after(LIMIT_S))
        took = time.monotonic() - began
        return took, counts()
    finally:
        client.close()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def mount_tracefs() -> None:
    subprocess.run(["mount", "-t", "tracefs", "tracefs", str(TRACEFS)], check=False, stderr=subprocess.DEVNULL)


def trigger() -> Path:
    return TRACEFS / "events" / "kvm" / "kvm_userspace_exit" / "trigger"


def clear_counts() -> None:
    for text in (f"!{HISTOGRAM}", HISTOGRAM):
        try:
            trigger().write_text(text)
        except OSError as error:
            if text == HISTOGRAM:
                raise SystemExit(f"no histogram of exits: {trigger()}: {error.strerror}") from error


def counts() -> dict[str, int]:
    text = trigger().with_name("hist").read_text()
    return {reason: int(count) for reason, count in re.findall(r"\{ reason: *(\S+) *\} hitcount: *(\d+)", text)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--guest-dir", default=str(ROOT / "build" / "guest"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--memory", type=int, default=256)
    parser.add_argument("--against", default="microvm,q35", help="machines of QEMU: microvm, q35 (default: both)")
    parser.add_argument("--json")
    options = parser.parse_args()
    mount_tracefs()
    shape = Shape(options)
    contenders: dict[str, Callable[[Shape, int], int]] = {"ours": start_ours}
    for name in options.against.split(","):
        contenders[name] = partial(start_qemu, {"microvm": MICROVM, "q35": Q35}[name])
    times: dict[str, list[float]] = {name: [] for name in contenders}
    exits: dict[str, dict[str, int]] = {}
    for number in range(options.rounds):
        for name, start in contenders.items():
            took, found = boot(start, shape)
            times[name].append(took)
            exits[name] = found
            print(f"{number + 1} {name:8} {took:6.2f} s  {sum(found.values()):6} exits  {found}", flush=True)
    report(times, exits)
    if options.json:
        Path(options.json).write_text(json.dumps({"seconds": times, "exits": exits}, indent=1) + "\n")
    return 0


def report(times: dict[str, list[float]], exits: dict[str, dict[str, int]]) -> None:
    ours = times["ours"]
    for name, found in times.items():
        ratio = statistics.median(a / b for a, b in zip(ours, found, strict=True))
        number = sum(exits[name].values())
        share = sum(exits["ours"].values()) / number
        print(
            f"{name:8} median {statistics.median(found):.2f} s, least {min(found):.2f} s; ours is {ratio:.2f} of it;"
            f" {number} exits to user space, ours {share:.2f} of them"
        )


if __name__ == "__main__":
    sys.exit(main())
