"""Our monitor as a back-end: a copy of the shim that gives up all rights and becomes the VMM. Nothing is executed."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import NoReturn

from ambi.core.errors import from_os_error
from ambi.linux import memfd, process
from hyper.vm import jail, words
from hyper.vm.backend import Handles
from hyper.vm.cgroup import Cgroup
from hyper.vm.hardware import Hardware
from hyper.vmm import main
from hyper.vmm.config import Config, Disk, Extent, Nic, Share, check
from hyper.vmm.monitor import VmmMonitor

KVM = "/dev/kvm"
NAME = "ambi-vmm"
OVERHEAD_BYTES = 64 << 20  # of the monitor and virtiofsd beyond the guest's memory


class VmmBackend:
    """Implements hyper.vm.backend.Backend."""

    def overhead_bytes(self, kvm: bool) -> int:
        return OVERHEAD_BYTES

    def start(self, hardware: Hardware, user: int, cgroup: Cgroup, output: int, handles: Handles) -> VmmMonitor:
        try:
            kvm = handles.add(os.open(KVM, os.O_RDWR | os.O_CLOEXEC))
            memory = handles.add(memfd.sized("guest memory", hardware.memory_bytes)) if hardware.shares else -1
        except OSError as error:
            raise from_os_error("cannot make a virtual machine", error) from error
        control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        config = configure(hardware._replace(control=handles.add(theirs.detach())), kvm, memory)
        try:
            check(config)
            child = jail.fork(NAME, output, lambda: _prepare(user, cgroup), lambda: _become(config), alone=True)
        except BaseException:
            control.close()
            raise
        return VmmMonitor(child, control)

    def templates(self) -> None:
        return None


def configure(hardware: Hardware, kvm: int, memory: int = -1) -> Config:
    """The monitor's own words for `hardware`."""
    disks = []
    if hardware.layers is not None:
        disks.append(Disk("layers", extents=tuple(Extent(*extent) for extent in hardware.layers.extents)))
    if hardware.disk is not None:
        disks.append(Disk("disk", hardware.disk, readonly=False, flush=hardware.disk_flushes))
    disks += [Disk(volume.serial, volume.fd, readonly=volume.readonly) for volume in hardware.volumes]
    return Config(
        name=hardware.name,
        kvm=kvm,
        kernel=hardware.kernel,
        initramfs=hardware.initramfs,
        cmdline=words.command_line(hardware),
        vcpus=hardware.vcpus,
        memory_bytes=hardware.memory_bytes,
        memory=memory,
        console=hardware.console,
        agent=hardware.agent,
        control=hardware.control,
        disks=tuple(disks),
        nics=tuple(Nic(nic.mac, nic.fd, nic.vhost) for nic in hardware.nics),
        shares=tuple(Share(share.tag, share.fd) for share in hardware.shares),
    )


def _prepare(user: int, cgroup: Cgroup) -> None:
    Path("/proc/self/comm").write_text(NAME)
    cgroup.join()
    jail.enter_vmm(user)


def _become(config: Config) -> NoReturn:
    """Nothing of the shim's stays open but what the machine is made of."""
    keep = sorted({0, 1, 2, *descriptors(config)})
    for low, high in zip(keep, [*keep[1:], 1 << 31], strict=True):
        if high > low + 1:
            process.close_range(low + 1, high - 1)
    main.run(config)


def descriptors(config: Config) -> set[int]:
    """All that `config` names."""
    found: set[int | None] = {config.kvm, config.kernel, config.initramfs, config.console, config.agent, config.control}
    found.add(config.memory)
    for disk in config.disks:
        found |= {disk.fd, *(extent.fd for extent in disk.extents)}
    for nic in config.nics:
        found |= {nic.tap, nic.vhost}
    found |= {share.socket for share in config.shares}
    return {fd for fd in found if fd is not None and fd >= 0}
