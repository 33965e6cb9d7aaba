#!/usr/bin/env python3
"""How long a VM takes from nothing to the first byte of its workload: booted, from a template, and beside them a container
and a bare QEMU that only reaches its init.

    scripts/bench/vm.py [--guest-dir DIR] [--pairs N] [--json FILE]

All VMs have the same kernel and accelerator, and all are measured in turn. The bare one is `qemu-system-x86_64 -M microvm`
with the kernel words known to be best and an initramfs that is one static program, which writes a line to the console: no
agent, no disks, no modules. Ours is the driver: jail, cgroup, two disks, overlay, agent, and `echo` of a one-layer image.
Printed are medians, minima, CPU seconds of the VMM, the memory (PSS) of one more idle VM, and ratios: a boot is meant to
stay below 1.2 times the bare one's, a start from a template below a quarter of the boot. On a busy machine look at the CPU
time.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from hyper import boot_files, probe  # noqa: E402
from hyper.guest import initramfs  # noqa: E402
from hyper.vm import template  # noqa: E402
from hyper.vm.machine import VirtualMachine  # noqa: E402
from tests import driverkit, rootfs  # noqa: E402

LIMIT_S = 60.0
MARK = b"bare init runs"
INIT = r"""
#include <fcntl.h>
#include <sys/reboot.h>
#include <unistd.h>
int main(void) {
    int console = open("/dev/console", O_WRONLY);
    if (write(console, "bare init runs\n", 15) != 15) return 1;
    reboot(RB_AUTOBOOT);
    return 0;
}
"""
WORDS = (
    "console=ttyS0 quiet reboot=t panic=-1 mitigations=off no_timer_check tsc=reliable tsc_early_khz={khz} 8250.nr_uarts=1 "
    "i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd cryptomgr.notests random.trust_cpu=on rcupdate.rcu_expedited=1 "
    "noreplace-smp"
)


def bare_initramfs(work: Path) -> Path:
    source, program, archive = work / "init.c", work / "init", work / "bare.cpio"
    source.write_text(INIT)
    subprocess.run(["gcc", "-static", "-O2", "-o", program, source], check=True)
    entries = [
        initramfs.directory("dev"),
        initramfs.character_device("dev/console", 5, 1, 0o600),
        initramfs.file("init", program.read_bytes(), 0o755),
    ]
    archive.write_bytes(initramfs.cpio(entries))
    return archive


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used: on a busy machine a better measure than the clock."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def bare(kernel: Path, archive: Path, host: probe.Host) -> tuple[float, float]:
    """Seconds from the start of QEMU to the first line of its init, and of CPU."""
    argv = [
        probe.find_qemu() or "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
        "-M", "microvm,pit=off,pic=off,rtc=on,usb=off", "-accel", "kvm" if host.kvm else "tcg",
        "-cpu", "host" if host.kvm else "qemu64", "-m", "256M", "-kernel", str(kernel), "-initrd", str(archive),
        "-append", WORDS.format(khz=host.tsc_khz), "-serial", "stdio",
    ]  # fmt: skip
    begun = time.monotonic()
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout
        seen = b""
        try:
            while MARK not in seen:
                ready, _, _ = select.select([process.stdout], [], [], LIMIT_S)
                data = os.read(process.stdout.fileno(), 65536) if ready else b""
                if not data:
                    raise RuntimeError(f"the bare VM did not reach its init: {seen.decode('utf-8', 'replace')[-500:]}")
                seen += data
            return time.monotonic() - begun, cpu_seconds(process.pid)
        finally:
            process.kill()


def pss_mib(pid: int) -> float:
    """The memory of a process, pages that it shares with others in parts."""
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pss:")) / 1024


def contained(rig: driverkit.Rig) -> float:
    """Seconds from the call of the driver of containers to the first byte."""
    plan = rig.plan(["sh", "-c", "echo up; exec sleep 1000"])
    begun = time.monotonic()
    with rig.started_plan(plan) as running:
        running.init.until(lambda: running.init.out, LIMIT_S)
        return time.monotonic() - begun


def ours(rig: driverkit.Rig, templates: str) -> dict[str, float]:
    """From the call of the driver: seconds to the first byte of the workload and of an exec, CPU seconds, memory in MiB."""
    os.environ[template.CHOICE] = templates
    plan = rig.plan(["sh", "-c", "echo up; exec sleep 1000"], annotations={"ambi.disposable": "1"})  # as of `run --rm`
    begun = time.monotonic()
    with rig.started_plan(plan) as running:
        running.init.until(lambda: running.init.out, LIMIT_S)
        first, machine = time.monotonic() - begun, running.created
        assert isinstance(machine, VirtualMachine)
        pid = machine._parts.monitor.child.pid
        cpu, pss = cpu_seconds(pid), pss_mib(pid)
        before = time.monotonic()
        running.exec(["true"])
        return {"first_byte": first, "cpu": cpu, "exec": time.monotonic() - before, "pss": pss}


def measure(pairs: int, guest_dir: Path, work: Path) -> dict[str, object]:
    tree = driverkit.unpack(rootfs.busybox_tar(work / "busybox.tar"), work / "tree")
    layer = driverkit.make_layer(tree, "erofs", work / "base.erofs")
    rig = driverkit.Rig("vm", work, (layer,), guest_dir)
    host = probe.host(guest_dir)
    kernel = boot_files.find(guest_dir).kernel
    archive = bare_initramfs(work)
    (work / "containers").mkdir()
    containers = driverkit.Rig("container", work / "containers", (driverkit.make_layer(tree, "dir", tree),), guest_dir)
    bare(kernel, archive, host), ours(rig, "off"), ours(rig, "on")  # the first of each fills the page cache
    bares, results, copies, others = [], [], [], []
    with driverkit.layers_namespace():
        for _ in range(pairs):
            bares.append(bare(kernel, archive, host))
            results.append(ours(rig, "off"))
            copies.append(ours(rig, "on"))
            others.append(contained(containers))
    walls, cpus = zip(*bares, strict=True)
    starts, own_cpus = [r["first_byte"] for r in results], [r["cpu"] for r in results]
    return {
        **_of_templates(results, copies),
        "container_first_byte_s": _summary(others),
        "accelerator": "kvm" if host.kvm else "tcg",
        "kernel": kernel.parent.name,
        "pairs": pairs,
        "bare_init_s": _summary(walls),
        "first_byte_s": _summary(starts),
        "bare_init_cpu_s": _summary(cpus),
        "first_byte_cpu_s": _summary(own_cpus),
        "exec_s": _summary([r["exec"] for r in results]),
        "ratio_median": round(statistics.median(a / b for a, b in zip(starts, walls, strict=True)), 3),
        "ratio_minima": round(min(starts) / min(walls), 3),
        "ratio_cpu_minima": round(min(own_cpus) / min(cpus), 3),
    }


def _of_templates(boots: list[dict[str, float]], copies: list[dict[str, float]]) -> dict[str, object]:
    pairs = list(zip(boots, copies, strict=True))
    return {
        "template_first_byte_s": _summary([copy["first_byte"] for copy in copies]),
        "template_first_byte_cpu_s": _summary([copy["cpu"] for copy in copies]),
        "template_pss_mib": _summary([copy["pss"] for copy in copies]),
        "boot_pss_mib": _summary([boot["pss"] for boot in boots]),
        "ratio_template_median": round(
            statistics.median(copy["first_byte"] / boot["first_byte"] for boot, copy in pairs), 3
        ),
        "ratio_template_cpu_median": round(statistics.median(copy["cpu"] / boot["cpu"] for boot, copy in pairs), 3),
    }


def _summary(values: Sequence[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 4), "min": round(min(values), 4), "max": round(max(values), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--guest-dir", type=Path, default=ROOT / "build" / "guest")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="ambi-bench-", dir="/tmp"))
    try:
        result = measure(options.pairs, options.guest_dir.absolute(), work)
    finally:
        shutil.rmtree(work)
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
