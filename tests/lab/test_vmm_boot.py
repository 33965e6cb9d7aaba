"""Debian's unmodified kernel in our monitor on a true KVM: it boots, with few exits, and its end is seen as what it is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ambi.core.deadline import Deadline
from hyper import boot_files
from hyper.guest.initramfs import character_device, cpio, directory, file
from hyper.guest.protocol import Type
from hyper.vmm.layout import ram
from tests.harness import guest_dir
from tests.monitorkit import Monitor, exits

MOST_EXITS = 260  # to user space, from start to reset with one CPU; 210 were measured, and 384 by the first prototype
MORE_PER_CPU = 10
INIT = b"""#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
echo "CPUs: $(/bin/busybox nproc)"
/bin/busybox grep "System RAM" /proc/iomem
[ $end = exit ] && exit 3
exec /bin/busybox $end -f
"""


@pytest.fixture(scope="module")
def files() -> boot_files.BootFiles:
    return boot_files.find(guest_dir())


@pytest.fixture(scope="module")
def initramfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a first process that does what the kernel's command line says: `end=poweroff` is in its environment."""
    busybox = shutil.which("busybox")
    assert busybox, "the lab has busybox-static"
    entries = [
        directory("dev"),
        character_device("dev/console", 5, 1, 0o600),
        directory("bin"),
        file("bin/busybox", Path(busybox).read_bytes(), 0o755),
        directory("proc"),
        file("init", INIT, 0o755),
    ]
    path = tmp_path_factory.mktemp("initramfs") / "end.cpio"
    path.write_bytes(cpio(entries))
    return path


@pytest.mark.parametrize("kernel,cpus", [("vmlinux", 1), ("vmlinuz", 2)])
def test_it_boots_to_the_agent_with_few_exits(files: boot_files.BootFiles, kernel: str, cpus: int) -> None:
    with Monitor(files.kernel.with_name(kernel), files.initramfs, cpus=cpus) as monitor:
        monitor.hello()
        monitor.client.request(Type.PING, (), Deadline.after(30))
        monitor.client.power_off(Deadline.after(30))
        console, said = monitor.end()
    print(f"{kernel}, {cpus} CPUs:\n{said}")
    assert monitor.process.returncode == 0 or "guest-reset" in said, said
    assert "PCI" not in console and "i8042" not in console, "no complaint that costs exits"
    assert exits(said)["all"] < MOST_EXITS + (cpus - 1) * MORE_PER_CPU


@pytest.mark.parametrize(
    "kernel,cpus,memory_mib,words,ending,status",
    [
        ("vmlinux", 2, 3200, "end=poweroff", "guest-shutdown", 0),
        ("vmlinux", 4, 128, "end=reboot reboot=k", "guest-reset", 3),
        ("vmlinuz", 1, 96, "end=exit", "guest-panic: ", 4),
    ],
)
def test_it_has_what_was_asked_for_and_its_end_is_seen_as_what_it_is(
    files: boot_files.BootFiles,
    initramfs: Path,
    kernel: str,
    cpus: int,
    memory_mib: int,
    words: str,
    ending: str,
    status: int,
) -> None:
    """3200 MiB go around the hole below 4 GiB. The agent's reset is by a triple fault; these are the other ends."""
    with Monitor(
        files.kernel.with_name(kernel), initramfs, "--append", words, cpus=cpus, memory=f"{memory_mib}M"
    ) as monitor:
        console, said = monitor.end()
    last = ram(memory_mib << 20)[-1]
    assert f"CPUs: {cpus}" in console, console + said
    assert f"-{last.gpa + last.size - 1:08x} : System RAM" in console, console
    assert monitor.process.returncode == status, console + said
    assert ending in said
    if status == 4:
        assert "Kernel panic - not syncing: Attempted to kill init!" in said and "Call Trace" in console


def test_half_a_kernel_is_refused(files: boot_files.BootFiles, initramfs: Path, tmp_path: Path) -> None:
    bzimage = files.kernel.with_name("vmlinuz")
    cut = tmp_path / "cut"
    cut.write_bytes(bzimage.read_bytes()[: bzimage.stat().st_size // 2])
    with Monitor(cut, initramfs) as monitor:
        _, said = monitor.end()
    assert monitor.process.returncode == 125 and "the kernel is truncated" in said
