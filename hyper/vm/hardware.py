"""The machine that a back-end is to make: values and descriptors, the same for every VMM."""

from __future__ import annotations

from typing import NamedTuple

from hyper.vm.layers import LayerDisk
from hyper.vm.vsock import Vsock


class Share(NamedTuple):
    """A file tree by virtiofs: the tag that the guest mounts, and a socket connected to its virtiofsd."""

    tag: str
    fd: int


class Volume(NamedTuple):
    """A further disk, which the guest finds by `serial`."""

    serial: str
    fd: int
    readonly: bool


class Nic(NamedTuple):
    """A network device: its MAC and its tap's descriptor, -1 for one that is connected to nothing; `vhost` is one of the
    kernel's back-end, or None."""

    mac: bytes
    fd: int
    vhost: int | None


class Memory(NamedTuple):
    """The guest's memory as a file of its size. shared: the guest changes the file; else a private copy, page by page, and
    the descriptor may be one for reading only."""

    fd: int
    shared: bool


class Hardware(NamedTuple):
    """A VM to be started. The VMM inherits the descriptors under their numbers.

    kernel, initramfs: descriptors of files that anybody may read (QEMU opens them once more).
    agent, console: connected stream sockets; control: the VMM's own, see the back-end.
    layers: the read-only disk with a partition a layer, or None. disk: of the writable image, or None;
    disk_flushes: whether a flush in the guest is one on the host, which nobody needs of a disk that is removed at the end.
    tracing: whether somebody in the guest could look into tracefs.
    tsc_khz: the host's rate. words: further ones of the kernel's command line.
    hotplug_bytes: what the guest may get beyond memory_bytes while it runs, of a VMM that can do it.
    vsock: sockets to the host, or None.
    memory: where it is not the VMM's own. blank: it becomes a template: disks, volumes and NICs are there for the guest,
    with nothing behind them, and their descriptors are not to be touched.
    """

    name: str
    kvm: bool
    vcpus: int
    memory_bytes: int
    tsc_khz: int
    kernel: int
    initramfs: int
    agent: int
    console: int
    control: int
    layers: LayerDisk | None = None
    disk: int | None = None
    disk_flushes: bool = True
    shares: tuple[Share, ...] = ()
    nics: tuple[Nic, ...] = ()
    volumes: tuple[Volume, ...] = ()
    tracing: bool = True
    words: tuple[str, ...] = ()
    hotplug_bytes: int = 0
    vsock: Vsock | None = None
    memory: Memory | None = None
    blank: bool = False

    @property
    def fds(self) -> tuple[int, ...]:
        """Everything to be inherited, but for the memory."""
        always = (self.kernel, self.initramfs, self.agent, self.console, self.control)
        if self.blank:
            return always
        return (
            *always,
            *(() if self.disk is None else (self.disk,)),
            *(self.layers.fds if self.layers else ()),
            *(share.fd for share in self.shares),
            *(fd for nic in self.nics for fd in (nic.fd, nic.vhost) if fd is not None and fd >= 0),
            *(volume.fd for volume in self.volumes),
            *(() if self.vsock is None else (self.vsock.fd,)),
        )
