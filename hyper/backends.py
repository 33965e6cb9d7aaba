"""Which back-end runs a VM: our own monitor where KVM runs guests at speed, else QEMU."""

from __future__ import annotations

import os

from ambi.core.driver import Problem
from hyper import probe
from hyper.vm.backend import Backend

CHOICE = "AMBI_VMM"  # in the environment: `vmm` or `qemu`, for tests and benchmarks
OURS, QEMU = "vmm", "qemu"
NO_QEMU = Problem("there is no QEMU", "apt-get install qemu-system-x86")


def name(host: probe.Host) -> str:
    """OURS or QEMU. What $AMBI_VMM asks for is not second-guessed: without KVM our monitor fails with the reason."""
    wanted = os.environ.get(CHOICE, "")
    if wanted in (OURS, QEMU):
        return wanted
    return OURS if host.kvm else QEMU


def problem(host: probe.Host) -> Problem | None:
    """Why no VM can run here."""
    if name(host) == OURS:
        return None if host.kvm else Problem(f"our monitor needs KVM: {host.kvm_problem}", f"unset {CHOICE}")
    return None if probe.find_qemu() else NO_QEMU


def load(host: probe.Host) -> Backend:
    """Imports what is needed, and nothing of the other."""
    if name(host) == OURS:
        from hyper.vmm.backend import VmmBackend

        return VmmBackend()
    from hyper.qemu.backend import QemuBackend

    return QemuBackend()


def preload() -> None:
    """Import what VMs of this host need, into the process that shims are forked from."""
    if os.environ.get(CHOICE) != QEMU and os.access("/dev/kvm", os.R_OK | os.W_OK) and _tried():
        import hyper.vmm.backend
    elif probe.find_qemu():
        import hyper.qemu.backend  # noqa: F401


def _tried() -> bool:
    """Whether KVM is of use, by a try in a process of its own: what that needs is not to stay in this one."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            from hyper.kvm.probe import problem

            status = int(problem() is not None)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
