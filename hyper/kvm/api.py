"""The KVM API of x86-64 as one table: every ioctl by the descriptor that it belongs to, with the capability it needs.

Sources: linux/kvm.h, asm/kvm.h; Documentation/virt/kvm/api.rst. Left out: what is deprecated, what other machines have, and
what belongs to Xen, Hyper-V, SEV, TDX and SGX. tests/unit/test_kvm_api.py compares each number with the header's.
"""

from __future__ import annotations

import ctypes
import errno
from typing import NamedTuple

from hyper.kvm import structs as s
from hyper.kvm.errors import KvmError

# KVM_CHECK_EXTENSION: 0 is absent, anything else is present or a figure
KVM_CAP_IRQCHIP = 0
KVM_CAP_USER_MEMORY = 3
KVM_CAP_SET_TSS_ADDR = 4
KVM_CAP_EXT_CPUID = 7
KVM_CAP_NR_VCPUS = 9
KVM_CAP_NR_MEMSLOTS = 10
KVM_CAP_MP_STATE = 14
KVM_CAP_COALESCED_MMIO = 15
KVM_CAP_USER_NMI = 22
KVM_CAP_SET_GUEST_DEBUG = 23
KVM_CAP_REINJECT_CONTROL = 24
KVM_CAP_IRQ_ROUTING = 25
KVM_CAP_MCE = 31
KVM_CAP_IRQFD = 32
KVM_CAP_PIT2 = 33
KVM_CAP_SET_BOOT_CPU_ID = 34
KVM_CAP_PIT_STATE2 = 35
KVM_CAP_IOEVENTFD = 36
KVM_CAP_SET_IDENTITY_MAP_ADDR = 37
KVM_CAP_ADJUST_CLOCK = 39
KVM_CAP_VCPU_EVENTS = 41
KVM_CAP_DEBUGREGS = 50
KVM_CAP_ENABLE_CAP = 54
KVM_CAP_XSAVE = 55
KVM_CAP_XCRS = 56
KVM_CAP_TSC_CONTROL = 60
KVM_CAP_GET_TSC_KHZ = 61
KVM_CAP_MAX_VCPUS = 66
KVM_CAP_ONE_REG = 70
KVM_CAP_TSC_DEADLINE_TIMER = 72
KVM_CAP_KVMCLOCK_CTRL = 76
KVM_CAP_SIGNAL_MSI = 77
KVM_CAP_READONLY_MEM = 81
KVM_CAP_IRQFD_RESAMPLE = 82
KVM_CAP_DEVICE_CTRL = 89
KVM_CAP_EXT_EMUL_CPUID = 95
KVM_CAP_ENABLE_CAP_VM = 98
KVM_CAP_CHECK_EXTENSION_VM = 105
KVM_CAP_X86_SMM = 117
KVM_CAP_SPLIT_IRQCHIP = 121
KVM_CAP_IOEVENTFD_ANY_LENGTH = 122
KVM_CAP_VCPU_ATTRIBUTES = 127
KVM_CAP_MAX_VCPU_ID = 128
KVM_CAP_X2APIC_API = 129
KVM_CAP_IMMEDIATE_EXIT = 136
KVM_CAP_X86_DISABLE_EXITS = 143
KVM_CAP_GET_MSR_FEATURES = 153
KVM_CAP_NESTED_STATE = 157
KVM_CAP_EXCEPTION_PAYLOAD = 164
KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 = 168
KVM_CAP_PMU_EVENT_FILTER = 173
KVM_CAP_X86_USER_SPACE_MSR = 188
KVM_CAP_X86_MSR_FILTER = 189
KVM_CAP_DIRTY_LOG_RING = 192
KVM_CAP_SREGS2 = 200
KVM_CAP_BINARY_STATS_FD = 203
KVM_CAP_XSAVE2 = 208
KVM_CAP_VM_TSC_CONTROL = 214
KVM_CAP_X86_TRIPLE_FAULT_EVENT = 218

