"""The kernel's structs of the KVM API that we use, under their kernel names.

Sources: linux/kvm.h and asm/kvm.h of x86-64; Documentation/virt/kvm/api.rst. Sizes and offsets are compared with the
header's in tests/unit/test_kvm_api.py. A struct that ends in a flexible array stands for its head alone.
"""

from __future__ import annotations

from ctypes import Structure, Union, c_int16, c_int32
from ctypes import c_uint8 as u8
from ctypes import c_uint16 as u16
from ctypes import c_uint32 as u32
from ctypes import c_uint64 as u64


def _each(kind: type, names: str) -> list[tuple[str, type]]:
    """A field of `kind` for each word."""
    return [(name, kind) for name in names.split()]


class kvm_userspace_memory_region(Structure):
    _fields_ = [
        ("slot", u32),
        ("flags", u32),
        ("guest_phys_addr", u64),
        ("memory_size", u64),
        ("userspace_addr", u64),
    ]


class kvm_dirty_log(Structure):
    _fields_ = [("slot", u32), ("padding1", u32), ("dirty_bitmap", u64)]


class kvm_irq_level(Structure):
    _fields_ = [("irq", u32), ("level", u32)]


class kvm_irqfd(Structure):
    _fields_ = [("fd", u32), ("gsi", u32), ("flags", u32), ("resamplefd", u32), ("pad", u8 * 16)]


class kvm_ioeventfd(Structure):
    _fields_ = [
        ("datamatch", u64),
        ("addr", u64),
        ("len", u32),
        ("fd", c_int32),
        ("flags", u32),
        ("pad", u8 * 36),
    ]


class kvm_pit_config(Structure):
    _fields_ = [("flags", u32), ("pad", u32 * 15)]


class kvm_pit_state2(Structure):
    """Three channels of 24 bytes, flags, reserved words: kept as it is."""

    _fields_ = [("channels", u8 * 72), ("flags", u32), ("reserved", u32 * 9)]


class kvm_irqchip(Structure):
    """chip_id: which of the three; chip: its registers, kept as they are."""

    _fields_ = [("chip_id", u32), ("pad", u32), ("chip", u8 * 512)]


class kvm_clock_data(Structure):
    _fields_ = [
        ("clock", u64),
        ("flags", u32),
        ("pad0", u32),
        ("realtime", u64),
        ("host_tsc", u64),
        ("pad", u32 * 4),
    ]


class kvm_msi(Structure):
    _fields_ = [
        ("address_lo", u32),
        ("address_hi", u32),
        ("data", u32),
        ("flags", u32),
        ("devid", u32),
        ("pad", u8 * 12),
    ]


class kvm_enable_cap(Structure):
    _fields_ = [("cap", u32), ("flags", u32), ("args", u64 * 4), ("pad", u8 * 64)]


class kvm_device_attr(Structure):
    _fields_ = [("flags", u32), ("group", u32), ("attr", u64), ("addr", u64)]


class kvm_regs(Structure):
    _fields_ = _each(u64, "rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags")


class kvm_segment(Structure):
    _fields_ = [
        ("base", u64),
        ("limit", u32),
        ("selector", u16),
        *_each(u8, "type present dpl db s l g avl unusable padding"),
    ]


class kvm_dtable(Structure):
    _fields_ = [("base", u64), ("limit", u16), ("padding", u16 * 3)]


class kvm_sregs(Structure):
    _fields_ = [
        *_each(kvm_segment, "cs ds es fs gs ss tr ldt"),
        ("gdt", kvm_dtable),
        ("idt", kvm_dtable),
        *_each(u64, "cr0 cr2 cr3 cr4 cr8 efer apic_base"),
        ("interrupt_bitmap", u64 * 4),
    ]


class kvm_msr_entry(Structure):
    _fields_ = [("index", u32), ("reserved", u32), ("data", u64)]


class kvm_msrs(Structure):
    """Followed by `nmsrs` of kvm_msr_entry."""

    _fields_ = [("nmsrs", u32), ("pad", u32)]


class kvm_msr_list(Structure):
    """Followed by `nmsrs` of u32."""

    _fields_ = [("nmsrs", u32)]


class kvm_cpuid_entry2(Structure):
    _fields_ = [
        *_each(u32, "function index flags eax ebx ecx edx"),
        ("padding", u32 * 3),
    ]


class kvm_cpuid2(Structure):
    """Followed by `nent` of kvm_cpuid_entry2."""

    _fields_ = [("nent", u32), ("padding", u32)]


class kvm_lapic_state(Structure):
    _fields_ = [("regs", u8 * 1024)]


class kvm_mp_state(Structure):
    _fields_ = [("mp_state", u32)]


class kvm_xcr(Structure):
    _fields_ = [("xcr", u32), ("reserved", u32), ("value", u64)]


