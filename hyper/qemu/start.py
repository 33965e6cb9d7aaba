"""A QEMU process: its descriptors, its jail, its monitor."""

from __future__ import annotations

import socket
from collections.abc import Callable

from ambi.core.errors import Unsupported
from hyper import probe
from hyper.qemu import argv, vmdk
from hyper.qemu.monitor import QemuMonitor
from hyper.qemu.qmp import Qmp
from hyper.vm import jail, layers
from hyper.vm.backend import Place
from hyper.vm.hardware import Hardware
from hyper.vm.monitor import BOOT, TEMPLATE


def start(
    hardware: Hardware, place: Place, *, before: Callable[[], None] | None = None, state: int | None = None
) -> QemuMonitor:
    """Start QEMU; `hardware.control` is made here.

    before: called in the child right before it executes QEMU. state: a descriptor of a saved guest, which QEMU inherits and
    waits to be told of. Raises Unsupported when there is no QEMU.
    """
    qemu = probe.find_qemu()
    if qemu is None:
        raise Unsupported("there is no QEMU", hint="apt-get install qemu-system-x86")
    control, theirs = socket.socketpair()
    hardware = hardware._replace(control=theirs.fileno())
    inherited = list(hardware.fds)
    disk = None
    if hardware.layers is not None and not hardware.blank:
        disk = place.handles.add(layers.readable("disk of layers", vmdk.descriptor(hardware.layers.extents)))
        inherited.append(disk)
    words = argv.build(qemu, hardware, disk)
    if state is not None:
        inherited.append(state)
        words += ["-incoming", "defer"]

    def prepare() -> None:
        place.cgroup.join()
        jail.enter_vmm(place.user, program=qemu, kvm=hardware.kvm)
        if before is not None:
            before()

    try:
        child = jail.spawn(words, inherited, place.output, prepare, alone=True)
    except BaseException:
        control.close()
        raise
    finally:
        theirs.close()  # from here on a QEMU that ends is the end of the socket
    origin = BOOT if state is None else TEMPLATE
    return QemuMonitor(child, Qmp(control), "kvm" if hardware.kvm else "tcg", origin=origin, layers=disk)