# kvm_run.exit_reason
KVM_EXIT_UNKNOWN = 0
KVM_EXIT_EXCEPTION = 1
KVM_EXIT_IO = 2
KVM_EXIT_HYPERCALL = 3
KVM_EXIT_DEBUG = 4
KVM_EXIT_HLT = 5
KVM_EXIT_MMIO = 6
KVM_EXIT_IRQ_WINDOW_OPEN = 7
KVM_EXIT_SHUTDOWN = 8
KVM_EXIT_FAIL_ENTRY = 9
KVM_EXIT_INTR = 10
KVM_EXIT_SET_TPR = 11
KVM_EXIT_TPR_ACCESS = 12
KVM_EXIT_NMI = 16
KVM_EXIT_INTERNAL_ERROR = 17
KVM_EXIT_SYSTEM_EVENT = 24
KVM_EXIT_IOAPIC_EOI = 26
KVM_EXIT_X86_RDMSR = 29
KVM_EXIT_X86_WRMSR = 30
KVM_EXIT_DIRTY_RING_FULL = 31
KVM_EXIT_AP_RESET_HOLD = 32
KVM_EXIT_X86_BUS_LOCK = 33
KVM_EXIT_NOTIFY = 37

KVM_EXIT_IO_IN = 0
KVM_EXIT_IO_OUT = 1
KVM_SYSTEM_EVENT_SHUTDOWN = 1
KVM_SYSTEM_EVENT_RESET = 2
KVM_SYSTEM_EVENT_CRASH = 3
KVM_INTERNAL_ERROR_EMULATION = 1

# flags of the structs
KVM_MEM_LOG_DIRTY_PAGES = 1
KVM_MEM_READONLY = 2
KVM_IOEVENTFD_FLAG_DATAMATCH = 1
KVM_IOEVENTFD_FLAG_PIO = 2
KVM_IOEVENTFD_FLAG_DEASSIGN = 4
KVM_IRQFD_FLAG_DEASSIGN = 1
KVM_IRQFD_FLAG_RESAMPLE = 2
KVM_PIT_SPEAKER_DUMMY = 1
KVM_CPUID_FLAG_SIGNIFCANT_INDEX = 1
KVM_MP_STATE_RUNNABLE = 0
KVM_MP_STATE_UNINITIALIZED = 1
KVM_MP_STATE_INIT_RECEIVED = 2
KVM_MP_STATE_HALTED = 3
KVM_MP_STATE_SIPI_RECEIVED = 4
KVM_IRQCHIP_PIC_MASTER = 0
KVM_IRQCHIP_PIC_SLAVE = 1
KVM_IRQCHIP_IOAPIC = 2
KVM_VCPU_TSC_CTRL = 0  # a group of attributes of a vCPU (asm/kvm.h)
KVM_VCPU_TSC_OFFSET = 0  # its only one

KVM_API_VERSION = 12
MSR_IA32_TSC = 0x10  # asm/msr-index.h
MSR_IA32_TSC_DEADLINE = 0x6E0

NAMES: dict[int, str] = {}  # of exit reasons, for messages and counters
for _name, _value in list(globals().items()):
    if _name.startswith("KVM_EXIT_") and not _name.startswith("KVM_EXIT_IO_"):
        NAMES[_value] = _name.removeprefix("KVM_EXIT_").lower()
CAPABILITIES = {value: name for name, value in list(globals().items()) if name.startswith("KVM_CAP_")}


class Ioctl(NamedTuple):
    """`request` is the number for ioctl(2); `capability` is None where KVM_API_VERSION alone promises the call."""

    name: str
    request: int
    capability: int | None


# asm-generic/ioctl.h: direction, from user space's point of view, in the two top bits
NONE, W, R, RW = 0, 1, 2, 3
KVMIO = 0xAE


def _io(name: str, direction: int, number: int, size: type[ctypes.Structure] | int, capability: int | None = None) -> Ioctl:
    """`size`: the struct at the pointer, or its size in bytes where nothing here reads it; 0 for a plain number."""
    length = size if isinstance(size, int) else ctypes.sizeof(size)
    return Ioctl("KVM_" + name, direction << 30 | length << 16 | KVMIO << 8 | number, capability)


# fmt: off
# /dev/kvm
KVM_GET_API_VERSION            = _io("GET_API_VERSION",            NONE, 0x00, 0)
KVM_CREATE_VM                  = _io("CREATE_VM",                  NONE, 0x01, 0)  # 0; returns the VM's descriptor
KVM_GET_MSR_INDEX_LIST         = _io("GET_MSR_INDEX_LIST",         RW,   0x02, s.kvm_msr_list)
KVM_CHECK_EXTENSION            = _io("CHECK_EXTENSION",            NONE, 0x03, 0)  # of a VM as well
KVM_GET_VCPU_MMAP_SIZE         = _io("GET_VCPU_MMAP_SIZE",         NONE, 0x04, 0)
KVM_GET_SUPPORTED_CPUID        = _io("GET_SUPPORTED_CPUID",        RW,   0x05, s.kvm_cpuid2, KVM_CAP_EXT_CPUID)
KVM_GET_EMULATED_CPUID         = _io("GET_EMULATED_CPUID",         RW,   0x09, s.kvm_cpuid2, KVM_CAP_EXT_EMUL_CPUID)
KVM_GET_MSR_FEATURE_INDEX_LIST = _io("GET_MSR_FEATURE_INDEX_LIST", RW,   0x0A, s.kvm_msr_list, KVM_CAP_GET_MSR_FEATURES)
KVM_X86_GET_MCE_CAP_SUPPORTED  = _io("X86_GET_MCE_CAP_SUPPORTED",  R,    0x9D, 8, KVM_CAP_MCE)

