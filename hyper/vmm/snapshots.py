"""A user's VM of our monitor saved, and gone on with. The monitor itself writes and reads the files: saving.py.

A chain is read into memory of the VM's own, and each piece of it is checked as it is read. A map of the file would be read
again when the guest touches it, after any check, so it is not used even for a snapshot that stands alone.
"""

from __future__ import annotations

import time
from typing import ClassVar

from ambi.core.deadline import Deadline
from ambi.core.errors import Corrupt, Unavailable
from hyper.kvm.system import Kvm
from hyper.vm.backend import Files, Place, Still
from hyper.vm.hardware import Hardware
from hyper.vm.monitor import Monitor, end
from hyper.vm.snapshots import AGAIN, ELSEWHERE, MEMORY, STATE, Snapshot
from hyper.vmm import snapshot as state_file
from hyper.vmm.monitor import VmmMonitor
from hyper.vmm.snapshot_memory import Chain
from hyper.vmm.start import KVM, start


class VmmSnapshots:
    """Implements hyper.vm.backend.Snapshots."""

    name: ClassVar[str] = "ambi"
    files: ClassVar[tuple[str, ...]] = (STATE, MEMORY)

    def words(self, *, kvm: bool) -> dict[str, str]:
        return {}  # the state file has all of it, and `check` compares that

    def save(self, monitor: Monitor, files: Files, by: Deadline) -> Still:
        assert isinstance(monitor, VmmMonitor)
        parents = (fd for pair in files.parents for fd in pair)
        since = time.monotonic_ns()
        try:
            answer = monitor.call("save", by, (files.state, files.memory, *parents))
        except Unavailable as error:
            raise type(error)(f"{error.message}: {why}" if (why := monitor.why()) else error.message) from error
        return Still(since, whole=answer.get("whole") is not False)

    def go_on(self, monitor: Monitor, by: Deadline) -> None:
        assert isinstance(monitor, VmmMonitor)
        monitor.call("resume", by)

    def check(self, snapshot: Snapshot, files: Files) -> None:
        layers = [(state_file.read_state(state), memory) for state, memory in pairs(files)]
        kvm = Kvm(KVM)
        try:
            here = state_file.this_host(kvm.supported_cpuid())
        finally:
            kvm.close()
        state_file.refuse_other_host(layers[-1][0].host, here)
        Chain(layers)

    def restore(self, hardware: Hardware, snapshot: Snapshot, files: Files, place: Place, by: Deadline) -> VmmMonitor:
        monitor = start(hardware, place, state=files.state, chain=pairs(files))
        try:
            monitor.call("resume", by)  # answered once it runs
        except BaseException as error:
            monitor.child.kill()
            why, wrong = monitor.why(), monitor.error()
            end(monitor)
            if wrong is not None:
                wrong.hint = AGAIN if isinstance(wrong, Corrupt) else ELSEWHERE
                raise wrong from error
            if isinstance(error, Unavailable) and why:
                raise Unavailable(why) from error
            raise
        return monitor


def pairs(files: Files) -> tuple[tuple[int, int], ...]:
    return (*files.parents, (files.state, files.memory))
