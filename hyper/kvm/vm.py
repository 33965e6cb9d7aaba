"""A VM: its memory slots, interrupts, event descriptors and clock."""

from __future__ import annotations

import ctypes
import os
from errno import EINVAL

from hyper.kvm import api
from hyper.kvm import structs as s
from hyper.kvm.api import call
from hyper.kvm.errors import KvmError
from hyper.kvm.memory import PAGE, Memory
from hyper.kvm.vcpu import Vcpu

TSS_ADDRESS = 0xFFFBD000  # three pages that Intel's VMX wants in the guest's address space
IDENTITY_MAP_ADDRESS = 0xFFFBC000  # and one more


class Slot:
    """A piece of guest memory as the kernel was told of it. The Memory is kept alive, not owned."""

    __slots__ = ("flags", "gpa", "memory", "offset", "size")

    def __init__(self, gpa: int, memory: Memory, offset: int, size: int, flags: int) -> None:
        self.gpa = gpa
        self.memory = memory
        self.offset = offset
        self.size = size
        self.flags = flags


class Vm:
    """Made by Kvm.create_vm. `slots` is what it has of memory, by slot number. Every call raises KvmError."""

    __slots__ = ("_run_size", "fd", "has_irqchip", "has_pit", "slots")

    def __init__(self, fd: int, run_size: int) -> None:
        """Takes the descriptor over. `run_size`: of the page that a vCPU shares with us."""
        self.fd = fd
        self._run_size = run_size
        self.slots: dict[int, Slot] = {}
        self.has_irqchip = False
        self.has_pit = False
        try:
            call(fd, api.KVM_SET_IDENTITY_MAP_ADDR, ctypes.byref(ctypes.c_uint64(IDENTITY_MAP_ADDRESS)))
            call(fd, api.KVM_SET_TSS_ADDR, TSS_ADDRESS)
        except BaseException:
            self.close()
            raise

    def check(self, capability: int) -> int:
        """As Kvm.check, where the answer depends on the VM (the size of XSAVE)."""
        return call(self.fd, api.KVM_CHECK_EXTENSION, capability)

    def enable(self, capability: int, *args: int) -> None:
        """KVM_ENABLE_CAP with up to four arguments."""
        request = s.kvm_enable_cap(capability, 0, (ctypes.c_uint64 * 4)(*args))
        call(self.fd, api.KVM_ENABLE_CAP, ctypes.byref(request), api.CAPABILITIES.get(capability, str(capability)))

    # memory

    def add_memory(
        self,
        slot: int,
        gpa: int,
        memory: Memory,
        offset: int = 0,
        readonly: bool = False,
        log_dirty: bool = False,
        *,
        size: int | None = None,
    ) -> None:
        """Show [offset, offset + size) of `memory`, all the rest of it without `size`, at `gpa`.

        A slot that is there is changed in place where only the flags differ, or its address: with another size or another
        Memory it must be removed first. What a guest writes to a read-only slot is a KVM_EXIT_MMIO.
        """
        size = memory.size - offset if size is None else size
        if size <= 0 or offset < 0 or offset + size > memory.size or (offset | size | gpa) % PAGE:
            raise KvmError(EINVAL, "KVM_SET_USER_MEMORY_REGION", f"slot {slot}: {size} bytes at {offset} of {memory.size}")
        flags = (api.KVM_MEM_READONLY if readonly else 0) | (api.KVM_MEM_LOG_DIRTY_PAGES if log_dirty else 0)
        region = s.kvm_userspace_memory_region(slot, flags, gpa, size, memory.address + offset)
        call(self.fd, api.KVM_SET_USER_MEMORY_REGION, ctypes.byref(region), f"slot {slot}, {size} bytes at {gpa:#x}")
        self.slots[slot] = Slot(gpa, memory, offset, size, flags)

    def remove_memory(self, slot: int) -> None:
        """The guest has nothing there any more. A slot that is not there is no error."""
        if slot in self.slots:
            region = s.kvm_userspace_memory_region(slot, 0, self.slots[slot].gpa, 0, 0)
            call(self.fd, api.KVM_SET_USER_MEMORY_REGION, ctypes.byref(region), f"slot {slot}")
            del self.slots[slot]

    def log_dirty(self, slot: int, wanted: bool) -> None:
        """Switch the log of a slot on or off."""
        old = self.slots[slot]
        readonly = bool(old.flags & api.KVM_MEM_READONLY)
        self.add_memory(slot, old.gpa, old.memory, old.offset, readonly, wanted, size=old.size)

    def dirty_log(self, slot: int) -> bytearray:
        """A bit for each page of the slot that vCPUs wrote since the last call or since the log was switched on; clears it.

        A page that was only read may be in it the first time: the kernel maps it writable where it can.
        Only what the guest and the kernel (kvmclock) write counts, not what this process or vhost writes there.
        """
        pages = self.slots[slot].size // PAGE
        bitmap = bytearray((pages + 63) // 64 * 8)
        request = s.kvm_dirty_log(slot=slot, dirty_bitmap=ctypes.addressof(ctypes.c_char.from_buffer(bitmap)))
        call(self.fd, api.KVM_GET_DIRTY_LOG, ctypes.byref(request), f"slot {slot}")
        return bitmap

    # interrupts

    def create_irqchip(self) -> None:
        """Two PICs, an IOAPIC, and a LAPIC in every vCPU made later. GSI n is pin n of the IOAPIC, and below 16 of a PIC."""
        call(self.fd, api.KVM_CREATE_IRQCHIP)
        self.has_irqchip = True

    def create_pit(self) -> None:
        """The i8254 timer, with its speaker's port 0x61."""
        call(self.fd, api.KVM_CREATE_PIT2, ctypes.byref(s.kvm_pit_config(flags=api.KVM_PIT_SPEAKER_DUMMY)))
        self.has_pit = True

    def irq_line(self, gsi: int, level: int) -> None:
        """Set the level of a pin; an edge is 1 and then 0."""
        call(self.fd, api.KVM_IRQ_LINE, ctypes.byref(s.kvm_irq_level(gsi, level)), f"GSI {gsi}")

    def irqfd(self, eventfd: int, gsi: int, resample: int | None = None) -> None:
        """A write to `eventfd` is an edge on `gsi`; with `resample` a level until the EOI, which that eventfd tells."""
        request = s.kvm_irqfd(fd=eventfd, gsi=gsi)
        if resample is not None:
            request.flags, request.resamplefd = api.KVM_IRQFD_FLAG_RESAMPLE, resample
        call(self.fd, api.KVM_IRQFD, ctypes.byref(request), f"GSI {gsi}")

    def remove_irqfd(self, eventfd: int, gsi: int) -> None:
        request = s.kvm_irqfd(fd=eventfd, gsi=gsi, flags=api.KVM_IRQFD_FLAG_DEASSIGN)
        call(self.fd, api.KVM_IRQFD, ctypes.byref(request), f"GSI {gsi}")

    def signal_msi(self, address: int, data: int) -> bool:
        """Send a message-signalled interrupt; False when the guest has it blocked."""
        message = s.kvm_msi(address & 0xFFFFFFFF, address >> 32, data)
        return call(self.fd, api.KVM_SIGNAL_MSI, ctypes.byref(message), f"MSI {data:#x} to {address:#x}") > 0

    # writes that do not stop the vCPU

    def ioeventfd(self, eventfd: int, address: int, length: int, datamatch: int | None = None, pio: bool = False) -> None:
        """A write of `length` bytes to `address` (of `datamatch`, or of anything) counts in `eventfd` instead of an exit.

        `length`: 1, 2, 4, 8, or 0 for any of them.
        """
        self._ioeventfd(eventfd, address, length, datamatch, pio, 0)

    def remove_ioeventfd(
        self, eventfd: int, address: int, length: int, datamatch: int | None = None, pio: bool = False
    ) -> None:
        """With the very arguments that it was made with."""
        self._ioeventfd(eventfd, address, length, datamatch, pio, api.KVM_IOEVENTFD_FLAG_DEASSIGN)

    def _ioeventfd(self, eventfd: int, address: int, length: int, datamatch: int | None, pio: bool, flags: int) -> None:
        if pio:
            flags |= api.KVM_IOEVENTFD_FLAG_PIO
        if datamatch is not None:
            flags |= api.KVM_IOEVENTFD_FLAG_DATAMATCH
        request = s.kvm_ioeventfd(datamatch or 0, address, length, eventfd, flags)
        subject = f"{length} bytes at {'port' if pio else 'address'} {address:#x}"
        call(self.fd, api.KVM_IOEVENTFD, ctypes.byref(request), subject)

    # clock, vCPUs, figures

    def get_clock(self) -> int:
        """kvmclock, in ns since the guest began."""
        data = s.kvm_clock_data()
        call(self.fd, api.KVM_GET_CLOCK, ctypes.byref(data))
        return int(data.clock)

    def set_clock(self, ns: int) -> None:
        call(self.fd, api.KVM_SET_CLOCK, ctypes.byref(s.kvm_clock_data(clock=ns)))

    def create_vcpu(self, index: int) -> Vcpu:
        """vCPU `index`, which is its APIC id; the first one starts, the others wait for INIT where there is an irqchip."""
        xsave_size = self.check(api.KVM_CAP_XSAVE2) or 4096
        fd = call(self.fd, api.KVM_CREATE_VCPU, index, f"vCPU {index}")
        return Vcpu(fd, index, self._run_size, xsave_size=xsave_size, has_lapic=self.has_irqchip)

    def stats_fd(self) -> int:
        """For `stats`; the caller's to close."""
        return call(self.fd, api.KVM_GET_STATS_FD)

    def close(self) -> None:
        """Idempotent. The kernel's VM is gone when its vCPUs are closed too."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            self.slots.clear()

    def __enter__(self) -> Vm:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