class kvm_xcrs(Structure):
    _fields_ = [("nr_xcrs", u32), ("flags", u32), ("xcrs", kvm_xcr * 16), ("padding", u64 * 16)]


class kvm_xsave(Structure):
    """The first 4096 bytes; how many there are says KVM_CAP_XSAVE2 of the VM."""

    _fields_ = [("region", u32 * 1024)]


class kvm_debugregs(Structure):
    _fields_ = [("db", u64 * 4), ("dr6", u64), ("dr7", u64), ("flags", u64), ("reserved", u64 * 9)]


class kvm_vcpu_events(Structure):
    class _exception(Structure):
        _fields_ = [("injected", u8), ("nr", u8), ("has_error_code", u8), ("pending", u8), ("error_code", u32)]

    class _interrupt(Structure):
        _fields_ = [("injected", u8), ("nr", u8), ("soft", u8), ("shadow", u8)]

    class _nmi(Structure):
        _fields_ = [("injected", u8), ("pending", u8), ("masked", u8), ("pad", u8)]

    class _smi(Structure):
        _fields_ = [("smm", u8), ("pending", u8), ("smm_inside_nmi", u8), ("latched_init", u8)]

    _fields_ = [
        ("exception", _exception),
        ("interrupt", _interrupt),
        ("nmi", _nmi),
        ("sipi_vector", u32),
        ("flags", u32),
        ("smi", _smi),
        ("triple_fault_pending", u8),
        ("reserved", u8 * 26),
        ("exception_has_payload", u8),
        ("exception_payload", u64),
    ]


class kvm_run(Structure):
    """The page that a vCPU shares with us: what it is asked to do, and why it stopped.

    The union's member for each exit has the exit's name in the header: io (KVM_EXIT_IO), mmio, internal, ...
    """

    class exits(Union):
        class _fail_entry(Structure):
            _fields_ = [("hardware_entry_failure_reason", u64), ("cpu", u32)]

        class _ex(Structure):
            _fields_ = [("exception", u32), ("error_code", u32)]

        class _io(Structure):
            _fields_ = [("direction", u8), ("size", u8), ("port", u16), ("count", u32), ("data_offset", u64)]

        class _debug(Structure):
            _fields_ = [("exception", u32), ("pad", u32), ("pc", u64), ("dr6", u64), ("dr7", u64)]

        class _mmio(Structure):
            _fields_ = [("phys_addr", u64), ("data", u8 * 8), ("len", u32), ("is_write", u8)]

        class _hypercall(Structure):
            _fields_ = [("nr", u64), ("args", u64 * 6), ("ret", u64), ("longmode", u32), ("pad", u32)]

        class _internal(Structure):
            _fields_ = [("suberror", u32), ("ndata", u32), ("data", u64 * 16)]

        class _emulation_failure(Structure):
            _fields_ = [("suberror", u32), ("ndata", u32), ("flags", u64), ("insn_size", u8), ("insn_bytes", u8 * 15)]

        class _system_event(Structure):
            _fields_ = [("type", u32), ("ndata", u32), ("data", u64 * 16)]

        class _msr(Structure):
            _fields_ = [("error", u8), ("pad", u8 * 7), ("reason", u32), ("index", u32), ("data", u64)]

        _fields_ = [
            ("hardware_exit_reason", u64),
            ("fail_entry", _fail_entry),
            ("ex", _ex),
            ("io", _io),
            ("debug", _debug),
            ("mmio", _mmio),
            ("hypercall", _hypercall),
            ("internal", _internal),
            ("emulation_failure", _emulation_failure),
            ("system_event", _system_event),
            ("eoi_vector", u8),
            ("msr", _msr),
            ("notify_flags", u32),
            ("padding", u8 * 256),
        ]

    _anonymous_ = ("_exits",)
    _fields_ = [
        ("request_interrupt_window", u8),
        ("immediate_exit", u8),
        ("padding1", u8 * 6),
        ("exit_reason", u32),
        ("ready_for_interrupt_injection", u8),
        ("if_flag", u8),
        ("flags", u16),
        ("cr8", u64),
        ("apic_base", u64),
        ("_exits", exits),
        ("kvm_valid_regs", u64),
        ("kvm_dirty_regs", u64),
        ("s", u8 * 2048),
    ]


class kvm_stats_header(Structure):
    _fields_ = _each(u32, "flags name_size num_desc id_offset desc_offset data_offset")


class kvm_stats_desc(Structure):
    """Followed by the name: `name_size` bytes of the header, NUL terminated. exponent: see KVM_STATS_UNIT_*."""

    _fields_ = [("flags", u32), ("exponent", c_int16), ("size", u16), ("offset", u32), ("bucket_size", u32)]
