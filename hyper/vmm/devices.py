"""The virtio devices of a machine, in the order of their slots."""

from __future__ import annotations

from hyper.guest.protocol import PORT_NAME
from hyper.vmm.config import Config, Disk, Nic
from hyper.vmm.layout import hotplug
from hyper.vmm.virtio.balloon import Balloon
from hyper.vmm.virtio.blk import Blk
from hyper.vmm.virtio.console import Console
from hyper.vmm.virtio.device import Device
from hyper.vmm.virtio.disk import Extents, File, Nothing
from hyper.vmm.virtio.fs import Fs
from hyper.vmm.virtio.mem import Mem
from hyper.vmm.virtio.net import Net
from hyper.vmm.virtio.rng import Rng
from hyper.vmm.virtio.tap import Tap
from hyper.vmm.virtio.vhost import Vhost
from hyper.vmm.virtio.vhost_user import VhostUser
from hyper.vmm.virtio.vsock import Vsock


def build(config: Config) -> list[Device]:
    """Takes over the descriptors that they need. Raises OSError when one is not as it should be; then none is open."""
    made: list[Device] = [Console(config.agent if config.agent >= 0 else None, PORT_NAME), Rng(), Balloon()]
    try:
        region = hotplug(config.memory_bytes, config.hotplug_bytes)
        if region is not None:
            made.append(Mem(region.gpa, region.size))
        if config.vsock is not None:
            made.append(Vsock(Vhost(config.vsock.fd), config.vsock.cid))
        for disk in config.disks:
            made.append(_disk(disk))
        for nic in config.nics:
            made.append(_nic(nic))
        for share in config.shares:  # the last: in a template their slots are spare
            made.append(Fs(share.tag, VhostUser(share.socket, config.memory)))
    except BaseException:
        for device in made:
            device.close()
        raise
    return made


def _disk(disk: Disk) -> Device:
    if disk.extents:
        return Blk(Extents(disk.extents), disk.serial)
    if disk.fd < 0:
        return Blk(Nothing(readonly=disk.readonly), disk.serial)
    return Blk(File(disk.fd, readonly=disk.readonly, flushes=disk.flush), disk.serial)


def _nic(nic: Nic) -> Device:
    if nic.tap is None:
        return Net(None, nic.mac)
    return Net(Tap(nic.tap), nic.mac, None if nic.vhost is None else Vhost(nic.vhost))
