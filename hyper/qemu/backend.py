"""QEMU as a back-end."""

from __future__ import annotations

from hyper.qemu import argv
from hyper.qemu.monitor import QemuMonitor
from hyper.qemu.snapshots import QemuSnapshots
from hyper.qemu.start import start
from hyper.qemu.template import QemuTemplates
from hyper.vm.backend import Place
from hyper.vm.hardware import Hardware

OVERHEAD_BYTES = 192 << 20  # of QEMU and virtiofsd beyond the guest's memory and TCG's code


class QemuBackend:
    """Implements hyper.vm.backend.Backend."""

    def overhead_bytes(self, kvm: bool) -> int:
        return OVERHEAD_BYTES + (0 if kvm else argv.TB_SIZE_MIB << 20)

    def start(self, hardware: Hardware, place: Place) -> QemuMonitor:
        return start(hardware, place)

    def templates(self) -> QemuTemplates:
        return QemuTemplates()

    def snapshots(self) -> QemuSnapshots:
        return QemuSnapshots()
