"""QEMU as a back-end: its command line, its process, its monitor."""

from __future__ import annotations

from ambi.core.errors import Unsupported
from hyper import probe
from hyper.qemu import argv, vmdk
from hyper.qemu.monitor import QemuMonitor
from hyper.qemu.qmp import Qmp
from hyper.vm import jail, layers
from hyper.vm.backend import Handles
from hyper.vm.cgroup import Cgroup
from hyper.vm.hardware import Hardware

OVERHEAD_BYTES = 192 << 20  # of QEMU and virtiofsd beyond the guest's memory and TCG's code


class QemuBackend:
    """Implements hyper.vm.backend.Backend."""

    def overhead_bytes(self, kvm: bool) -> int:
        return OVERHEAD_BYTES + (0 if kvm else argv.TB_SIZE_MIB << 20)

    def start(self, hardware: Hardware, user: int, cgroup: Cgroup, output: int, handles: Handles) -> QemuMonitor:
        qemu = probe.find_qemu()
        if qemu is None:
            raise Unsupported("there is no QEMU", hint="apt-get install qemu-system-x86")
        control, control_fd = handles.socket_pair()
        hardware = hardware._replace(control=control_fd)
        disk = None
        if hardware.layers is not None:
            disk = handles.add(layers.readable("disk of layers", vmdk.descriptor(hardware.layers.extents)))

        def prepare() -> None:
            cgroup.join()
            jail.enter_vmm(user, program=qemu, kvm=hardware.kvm)

        try:
            inherited = (*hardware.fds, *(() if disk is None else (disk,)))
            child = jail.spawn(argv.build(qemu, hardware, disk), inherited, output, prepare, alone=True)
        except BaseException:
            control.close()
            raise
        return QemuMonitor(child, Qmp(control), "kvm" if hardware.kvm else "tcg")
