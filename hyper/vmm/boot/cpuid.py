"""What CPUID tells each vCPU: what KVM supports, and who and how many they are, the same in every leaf.

KVM gives the table of the host's processor; identity, topology and the deadline timer are ours to fill in. One package of
`vcpus` cores, without threads; APIC ids are 0, 1, 2, ... as in the MADT.
Sources: Intel's SDM, volume 2, CPUID; AMD's APM, volume 3, appendix E; Documentation/virt/kvm/x86/cpuid.rst.
"""

from __future__ import annotations

from collections.abc import Iterable

from ambi.core.errors import Unsupported
from hyper.kvm.cpuid import CpuidEntry

INDEXED = 1  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX
KVM_SIGNATURE = 0x4000_0000
AMD = (0x6874_7541, 0x6F67_7948)  # leaf 0, EBX: of AuthenticAMD, HygonGenuine
KVM_VENDOR = (0x4B4D564B, 0x564B4D56, 0x0000004D)  # "KVMKVMKVM"

DEADLINE_TIMER = 1 << 24  # leaf 1, ECX; KVM has it and does not say so
HYPERVISOR = 1 << 31
HYPER_THREADING = 1 << 28  # leaf 1, EDX: the count in EBX means something
CMP_LEGACY = 1 << 1  # leaf 0x80000001, ECX, of AMD: those are cores
LEVEL_THREAD, LEVEL_CORE = 1, 2  # in ECX of leaf 0xb, bits 15 to 8
TOPOLOGY = (0xB, 0x1F)
PERFORMANCE_MONITORING = 0xA


def for_vcpu(supported: Iterable[CpuidEntry], apic_id: int, vcpus: int) -> list[CpuidEntry]:
    """The table of vCPU `apic_id` of `vcpus`.

    Raises Unsupported for a KVM without its paravirtual clock: Linux would need timers that this machine has not.
    """
    table = list(supported)
    leaves = {entry.function: entry for entry in table}
    signature = leaves.get(KVM_SIGNATURE)
    if signature is None or 0 not in leaves or (signature.ebx, signature.ecx, signature.edx) != KVM_VENDOR:
        raise Unsupported("KVM does not offer its paravirtual clock to guests", hint="ambi doctor")
    several_amd = vcpus > 1 and leaves[0].ebx in AMD
    found = [_entry(entry, apic_id, vcpus, several_amd) for entry in table if entry.function not in TOPOLOGY]
    for function in TOPOLOGY:
        if function <= leaves[0].eax:
            found += _levels(function, apic_id, vcpus)
    return found


def _entry(entry: CpuidEntry, apic_id: int, vcpus: int, several_amd: bool) -> CpuidEntry:
    function = entry.function
    if function == 1:
        ebx = entry.ebx & 0x0000_FFFF | apic_id << 24 | 1 << _bits(vcpus) << 16
        edx = entry.edx | HYPER_THREADING if vcpus > 1 else entry.edx & ~HYPER_THREADING
        return entry._replace(ebx=ebx, ecx=entry.ecx | DEADLINE_TIMER | HYPERVISOR, edx=edx)
    if function == 4 and entry.eax & 0x1F:
        return _cache(entry, vcpus, cores=True)
    if function == PERFORMANCE_MONITORING:
        return entry._replace(eax=0, ebx=0, ecx=0, edx=0)
    if function == 0x8000_0001:
        return entry._replace(ecx=entry.ecx | CMP_LEGACY if several_amd else entry.ecx & ~CMP_LEGACY)
    if function == 0x8000_0008:
        return entry._replace(ecx=_bits(vcpus) << 12 | vcpus - 1)
    if function == 0x8000_001D and entry.eax & 0x1F:
        return _cache(entry, vcpus, cores=False)
    if function == 0x8000_001E:
        return entry._replace(eax=apic_id, ebx=apic_id, ecx=0)  # a core of one thread, node 0
    return entry


def _cache(entry: CpuidEntry, vcpus: int, *, cores: bool) -> CpuidEntry:
    """Levels 1 and 2 are each core's own, level 3 is shared by all."""
    sharing = (1 << _bits(vcpus)) - 1 if entry.eax >> 5 & 7 >= 3 else 0
    eax = entry.eax & 0x0000_3FFF | sharing << 14
    if cores:
        eax |= (1 << _bits(vcpus)) - 1 << 26
    return entry._replace(eax=eax)


def _levels(function: int, apic_id: int, vcpus: int) -> list[CpuidEntry]:
    return [
        CpuidEntry(function, 0, INDEXED, 0, 1, LEVEL_THREAD << 8, apic_id),
        CpuidEntry(function, 1, INDEXED, _bits(vcpus), vcpus, LEVEL_CORE << 8 | 1, apic_id),
        CpuidEntry(function, 2, INDEXED, 0, 0, 2, apic_id),
    ]


def _bits(vcpus: int) -> int:
    """How many bits of the APIC id tell the vCPUs apart."""
    return (vcpus - 1).bit_length()
