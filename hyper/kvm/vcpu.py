"""A vCPU: running it, stopping it from another thread, and its registers."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import struct
from _thread import get_ident, get_native_id
from collections.abc import Iterable, Mapping, Sequence

from hyper.kvm import api, cpuid
from hyper.kvm import structs as s
from hyper.kvm.api import call, libc
from hyper.kvm.cpuid import CpuidEntry
from hyper.kvm.errors import KvmError
from hyper.kvm.memory import PAGE, map_aligned, protection

KICK_SIGNAL = signal.SIGRTMIN + 6
_SYS_TGKILL = 234  # asm/unistd_64.h
_RUN = api.KVM_RUN.request
_ioctl = api.raw_ioctl
_MSR = struct.Struct("<I4xQ")  # kvm_msr_entry
_AGAIN = (errno.EINTR, errno.EAGAIN)
_MMIO_DATA = 40  # in kvm_run: the union is at 32, and mmio.data behind mmio.phys_addr


class Vcpu:
    """Made by Vm.create_vcpu. `exit` is the kvm_run that the kernel shares with us. Every call raises KvmError.

    One thread runs it; the others may `kick` it. All else waits in the kernel while it runs, so a descriptor for figures is
    made before.
    """

    __slots__ = ("_ident", "_map", "_thread", "_xsave_size", "exit", "fd", "has_lapic", "index", "page")

    def __init__(self, fd: int, index: int, run_size: int, *, xsave_size: int, has_lapic: bool) -> None:
        """Takes the descriptor over."""
        self.fd = fd
        self.index = index
        self.has_lapic = has_lapic  # in the kernel
        self._xsave_size = xsave_size
        self._ident = 0  # of Python, of the thread that ran it last
        self._thread = 0  # the kernel's id of it
        try:
            self._map, _ = map_aligned(run_size, PAGE, protection(readonly=False), mmap.MAP_SHARED, fd)
        except BaseException:
            os.close(fd)
            self.fd = -1
            raise
        self.page = memoryview(self._map)
        self.exit = s.kvm_run.from_buffer(self._map)

    # running

    def run(self) -> int:
        """Run the guest until it needs us: the exit's reason. What it read by PIO or MMIO must be in place before the next.

        KVM_EXIT_INTR: somebody kicked it (which is then over) or a signal came. Only then, and after KVM_EXIT_HLT, is the
        last instruction finished, so only then may the state be saved. Other threads run meanwhile.
        """
        if self._ident != get_ident():
            self._enter_thread()
        if _ioctl(self.fd, _RUN, 0) >= 0:
            return self.exit.exit_reason  # type: ignore[no-any-return]
        code = ctypes.get_errno()
        if code not in _AGAIN:
            raise KvmError(code, "KVM_RUN", f"vCPU {self.index}")
        # Whoever kicks says what he wants before he kicks, and our caller looks after this: so nothing is lost.
        self.exit.immediate_exit = 0
        self.exit.exit_reason = api.KVM_EXIT_INTR
        return api.KVM_EXIT_INTR

    def kick(self) -> None:
        """Make `run` return KVM_EXIT_INTR soon, from any thread: the one that is under way, else the next one.

        The flag holds for a thread that is about to enter the guest, the signal for one that is in it or sleeps in HLT.
        """
        self.exit.immediate_exit = 1
        if self._thread and libc.syscall(_SYS_TGKILL, os.getpid(), self._thread, KICK_SIGNAL) < 0:
            code = ctypes.get_errno()
            if code != errno.ESRCH:  # a thread that has ended runs nothing
                raise KvmError(code, "tgkill", f"vCPU {self.index}")

    def io_data(self) -> memoryview:
        """Of a KVM_EXIT_IO: size * count bytes; for an `in` to be filled before the next run."""
        io = self.exit.io
        return self.page[io.data_offset : io.data_offset + io.size * io.count]

    def mmio_data(self) -> memoryview:
        """Of a KVM_EXIT_MMIO: its 1 to 8 bytes; for a read to be filled before the next run."""
        return self.page[_MMIO_DATA : _MMIO_DATA + self.exit.mmio.len]

    def describe_exit(self) -> str:
        """The last exit in words, for a message: `internal_error 1 at rip 0xfff0`."""
        reason = self.exit.exit_reason
        name = api.NAMES.get(reason, str(reason))
        detail = ""
        if reason == api.KVM_EXIT_INTERNAL_ERROR:
            detail = f" {self.exit.internal.suberror}"
        elif reason == api.KVM_EXIT_FAIL_ENTRY:
            detail = f" {self.exit.fail_entry.hardware_entry_failure_reason:#x}"
        return f"{name}{detail} at rip {self.regs.rip:#x}"

    def _enter_thread(self) -> None:
        _install_handler()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (KICK_SIGNAL,))
        self._thread = get_native_id()
        self._ident = get_ident()

    # registers: a property gets them all, set_ sets them all

    def _get(self, ioctl: api.Ioctl, into: ctypes.Structure) -> None:
        call(self.fd, ioctl, ctypes.byref(into), f"vCPU {self.index}")

    _set = _get

    @property
    def regs(self) -> s.kvm_regs:
        self._get(api.KVM_GET_REGS, regs := s.kvm_regs())
        return regs

    def set_regs(self, regs: s.kvm_regs) -> None:
        """Drops an exception that is pending."""
        self._set(api.KVM_SET_REGS, regs)

    @property
    def sregs(self) -> s.kvm_sregs:
        self._get(api.KVM_GET_SREGS, sregs := s.kvm_sregs())
        return sregs

    def set_sregs(self, sregs: s.kvm_sregs) -> None:
        self._set(api.KVM_SET_SREGS, sregs)

    @property
    def xcrs(self) -> s.kvm_xcrs:
        self._get(api.KVM_GET_XCRS, xcrs := s.kvm_xcrs())
        return xcrs

    def set_xcrs(self, xcrs: s.kvm_xcrs) -> None:
        self._set(api.KVM_SET_XCRS, xcrs)

    @property
    def events(self) -> s.kvm_vcpu_events:
        """What is being delivered or waits to be: exceptions, interrupts, NMIs, SMIs."""
        self._get(api.KVM_GET_VCPU_EVENTS, events := s.kvm_vcpu_events())
        return events

    def set_events(self, events: s.kvm_vcpu_events) -> None:
        self._set(api.KVM_SET_VCPU_EVENTS, events)

    @property
    def debugregs(self) -> s.kvm_debugregs:
        self._get(api.KVM_GET_DEBUGREGS, debugregs := s.kvm_debugregs())
        return debugregs

    def set_debugregs(self, debugregs: s.kvm_debugregs) -> None:
        self._set(api.KVM_SET_DEBUGREGS, debugregs)

    @property
    def lapic(self) -> s.kvm_lapic_state:
        """The register page of the local APIC, its first KiB."""
        self._get(api.KVM_GET_LAPIC, lapic := s.kvm_lapic_state())
        return lapic

    def set_lapic(self, lapic: s.kvm_lapic_state) -> None:
        self._set(api.KVM_SET_LAPIC, lapic)

    @property
    def mp_state(self) -> int:
        """KVM_MP_STATE_*. Asking delivers an INIT or SIPI that waits: ask this first of all."""
        self._get(api.KVM_GET_MP_STATE, state := s.kvm_mp_state())
        return int(state.mp_state)

    def set_mp_state(self, state: int) -> None:
        self._set(api.KVM_SET_MP_STATE, s.kvm_mp_state(state))

    @property
    def xsave(self) -> bytes:
        """FPU and vector registers, in the layout of CPUID leaf 0xd; at least 4096 bytes."""
        buffer = ctypes.create_string_buffer(self._xsave_size)
        ioctl = api.KVM_GET_XSAVE2 if self._xsave_size > 4096 else api.KVM_GET_XSAVE
        call(self.fd, ioctl, buffer, f"vCPU {self.index}")
        return buffer.raw

    def set_xsave(self, data: bytes) -> None:
        """ValueError when it is not as long as this VM's: the kernel would read what is behind it."""
        if len(data) != self._xsave_size:
            raise ValueError(f"{len(data)} bytes of XSAVE state, and this host's are {self._xsave_size}")
        call(self.fd, api.KVM_SET_XSAVE, data, f"vCPU {self.index}")

    @property
    def cpuid(self) -> list[CpuidEntry]:
        return cpuid.read(self.fd, api.KVM_GET_CPUID2, f"vCPU {self.index}")

    def set_cpuid(self, entries: Sequence[CpuidEntry]) -> None:
        """Before the first run; without it the guest sees a processor that can do nothing."""
        cpuid.write(self.fd, api.KVM_SET_CPUID2, entries, f"vCPU {self.index}, {len(entries)} entries")

    @property
    def tsc_khz(self) -> int:
        """What the guest's time stamp counter runs at, in kHz."""
        return call(self.fd, api.KVM_GET_TSC_KHZ, 0, f"vCPU {self.index}")

    def set_tsc_khz(self, khz: int) -> None:
        call(self.fd, api.KVM_SET_TSC_KHZ, khz, f"vCPU {self.index}, {khz} kHz")

    @property
    def tsc_offset(self) -> int | None:
        """The guest's time stamp counter less the host's (scaled to its rate), modulo 2^64; None before Linux 5.16."""
        value = ctypes.c_uint64()
        attr = s.kvm_device_attr(0, api.KVM_VCPU_TSC_CTRL, api.KVM_VCPU_TSC_OFFSET, ctypes.addressof(value))
        try:
            call(self.fd, api.KVM_GET_DEVICE_ATTR, ctypes.byref(attr), f"vCPU {self.index}, TSC offset")
        except KvmError as error:
            if error.errno not in (errno.ENXIO, errno.ENOTTY, errno.EINVAL):
                raise
            return None
        return value.value

    def set_tsc_offset(self, offset: int) -> None:
        """Exact, where writing the MSR is not: KVM takes a value less than a second off for an attempt to synchronize."""
        value = ctypes.c_uint64(offset)
        attr = s.kvm_device_attr(0, api.KVM_VCPU_TSC_CTRL, api.KVM_VCPU_TSC_OFFSET, ctypes.addressof(value))
        call(self.fd, api.KVM_SET_DEVICE_ATTR, ctypes.byref(attr), f"vCPU {self.index}, TSC offset")

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """Their values; what this vCPU has not is left out."""
        wanted = list(indices)
        found: dict[int, int] = {}
        while wanted:
            data = b"".join(_MSR.pack(index, 0) for index in wanted)
            buffer = ctypes.create_string_buffer(struct.pack("<II", len(wanted), 0) + data, 8 + len(data))
            done = call(self.fd, api.KVM_GET_MSRS, buffer, f"vCPU {self.index}")
            found.update(_MSR.unpack_from(buffer, 8 + n * _MSR.size) for n in range(done))
            wanted = wanted[done + 1 :]  # the kernel stops at the first that it cannot read
        return found

    def set_msrs(self, values: Mapping[int, int]) -> None:
        """In their order. One that the kernel refuses counts as set where it has that value (KVM's own, without a LAPIC).

        KvmError names the first that is not; those before it are set.
        """
        left = list(values)
        while left:
            data = b"".join(_MSR.pack(index, values[index]) for index in left)
            done = call(self.fd, api.KVM_SET_MSRS, struct.pack("<II", len(left), 0) + data, f"vCPU {self.index}")
            if done < len(left) and self.get_msrs(left[done : done + 1]).get(left[done]) != values[left[done]]:
                subject = f"vCPU {self.index}, MSR {left[done]:#x} to {values[left[done]]:#x}"
                raise KvmError(errno.EINVAL, "KVM_SET_MSRS", subject)
            left = left[done + 1 :]

    def kvmclock_ctrl(self) -> None:
        """Tell the guest that it was stopped, so that its watchdogs forgive. EINVAL when it does not use kvmclock."""
        call(self.fd, api.KVM_KVMCLOCK_CTRL, 0, f"vCPU {self.index}")

    def nmi(self) -> None:
        call(self.fd, api.KVM_NMI, 0, f"vCPU {self.index}")

    def stats_fd(self) -> int:
        """For `stats`; the caller's to close."""
        return call(self.fd, api.KVM_GET_STATS_FD, 0, f"vCPU {self.index}")

    def close(self) -> None:
        """Idempotent; not while it runs."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            self.page.release()
            del self.exit
            try:
                self._map.close()
            except BufferError:
                pass  # somebody still has a view of it: the page goes with it

    def __enter__(self) -> Vcpu:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _sigaction(ctypes.Structure):
    """glibc's struct sigaction (bits/sigaction.h)."""

    _fields_ = [
        ("sa_handler", ctypes.c_void_p),
        ("sa_mask", ctypes.c_uint8 * 128),
        ("sa_flags", ctypes.c_int),
        ("sa_restorer", ctypes.c_void_p),
    ]


_installed = False


def _install_handler() -> None:
    """Make KICK_SIGNAL interrupt system calls and do nothing else.

    The handler is libc's abs(), which reads its argument and touches nothing: Python's own handlers can be installed in the
    main thread alone, and would wake it for every kick.
    """
    global _installed
    if not _installed:
        action = _sigaction(sa_handler=ctypes.cast(libc.abs, ctypes.c_void_p))
        if libc.sigaction(int(KICK_SIGNAL), ctypes.byref(action), None) < 0:
            code = ctypes.get_errno()
            raise OSError(code, f"sigaction({KICK_SIGNAL}): {os.strerror(code)}")
        _installed = True