# a VM
KVM_CREATE_VCPU                = _io("CREATE_VCPU",                NONE, 0x41, 0)  # its id; returns a descriptor
KVM_GET_DIRTY_LOG              = _io("GET_DIRTY_LOG",              W,    0x42, s.kvm_dirty_log)
KVM_SET_NR_MMU_PAGES           = _io("SET_NR_MMU_PAGES",           NONE, 0x44, 0)
KVM_GET_NR_MMU_PAGES           = _io("GET_NR_MMU_PAGES",           NONE, 0x45, 0)
KVM_SET_USER_MEMORY_REGION     = _io("SET_USER_MEMORY_REGION",     W,    0x46, s.kvm_userspace_memory_region,
                                     KVM_CAP_USER_MEMORY)
KVM_SET_TSS_ADDR               = _io("SET_TSS_ADDR",               NONE, 0x47, 0, KVM_CAP_SET_TSS_ADDR)
KVM_SET_IDENTITY_MAP_ADDR      = _io("SET_IDENTITY_MAP_ADDR",      W,    0x48, 8, KVM_CAP_SET_IDENTITY_MAP_ADDR)
KVM_CREATE_IRQCHIP             = _io("CREATE_IRQCHIP",             NONE, 0x60, 0, KVM_CAP_IRQCHIP)
KVM_IRQ_LINE                   = _io("IRQ_LINE",                   W,    0x61, s.kvm_irq_level, KVM_CAP_IRQCHIP)
KVM_GET_IRQCHIP                = _io("GET_IRQCHIP",                RW,   0x62, s.kvm_irqchip, KVM_CAP_IRQCHIP)
KVM_SET_IRQCHIP                = _io("SET_IRQCHIP",                R,    0x63, s.kvm_irqchip, KVM_CAP_IRQCHIP)
KVM_REGISTER_COALESCED_MMIO    = _io("REGISTER_COALESCED_MMIO",    W,    0x67, 16, KVM_CAP_COALESCED_MMIO)
KVM_UNREGISTER_COALESCED_MMIO  = _io("UNREGISTER_COALESCED_MMIO",  W,    0x68, 16, KVM_CAP_COALESCED_MMIO)
KVM_SET_GSI_ROUTING            = _io("SET_GSI_ROUTING",            W,    0x6A, 8, KVM_CAP_IRQ_ROUTING)
KVM_REINJECT_CONTROL           = _io("REINJECT_CONTROL",           NONE, 0x71, 0, KVM_CAP_REINJECT_CONTROL)
KVM_IRQFD                      = _io("IRQFD",                      W,    0x76, s.kvm_irqfd, KVM_CAP_IRQFD)
KVM_CREATE_PIT2                = _io("CREATE_PIT2",                W,    0x77, s.kvm_pit_config, KVM_CAP_PIT2)
KVM_SET_BOOT_CPU_ID            = _io("SET_BOOT_CPU_ID",            NONE, 0x78, 0, KVM_CAP_SET_BOOT_CPU_ID)
KVM_IOEVENTFD                  = _io("IOEVENTFD",                  W,    0x79, s.kvm_ioeventfd, KVM_CAP_IOEVENTFD)
KVM_SET_CLOCK                  = _io("SET_CLOCK",                  W,    0x7B, s.kvm_clock_data, KVM_CAP_ADJUST_CLOCK)
KVM_GET_CLOCK                  = _io("GET_CLOCK",                  R,    0x7C, s.kvm_clock_data, KVM_CAP_ADJUST_CLOCK)
KVM_GET_PIT2                   = _io("GET_PIT2",                   R,    0x9F, s.kvm_pit_state2, KVM_CAP_PIT_STATE2)
KVM_SET_PIT2                   = _io("SET_PIT2",                   W,    0xA0, s.kvm_pit_state2, KVM_CAP_PIT_STATE2)
KVM_SIGNAL_MSI                 = _io("SIGNAL_MSI",                 W,    0xA5, s.kvm_msi, KVM_CAP_SIGNAL_MSI)
KVM_SET_PMU_EVENT_FILTER       = _io("SET_PMU_EVENT_FILTER",       W,    0xB2, 32, KVM_CAP_PMU_EVENT_FILTER)
KVM_CLEAR_DIRTY_LOG            = _io("CLEAR_DIRTY_LOG",            RW,   0xC0, 24, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)
KVM_X86_SET_MSR_FILTER         = _io("X86_SET_MSR_FILTER",         W,    0xC6, 392, KVM_CAP_X86_MSR_FILTER)
KVM_RESET_DIRTY_RINGS          = _io("RESET_DIRTY_RINGS",          NONE, 0xC7, 0, KVM_CAP_DIRTY_LOG_RING)
KVM_CREATE_DEVICE              = _io("CREATE_DEVICE",              RW,   0xE0, 12, KVM_CAP_DEVICE_CTRL)

