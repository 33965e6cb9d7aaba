"""/dev/kvm: what it can do, and the way to a VM."""

from __future__ import annotations

import ctypes
import errno
import os

from hyper.kvm import api, cpuid
from hyper.kvm.api import call
from hyper.kvm.cpuid import CpuidEntry
from hyper.kvm.errors import KvmError, Lacking
from hyper.kvm.vm import Vm

_MOST = 4096  # MSRs that we ever make room for


class Kvm:
    """The device, by a path that is opened or by a descriptor that becomes ours.

    Raises OSError; KvmError when it is no KVM.
    """

    __slots__ = ("_capabilities", "fd", "run_size")

    def __init__(self, device: int | str = "/dev/kvm") -> None:
        self.fd = device if isinstance(device, int) else os.open(device, os.O_RDWR | os.O_CLOEXEC)
        self._capabilities: dict[int, int] = {}
        try:
            version = call(self.fd, api.KVM_GET_API_VERSION)
            if version != api.KVM_API_VERSION:
                raise KvmError(errno.EPROTO, "KVM_GET_API_VERSION", f"version {version}, not {api.KVM_API_VERSION}")
            self.run_size = call(self.fd, api.KVM_GET_VCPU_MMAP_SIZE)
        except BaseException:
            self.close()
            raise

    def check(self, capability: int) -> int:
        """0 when this KVM lacks it, else 1 or the figure that it stands for."""
        if capability not in self._capabilities:
            self._capabilities[capability] = call(self.fd, api.KVM_CHECK_EXTENSION, capability)
        return self._capabilities[capability]

    def require(self, *capabilities: int) -> None:
        """Raises Lacking for the first that is not there."""
        for capability in capabilities:
            if not self.check(capability):
                raise Lacking(errno.EOPNOTSUPP, "KVM_CHECK_EXTENSION", api.CAPABILITIES[capability])

    def create_vm(self) -> Vm:
        """A VM without memory, interrupt controllers or vCPUs. Intel's scratch pages are put below 4 GiB, at TSS_ADDRESS."""
        return Vm(call(self.fd, api.KVM_CREATE_VM, 0), self.run_size)

    def supported_cpuid(self) -> list[CpuidEntry]:
        """What this KVM and processor can show a guest."""
        return cpuid.read(self.fd, api.KVM_GET_SUPPORTED_CPUID, "of this host")

    def msr_indices(self) -> list[int]:
        """The MSRs that make up a vCPU's state, those of them that this host has."""
        return self._indices(api.KVM_GET_MSR_INDEX_LIST)

    def msr_feature_indices(self) -> list[int]:
        """The MSRs that say what the processor can do."""
        return self._indices(api.KVM_GET_MSR_FEATURE_INDEX_LIST)

    def _indices(self, ioctl: api.Ioctl) -> list[int]:
        room = 256
        while True:
            buffer = (ctypes.c_uint32 * (1 + room))(room)
            try:
                call(self.fd, ioctl, buffer)
            except KvmError as error:
                if error.errno != errno.E2BIG or room >= _MOST:
                    raise
                room = max(buffer[0], room + 1)  # the kernel wrote how many there are
            else:
                return list(buffer[1 : 1 + buffer[0]])

    def close(self) -> None:
        """Idempotent. VMs that were made live on."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Kvm:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
