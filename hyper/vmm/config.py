"""What a machine is made of: numbers and descriptors, no path. Made by the driver, or by hand (`python -m hyper.vmm`)."""

from __future__ import annotations

from typing import NamedTuple

from ambi.core.errors import InvalidRequest
from hyper.vmm.layout import MAX_VCPUS, SLOTS, hotplug, ram


class Extent(NamedTuple):
    """`sectors` of 512 bytes of a file, from sector `offset` on."""

    fd: int
    sectors: int
    offset: int


class Disk(NamedTuple):
    """A block device, which the guest finds by `serial`.

    extents: a read-only disk put together from files, or of a single one; else fd: a file that is written unless `readonly`.
    flush: whether a flush in the guest is one on the host.
    """

    serial: str
    fd: int = -1
    extents: tuple[Extent, ...] = ()
    readonly: bool = True
    flush: bool = True


class Nic(NamedTuple):
    """A network device: its tap, or None for one that gets its tap later; a descriptor of /dev/vhost-net or None."""

    mac: bytes
    tap: int | None
    vhost: int | None = None


class Share(NamedTuple):
    """A file tree: the tag that the guest mounts, a socket connected to its virtiofsd."""

    tag: str
    socket: int


class Vsock(NamedTuple):
    """Sockets to the host: the guest's number there, which is its own already, and a descriptor of /dev/vhost-vsock."""

    cid: int
    fd: int


class Config(NamedTuple):
    """kvm: a descriptor of /dev/kvm. kernel, initramfs: of regular files. console: of a stream that takes what the serial
    port says. agent: of the stream socket to the driver, or -1. control: of the control socket, or -1. memory: of a file of
    memory_bytes for RAM, or -1 for memory of our own; memory_shared: others map it too (shares need that), else it is copied
    on write. hotplug_bytes: the most that the guest may get beyond memory_bytes while it runs. state: of a saved machine
    that goes on, or -1 for a boot. chain: state and memory of a snapshot that RAM is filled from, behind those that it is a
    difference to. pagemap: of this process's own /proc/self/pagemap, or -1. spares: virtio-mmio slots without a device,
    for later ones."""

    kvm: int
    kernel: int
    initramfs: int | None
    cmdline: str
    vcpus: int
    memory_bytes: int
    console: int
    agent: int = -1
    control: int = -1
    memory: int = -1
    memory_shared: bool = True
    source: int = -1
    state: int = -1
    chain: tuple[tuple[int, int], ...] = ()
    pagemap: int = -1
    disks: tuple[Disk, ...] = ()
    nics: tuple[Nic, ...] = ()
    shares: tuple[Share, ...] = ()
    hotplug_bytes: int = 0
    vsock: Vsock | None = None
    spares: int = 0
    name: str = ""


def check(config: Config) -> None:
    """Raises InvalidRequest for a machine that cannot be, before anything of it is made."""
    ram(config.memory_bytes)
    if not 1 <= config.vcpus <= MAX_VCPUS:
        raise InvalidRequest(
            f"a VM cannot have {config.vcpus} CPUs: 1 to {MAX_VCPUS} are possible", hint=f"for example --cpus {MAX_VCPUS}"
        )
    if config.shares and (config.memory < 0 or not config.memory_shared):
        raise InvalidRequest("a VM with shared directories needs memory that virtiofsd can map too: give a memfd")
    slots = slots_of(config)
    if slots > SLOTS:
        raise InvalidRequest(
            f"a VM has room for {SLOTS} devices, and {slots} were asked for",
            hint="put what several volumes hold into one",
        )


def slots_of(config: Config) -> int:
    """How many virtio-mmio slots the machine has: its devices, with the three that every machine has, and the spares."""
    always = 3 + (hotplug(config.memory_bytes, config.hotplug_bytes) is not None) + (config.vsock is not None)
    return always + len(config.disks) + len(config.nics) + len(config.shares) + config.spares