# a vCPU
KVM_RUN                        = _io("RUN",                        NONE, 0x80, 0)
KVM_GET_REGS                   = _io("GET_REGS",                   R,    0x81, s.kvm_regs)
KVM_SET_REGS                   = _io("SET_REGS",                   W,    0x82, s.kvm_regs)
KVM_GET_SREGS                  = _io("GET_SREGS",                  R,    0x83, s.kvm_sregs)
KVM_SET_SREGS                  = _io("SET_SREGS",                  W,    0x84, s.kvm_sregs)
KVM_TRANSLATE                  = _io("TRANSLATE",                  RW,   0x85, 24)
KVM_INTERRUPT                  = _io("INTERRUPT",                  W,    0x86, 4)  # without irqchip
KVM_GET_MSRS                   = _io("GET_MSRS",                   RW,   0x88, s.kvm_msrs)  # returns how many it did
KVM_SET_MSRS                   = _io("SET_MSRS",                   W,    0x89, s.kvm_msrs)
KVM_SET_SIGNAL_MASK            = _io("SET_SIGNAL_MASK",            W,    0x8B, 4)
KVM_GET_FPU                    = _io("GET_FPU",                    R,    0x8C, 416)
KVM_SET_FPU                    = _io("SET_FPU",                    W,    0x8D, 416)
KVM_GET_LAPIC                  = _io("GET_LAPIC",                  R,    0x8E, s.kvm_lapic_state, KVM_CAP_IRQCHIP)
KVM_SET_LAPIC                  = _io("SET_LAPIC",                  W,    0x8F, s.kvm_lapic_state, KVM_CAP_IRQCHIP)
KVM_SET_CPUID2                 = _io("SET_CPUID2",                 W,    0x90, s.kvm_cpuid2, KVM_CAP_EXT_CPUID)
KVM_GET_CPUID2                 = _io("GET_CPUID2",                 RW,   0x91, s.kvm_cpuid2, KVM_CAP_EXT_CPUID)
KVM_GET_MP_STATE               = _io("GET_MP_STATE",               R,    0x98, s.kvm_mp_state, KVM_CAP_MP_STATE)
KVM_SET_MP_STATE               = _io("SET_MP_STATE",               W,    0x99, s.kvm_mp_state, KVM_CAP_MP_STATE)
KVM_NMI                        = _io("NMI",                        NONE, 0x9A, 0, KVM_CAP_USER_NMI)
KVM_SET_GUEST_DEBUG            = _io("SET_GUEST_DEBUG",            W,    0x9B, 72, KVM_CAP_SET_GUEST_DEBUG)
KVM_X86_SETUP_MCE              = _io("X86_SETUP_MCE",              W,    0x9C, 8, KVM_CAP_MCE)
KVM_X86_SET_MCE                = _io("X86_SET_MCE",                W,    0x9E, 64, KVM_CAP_MCE)
KVM_GET_VCPU_EVENTS            = _io("GET_VCPU_EVENTS",            R,    0x9F, s.kvm_vcpu_events, KVM_CAP_VCPU_EVENTS)
KVM_SET_VCPU_EVENTS            = _io("SET_VCPU_EVENTS",            W,    0xA0, s.kvm_vcpu_events, KVM_CAP_VCPU_EVENTS)
KVM_GET_DEBUGREGS              = _io("GET_DEBUGREGS",              R,    0xA1, s.kvm_debugregs, KVM_CAP_DEBUGREGS)
KVM_SET_DEBUGREGS              = _io("SET_DEBUGREGS",              W,    0xA2, s.kvm_debugregs, KVM_CAP_DEBUGREGS)
KVM_SET_TSC_KHZ                = _io("SET_TSC_KHZ",                NONE, 0xA2, 0, KVM_CAP_TSC_CONTROL)
KVM_ENABLE_CAP                 = _io("ENABLE_CAP",                 W,    0xA3, s.kvm_enable_cap, KVM_CAP_ENABLE_CAP)
KVM_GET_TSC_KHZ                = _io("GET_TSC_KHZ",                NONE, 0xA3, 0, KVM_CAP_GET_TSC_KHZ)
KVM_GET_XSAVE                  = _io("GET_XSAVE",                  R,    0xA4, s.kvm_xsave, KVM_CAP_XSAVE)
KVM_SET_XSAVE                  = _io("SET_XSAVE",                  W,    0xA5, s.kvm_xsave, KVM_CAP_XSAVE)
KVM_GET_XCRS                   = _io("GET_XCRS",                   R,    0xA6, s.kvm_xcrs, KVM_CAP_XCRS)
KVM_SET_XCRS                   = _io("SET_XCRS",                   W,    0xA7, s.kvm_xcrs, KVM_CAP_XCRS)
KVM_GET_ONE_REG                = _io("GET_ONE_REG",                W,    0xAB, 16, KVM_CAP_ONE_REG)
KVM_SET_ONE_REG                = _io("SET_ONE_REG",                W,    0xAC, 16, KVM_CAP_ONE_REG)
KVM_KVMCLOCK_CTRL              = _io("KVMCLOCK_CTRL",              NONE, 0xAD, 0, KVM_CAP_KVMCLOCK_CTRL)
KVM_SMI                        = _io("SMI",                        NONE, 0xB7, 0, KVM_CAP_X86_SMM)
KVM_GET_NESTED_STATE           = _io("GET_NESTED_STATE",           RW,   0xBE, 128, KVM_CAP_NESTED_STATE)
KVM_SET_NESTED_STATE           = _io("SET_NESTED_STATE",           W,    0xBF, 128, KVM_CAP_NESTED_STATE)
KVM_GET_SREGS2                 = _io("GET_SREGS2",                 R,    0xCC, 320, KVM_CAP_SREGS2)
KVM_SET_SREGS2                 = _io("SET_SREGS2",                 W,    0xCD, 320, KVM_CAP_SREGS2)
KVM_GET_STATS_FD               = _io("GET_STATS_FD",               NONE, 0xCE, 0, KVM_CAP_BINARY_STATS_FD)  # of a VM too
KVM_GET_XSAVE2                 = _io("GET_XSAVE2",                 R,    0xCF, s.kvm_xsave, KVM_CAP_XSAVE2)

