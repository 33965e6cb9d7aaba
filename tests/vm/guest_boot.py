"""A guest of ours on QEMU's TCG, driven by the blocking client and nothing else: no driver, no shim."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

from ambi.core.deadline import Deadline
from hyper import boot_files
from hyper.guest.client import GuestClient
from hyper.guest.protocol import Items, MountTag, ProcessTag, SetupTag, Type
from hyper.kvm.code import tsc_khz
from hyper.vm import gpt
from hyper.vm.words import WORDS, WORDS_TCG
from tests.rootfs import busybox_tar

BOOT_S = 120  # a bound against hanging for ever, not a measure
ALL_CAPABILITIES = (1 << 41) - 1
DEFAULT_CAPABILITIES = 0xA80425FB  # docker's fourteen
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def mount(destination: str, kind: str, *options: str, source: str = "") -> tuple[int, Items]:
    fields = [(MountTag.DESTINATION, destination), (MountTag.TYPE, kind), (MountTag.SOURCE, source or kind)]
    return (SetupTag.MOUNT, (*fields, *((MountTag.OPTION, option) for option in options)))


MOUNTS = (
    mount("/proc", "proc", "nosuid", "noexec", "nodev"),
    mount("/dev", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
    mount("/dev/pts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
    mount("/sys", "sysfs", "nosuid", "noexec", "nodev", "ro"),
    mount("/sys/fs/cgroup", "cgroup", "nosuid", "noexec", "nodev", "relatime", "ro", source="cgroup"),
    mount("/dev/mqueue", "mqueue", "nosuid", "noexec", "nodev"),
    mount("/dev/shm", "tmpfs", "nosuid", "noexec", "nodev", "mode=1777", "size=67108864", source="shm"),
)


def process(
    *args: str, capabilities: int = DEFAULT_CAPABILITIES, env: tuple[str, ...] = (PATH,), extra: Items = ()
) -> Items:
    """A PROCESS with docker's default capabilities; `extra` fields win over those before."""
    sets = (ProcessTag.BOUNDING, ProcessTag.EFFECTIVE, ProcessTag.PERMITTED)
    return (
        *((ProcessTag.ARG, arg) for arg in args),
        *((ProcessTag.ENV, entry) for entry in env),
        *((tag, capabilities) for tag in sets),
        *extra,
    )


def sh(script: str, capabilities: int = DEFAULT_CAPABILITIES, extra: Items = ()) -> Items:
    return process("/bin/sh", "-c", script, capabilities=capabilities, extra=extra)


def busybox_layer(directory: Path) -> Path:
    """An EROFS image of a busybox root."""
    root = directory / "root"
    root.mkdir()
    subprocess.run(["tar", "-xf", str(busybox_tar(directory / "root.tar")), "-C", str(root)], check=True)
    return erofs(root, directory / "busybox.erofs")


def erofs(root: Path, image: Path) -> Path:
    subprocess.run(["mkfs.erofs", "-x-1", str(image), str(root)], check=True, capture_output=True)
    with open(image, "r+b") as file:
        file.truncate(-(-image.stat().st_size // 4096) * 4096)
    return image


def layers_disk(images: list[Path], disk: Path) -> Path:
    table = gpt.table(tuple(image.stat().st_size // gpt.SECTOR for image in images))
    with open(disk, "wb") as file:
        file.write(table.header)
        for image, partition in zip(images, table.partitions, strict=True):
            file.seek(partition.start * gpt.SECTOR)
            file.write(image.read_bytes())
        file.seek((table.total_sectors - gpt.TRAILER_SECTORS) * gpt.SECTOR)
        file.write(table.trailer)
    return disk


class Guest:
    """A running VM; `client` is connected and has said hello."""

    def __init__(
        self,
        directory: Path,
        guest_dir: Path,
        *,
        layers: list[Path] | None = None,
        disk: bool = False,
        memory_mib: int = 256,
        words: tuple[str, ...] = (),
    ) -> None:
        files = boot_files.find(guest_dir)
        self.console = directory / "console"
        ours, theirs = socket.socketpair()
        append = " ".join((*WORDS, *WORDS_TCG, f"tsc_early_khz={tsc_khz()}", "noreplace-smp", *words))
        argv = [
            *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
            *("-M", "microvm,pit=off,pic=off,rtc=on", "-accel", "tcg", "-cpu", "qemu64", "-m", f"{memory_mib}M"),
            *("-kernel", str(files.kernel), "-initrd", str(files.initramfs), "-append", append),
            *("-serial", f"file:{self.console}", "-global", "virtio-mmio.force-legacy=false"),
            *("-chardev", f"socket,id=agent,fd={theirs.fileno()}", "-device", "virtio-serial-device,max_ports=2"),
            *("-device", "virtserialport,chardev=agent,name=ambi.agent"),
        ]
        if layers:
            image = layers_disk(layers, directory / "layers.img")
            argv += ["-drive", f"id=l,if=none,format=raw,readonly=on,file={image}"]
            argv += ["-device", "virtio-blk-device,drive=l,serial=layers"]
        self.disk = directory / "disk.img"
        if disk:
            if not self.disk.exists():
                self.disk.touch()
                subprocess.run(["mkfs.ext4", "-q", str(self.disk), "256M"], check=True)
            argv += ["-drive", f"id=d,if=none,format=raw,file={self.disk},cache=unsafe"]
            argv += ["-device", "virtio-blk-device,drive=d,serial=disk"]
        self.vmm = subprocess.Popen(argv, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        self.client = GuestClient(ours)
        self.socket = ours
        try:
            by = Deadline.after(BOOT_S)
            self.client.connect(by)
            self.hello = self.client.hello(by)
        except BaseException:
            self.close()
            sys.stderr.write(self.console.read_text(errors="replace")[-4000:])
            raise

    def setup(self, *items: tuple[int, object], layers: int = 1, mounts: Items = MOUNTS) -> None:
        fields = ((SetupTag.HOSTNAME, "guest"), (SetupTag.LAYERS, layers), *mounts, *items)
        self.client.request(Type.SETUP, fields, Deadline.after(BOOT_S))  # type: ignore[arg-type]

    def close(self) -> None:
        self.client.close()
        self.vmm.kill()
        self.vmm.wait()
