"""Our monitor as a back-end."""

from __future__ import annotations

from hyper.vm.backend import Place
from hyper.vm.hardware import Hardware
from hyper.vmm.monitor import VmmMonitor
from hyper.vmm.snapshots import VmmSnapshots
from hyper.vmm.start import start
from hyper.vmm.template import VmmTemplates

OVERHEAD_BYTES = 64 << 20  # of the monitor and virtiofsd beyond the guest's memory


class VmmBackend:
    """Implements hyper.vm.backend.Backend."""

    def overhead_bytes(self, kvm: bool) -> int:
        return OVERHEAD_BYTES

    def start(self, hardware: Hardware, place: Place) -> VmmMonitor:
        return start(hardware, place)

    def templates(self) -> VmmTemplates:
        return VmmTemplates()

    def snapshots(self) -> VmmSnapshots:
        return VmmSnapshots()
