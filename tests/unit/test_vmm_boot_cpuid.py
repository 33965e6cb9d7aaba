"""What CPUID tells the vCPUs of a machine, for tables as Intel's and AMD's processors have them."""

from __future__ import annotations

import pytest

from ambi.core.errors import Unsupported
from hyper.kvm.cpuid import CpuidEntry
from hyper.vmm.boot import cpuid

INTEL, AMD = 0x756E_6547, 0x6874_7541
KVM = CpuidEntry(0x4000_0000, 0, 0, 0x4000_0001, *cpuid.KVM_VENDOR)


def host(vendor: int, highest: int = 0x1F) -> list[CpuidEntry]:
    """A table as KVM gives it: of a processor with many cores, seen from APIC id 7."""
    return [
        CpuidEntry(0, 0, 0, highest, vendor, 0, 0),
        CpuidEntry(1, 0, 0, 0xA0F11, 0x0710_0800, 0x7ED8_320B, 0x078B_FBFF),
        CpuidEntry(4, 0, 1, 0xFC00_C121, 0x1C0_003F, 0x3F, 0),
        CpuidEntry(4, 3, 1, 0xFC1F_C163, 0x3C0_003F, 0xFFF, 6),
        CpuidEntry(4, 4, 1, 0, 0, 0, 0),
        CpuidEntry(0xA, 0, 0, 0x0730_0402, 0, 0, 0x603),
        CpuidEntry(0xB, 0, 1, 1, 2, 0x100, 7),
        CpuidEntry(0xB, 1, 1, 6, 64, 0x201, 7),
        CpuidEntry(0x1F, 0, 1, 1, 2, 0x100, 7),
        KVM,
        CpuidEntry(0x4000_0001, 0, 0, 0x0100_7EFB, 0, 0, 0),
        CpuidEntry(0x8000_0001, 0, 0, 0xA0F11, 0, 0x75C2_37FF, 0x2FD3_FBFF),
        CpuidEntry(0x8000_0008, 0, 0, 0x3030, 0x1000, 0x703F, 0),
        CpuidEntry(0x8000_001D, 3, 1, 0x3C163, 0x3C0_003F, 0x3FFF, 1),
        CpuidEntry(0x8000_001E, 0, 0, 7, 0x103, 0x300, 0),
    ]


def rows(vendor: int, apic_id: int, vcpus: int, highest: int = 0x1F) -> dict[tuple[int, int], CpuidEntry]:
    made = cpuid.for_vcpu(host(vendor, highest), apic_id, vcpus)
    found = {(row.function, row.index): row for row in made}
    assert len(found) == len(made), "no row twice"
    return found


@pytest.mark.parametrize("vendor", [INTEL, AMD])
@pytest.mark.parametrize("vcpus", [1, 2, 3, 4, 5, 8, 16])
def test_every_leaf_says_the_same(vendor: int, vcpus: int) -> None:
    bits = (vcpus - 1).bit_length()
    for apic_id in range(vcpus):
        found = rows(vendor, apic_id, vcpus)
        one = found[1, 0]
        assert one.ebx >> 24 == apic_id and one.ebx >> 16 & 0xFF == 1 << bits and one.ebx & 0xFFFF == 0x0800
        assert one.ecx >> 31 and one.ecx >> 24 & 1, "a hypervisor, with a deadline timer"
        assert bool(one.edx >> 28 & 1) == (vcpus > 1)
        for leaf in (0xB, 0x1F):
            assert found[leaf, 0][3:] == (0, 1, 0x100, apic_id), "a thread a core"
            assert found[leaf, 1][3:] == (bits, vcpus, 0x201, apic_id)
            assert found[leaf, 2].ecx >> 8 == 0, "and that is all"
        assert found[4, 0].eax >> 14 & 0xFFF == 0, "the first level is its own"
        assert found[4, 3].eax >> 14 & 0xFFF == (1 << bits) - 1, "the third is everybody's"
        assert found[4, 3].eax >> 26 == (1 << bits) - 1
        assert found[0x8000_0008, 0].ecx == bits << 12 | vcpus - 1
        assert found[0x8000_0008, 0].eax == 0x3030, "addresses are as wide as the host's"
        assert found[0x8000_001E, 0][3:6] == (apic_id, apic_id, 0)
        assert found[0x8000_001D, 3].eax >> 14 & 0xFFF == (1 << bits) - 1
        assert bool(found[0x8000_0001, 0].ecx >> 1 & 1) == (vendor == AMD and vcpus > 1)
        assert found[0xA, 0][3:] == (0, 0, 0, 0), "no counters, which no snapshot could move"


def test_leaves_that_the_processor_has_not_are_not_made() -> None:
    assert (0x1F, 0) not in rows(AMD, 0, 2, highest=0x10)
    assert (0xB, 0) not in rows(AMD, 0, 2, highest=0xA)


def test_a_kvm_without_its_clock_is_refused() -> None:
    for table in ([], [row for row in host(INTEL) if row != KVM], [*host(INTEL)[1:]]):
        with pytest.raises(Unsupported, match="paravirtual clock"):
            cpuid.for_vcpu(table, 0, 1)