# a device made by KVM_CREATE_DEVICE; a VM and a vCPU have attributes too
KVM_SET_DEVICE_ATTR            = _io("SET_DEVICE_ATTR",            W,    0xE1, s.kvm_device_attr, KVM_CAP_DEVICE_CTRL)
KVM_GET_DEVICE_ATTR            = _io("GET_DEVICE_ATTR",            W,    0xE2, s.kvm_device_attr, KVM_CAP_DEVICE_CTRL)
KVM_HAS_DEVICE_ATTR            = _io("HAS_DEVICE_ATTR",            W,    0xE3, s.kvm_device_attr, KVM_CAP_DEVICE_CTRL)
# fmt: on

TABLE = tuple(value for value in list(globals().values()) if isinstance(value, Ioctl))

libc = ctypes.CDLL(None, use_errno=True)  # a call through it lets other threads run
raw_ioctl = libc.ioctl
raw_ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
raw_ioctl.restype = ctypes.c_int


def call(fd: int, ioctl: Ioctl, argument: object = None, subject: str = "") -> int:
    """What the kernel answers. `argument`: a number, ctypes.byref(struct) or a ctypes array.

    Raises:
        KvmError: with `subject` in its words, and the capability where the kernel does not know the call.
    """
    result: int = raw_ioctl(fd, ioctl.request, argument)
    if result < 0:
        raise failure(ctypes.get_errno(), ioctl, subject)
    return result


def failure(code: int, ioctl: Ioctl, subject: str) -> KvmError:
    """The error for errno `code`; a call that the kernel does not know is said to need its capability."""
    needs = ""
    if ioctl.capability is not None and code in (errno.ENOTTY, errno.EINVAL, errno.ENXIO):
        needs = CAPABILITIES[ioctl.capability]
    return KvmError(code, ioctl.name, subject, needs)
