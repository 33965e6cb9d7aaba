"""QEMU as a back-end."""

from __future__ import annotations

from hyper.qemu import argv
from hyper.qemu.monitor import QemuMonitor
from hyper.qemu.start import start
from hyper.qemu.template import QemuTemplates
from hyper.vm.backend import Handles, Place
from hyper.vm.cgroup import Cgroup
from hyper.vm.hardware import Hardware

OVERHEAD_BYTES = 192 << 20  # of QEMU and virtiofsd beyond the guest's memory and TCG's code


class QemuBackend:
    """Implements hyper.vm.backend.Backend."""

    def overhead_bytes(self, kvm: bool) -> int:
        return OVERHEAD_BYTES + (0 if kvm else argv.TB_SIZE_MIB << 20)

    def start(self, hardware: Hardware, user: int, cgroup: Cgroup, output: int, handles: Handles) -> QemuMonitor:
        return start(hardware, Place(user, cgroup, output, handles))

    def templates(self) -> QemuTemplates:
        return QemuTemplates()
