"""A monitor of ours started: a copy of the shim that gives up all rights and becomes the VMM. Nothing is executed."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import NoReturn

from ambi.core.errors import from_os_error
from ambi.linux import memfd, process
from hyper.vm import jail, words
from hyper.vm.backend import Place
from hyper.vm.hardware import Hardware, Memory
from hyper.vm.monitor import BOOT, SNAPSHOT, TEMPLATE
from hyper.vmm import main
from hyper.vmm.config import Config, Disk, Extent, Nic, Share, Vsock, check, slots_of
from hyper.vmm.layout import SLOTS, hotplug
from hyper.vmm.monitor import VmmMonitor

SPARES = 4  # slots for file trees and disks, now or later, where a machine has room for them
KVM = "/dev/kvm"
NAME = "ambi-vmm"


def start(hardware: Hardware, place: Place, *, state: int = -1, chain: tuple[tuple[int, int], ...] = ()) -> VmmMonitor:
    """`hardware.control` is made here. state: a descriptor of a saved machine that goes on. Raises an AmbiError.

    With file trees the memory is a memfd, which virtiofsd can map; where a private copy is asked for, it is filled with it.
    """
    source = -1
    try:
        kvm = place.handles.add(os.open(KVM, os.O_RDWR | os.O_CLOEXEC))
        if hardware.shares and not hardware.blank and (hardware.memory is None or not hardware.memory.shared):
            source = hardware.memory.fd if hardware.memory is not None else -1
            shared = place.handles.add(memfd.sized("guest memory", hardware.memory_bytes))
            hardware = hardware._replace(memory=Memory(shared, shared=True))
    except OSError as error:
        raise from_os_error("cannot make a virtual machine", error) from error
    control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    config = configure(hardware._replace(control=theirs.fileno()), kvm)._replace(state=state, source=source, chain=chain)
    try:
        check(config)
        opened: list[int] = []  # by the child
        child = jail.fork(NAME, place.output, lambda: _prepare(place, opened), lambda: _become(config, opened), alone=True)
    except BaseException:
        control.close()
        raise
    finally:
        theirs.close()  # from here on a monitor that ends is the end of the socket
    region = hotplug(config.memory_bytes, config.hotplug_bytes)
    origin = SNAPSHOT if chain else TEMPLATE if state >= 0 else BOOT
    return VmmMonitor(child, control, origin=origin, hotplug_bytes=region.size if region else 0)


def configure(hardware: Hardware, kvm: int) -> Config:
    """The monitor's own words for `hardware`. With `blank` nothing is behind its disks and NICs, and the slots of its file
    trees are spare."""
    disks = []
    if hardware.layers is not None:
        extents = () if hardware.blank else tuple(Extent(*extent) for extent in hardware.layers.extents)
        disks.append(Disk("layers", extents=extents))
    if hardware.disk is not None:
        fd = -1 if hardware.blank else hardware.disk
        disks.append(Disk("disk", fd, readonly=False, flush=hardware.disk_flushes and not hardware.blank))
    for volume in hardware.volumes:
        disks.append(Disk(volume.serial, -1 if hardware.blank else volume.fd, readonly=volume.readonly))
    memory = hardware.memory
    config = Config(
        name=hardware.name,
        kvm=kvm,
        kernel=hardware.kernel,
        initramfs=hardware.initramfs,
        cmdline=words.command_line(hardware),
        vcpus=hardware.vcpus,
        memory_bytes=hardware.memory_bytes,
        hotplug_bytes=hardware.hotplug_bytes,
        memory=-1 if memory is None else memory.fd,
        memory_shared=memory is None or memory.shared,
        console=hardware.console,
        agent=hardware.agent,
        control=hardware.control,
        vsock=None if hardware.vsock is None else Vsock(*hardware.vsock),
        disks=tuple(disks),
        nics=tuple(_nic(nic.mac, nic.fd, nic.vhost, blank=hardware.blank) for nic in hardware.nics),
    )
    shares = () if hardware.blank else tuple(Share(share.tag, share.fd) for share in hardware.shares)
    spares = max(0, min(SPARES, SLOTS - slots_of(config)) - len(shares))
    return config._replace(shares=shares, spares=spares)


def _nic(mac: bytes, tap: int, vhost: int | None, *, blank: bool) -> Nic:
    return Nic(mac, None, None) if blank or tap < 0 else Nic(mac, tap, vhost)


def _prepare(place: Place, opened: list[int]) -> None:
    Path("/proc/self/comm").write_text(NAME)
    opened.append(os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC))
    place.cgroup.join()
    jail.enter_vmm(place.user)


def _become(config: Config, opened: list[int]) -> NoReturn:
    """Nothing of the shim's stays open but what the machine is made of."""
    config = config._replace(pagemap=opened[0])
    keep = sorted({0, 1, 2, *descriptors(config)})
    for low, high in zip(keep, [*keep[1:], 1 << 31], strict=True):
        if high > low + 1:
            process.close_range(low + 1, high - 1)
    main.run(config)


def descriptors(config: Config) -> set[int]:
    """All that `config` names."""
    found: set[int | None] = {config.kvm, config.kernel, config.initramfs, config.console, config.agent, config.control}
    found |= {config.memory, config.source, config.state, config.pagemap}
    found |= {fd for pair in config.chain for fd in pair}
    if config.vsock is not None:
        found.add(config.vsock.fd)
    for disk in config.disks:
        found |= {disk.fd, *(extent.fd for extent in disk.extents)}
    for nic in config.nics:
        found |= {nic.tap, nic.vhost}
    found |= {share.socket for share in config.shares}
    return {fd for fd in found if fd is not None and fd >= 0}
