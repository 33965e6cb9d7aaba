"""The table of the KVM API against the kernel's own header, and the sizes that the documentation gives."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest

from hyper.kvm import api, state, structs
from hyper.kvm.errors import KvmError, Lacking
from hyper.kvm.memory import set_bits

HEADER = Path("/usr/include/linux/kvm.h")
STRUCTS = {
    name: value
    for name, value in vars(structs).items()
    if name.startswith("kvm_") and isinstance(value, type) and issubclass(value, ctypes.Structure)
}
# Of a field whose parts we keep together, or that the header has in an unnamed struct, the header's name.
RENAMED = {
    "kvm_vcpu_events.triple_fault_pending": "triple_fault.pending",
    "kvm_run.hardware_exit_reason": "hw.hardware_exit_reason",
    "kvm_run.eoi_vector": "eoi.vector",
    "kvm_run.notify_flags": "notify.flags",
    "kvm_run._exits": "hw",
    "kvm_irqchip.chip": "chip.dummy",
}


# Fields that newer headers have under another name, or only for the kernel.
GONE = {"kvm_run.hypercall.pad": "__u32 pad;\n\t\t} hypercall;"}


def offsets(name: str, kind: type[ctypes.Structure]) -> dict[str, int]:
    """`field`, and for structs within it `field.part`, to its offset."""
    found = {}
    fields = [field[:2] for field in kind._fields_]
    if name == "kvm_run":
        fields += [field[:2] for field in structs.kvm_run.exits._fields_]
    for field, inner in fields:
        at = getattr(kind, field).offset
        found[field] = at
        if field == "debug":
            continue  # whose only member has the fields
        for part, *_ in getattr(inner, "_fields_", ()) if field != "_exits" else ():
            found[f"{field}.{part}"] = at + getattr(inner, part).offset
    return found


def test_sizes_are_those_of_the_documentation() -> None:
    """Documentation/virt/kvm/api.rst and the headers of Linux 6.1; none of them may ever change."""
    assert {name: ctypes.sizeof(kind) for name, kind in STRUCTS.items()} == {
        "kvm_clock_data": 48, "kvm_cpuid2": 8, "kvm_cpuid_entry2": 40, "kvm_debugregs": 128, "kvm_device_attr": 24,
        "kvm_dirty_log": 16, "kvm_dtable": 16, "kvm_enable_cap": 104, "kvm_ioeventfd": 64, "kvm_irq_level": 8,
        "kvm_irqchip": 520, "kvm_irqfd": 32, "kvm_lapic_state": 1024, "kvm_mp_state": 4, "kvm_msi": 32,
        "kvm_msr_entry": 16, "kvm_msr_list": 4, "kvm_msrs": 8, "kvm_pit_config": 64, "kvm_pit_state2": 112,
        "kvm_regs": 144, "kvm_run": 2352, "kvm_segment": 24, "kvm_sregs": 312, "kvm_stats_desc": 16,
        "kvm_stats_header": 24, "kvm_userspace_memory_region": 32, "kvm_vcpu_events": 64, "kvm_xcr": 16, "kvm_xcrs": 392,
        "kvm_xsave": 4096,
    }  # fmt: skip


@pytest.mark.needs("gcc")
@pytest.mark.skipif(not HEADER.exists(), reason="linux/kvm.h is not installed (Debian package linux-libc-dev)")
def test_numbers_sizes_and_offsets_are_the_headers(tmp_path: Path) -> None:
    """A C program prints what the header says of each name in the table; it may lack a newer kernel's capabilities."""
    header = HEADER.read_text()
    ours: dict[str, int] = {}
    lines = []
    for ioctl in api.TABLE:
        ours[ioctl.name] = ioctl.request
        lines.append(f'P("{ioctl.name}", {ioctl.name});')
    constants = ("KVM_CAP_", "KVM_EXIT_", "KVM_MEM_", "KVM_MP_", "KVM_IRQCHIP_", "KVM_SYSTEM_EVENT_", "KVM_INTERNAL_")
    for name, value in vars(api).items():
        if name.startswith((*constants, "KVM_IOEVENTFD_FLAG", "KVM_IRQFD_FLAG", "KVM_CPUID_FLAG", "KVM_PIT_SPEAKER")):
            assert isinstance(value, int)
            if name in header or not name.startswith("KVM_CAP_"):
                ours[name] = value
                lines.append(f'P("{name}", {name});')
    for name, kind in STRUCTS.items():
        if name not in ("kvm_stats_desc", "kvm_xsave"):  # both end in a flexible array that old headers have as one of 0
            ours[name] = ctypes.sizeof(kind)
            lines.append(f'P("{name}", sizeof(struct {name}));')
        for field, offset in offsets(name, kind).items():
            if f"{name}.{field}" in GONE and GONE[f"{name}.{field}"] not in header:
                continue
            theirs = RENAMED.get(f"{name}.{field}", field)
            ours[f"{name}.{field}"] = offset
            lines.append(f'P("{name}.{field}", offsetof(struct {name}, {theirs}));')
    source = "#include <linux/kvm.h>\n#include <stddef.h>\n#include <stdio.h>\n"
    source += '#define P(name, value) printf("%s %lu\\n", name, (unsigned long)(value))\n'
    (tmp_path / "header.c").write_text(source + "int main(void) {\n" + "\n".join(lines) + "\nreturn 0;\n}\n")
    subprocess.run(["gcc", "-o", tmp_path / "header", tmp_path / "header.c"], check=True)
    printed = subprocess.run([tmp_path / "header"], check=True, capture_output=True, text=True).stdout
    theirs_all = {name: int(value) for name, value in (line.split() for line in printed.splitlines())}
    assert len(theirs_all) > 350
    assert ours == theirs_all


def test_every_ioctl_is_named_once_and_needs_a_known_capability() -> None:
    names = [ioctl.name for ioctl in api.TABLE]
    assert len(set(names)) == len(names) > 70
    for ioctl in api.TABLE:
        assert getattr(api, ioctl.name) is ioctl
        assert ioctl.capability is None or ioctl.capability in api.CAPABILITIES
    assert api.NAMES[api.KVM_EXIT_IO] == "io" and api.NAMES[api.KVM_EXIT_SHUTDOWN] == "shutdown"


def test_errors_have_errno_call_subject_and_capability() -> None:
    error = api.failure(25, api.KVM_GET_STATS_FD, "vCPU 3")
    assert isinstance(error, OSError) and error.errno == 25 and error.subject == "vCPU 3"
    assert error.strerror == "KVM_GET_STATS_FD (vCPU 3): Inappropriate ioctl for device; it needs KVM_CAP_BINARY_STATS_FD"
    assert api.failure(17, api.KVM_CREATE_IRQCHIP, "").strerror == "KVM_CREATE_IRQCHIP: File exists"
    assert str(api.failure(22, api.KVM_CREATE_IRQCHIP, "")).endswith("it needs KVM_CAP_IRQCHIP")
    assert issubclass(Lacking, KvmError)


def test_runs_of_set_bits() -> None:
    assert list(set_bits(b"")) == [] and list(set_bits(bytes(64))) == []
    assert list(set_bits(b"\xff\x01\x00\x80\x01")) == [(0, 9), (31, 33)]
    pages = {0, 1, 2, 63, 64, 100, 4095}
    bitmap = bytearray(512)
    for page in pages:
        bitmap[page // 8] |= 1 << page % 8
    assert {page for start, end in set_bits(bitmap) for page in range(start, end)} == pages


def test_a_hypervisor_is_known_by_its_registers() -> None:
    """AMD64 manual 2, 15.4: EFER.SVME is bit 12; Intel's manual 3, 23.7: CR4.VMXE is bit 13."""
    assert not state.is_hypervisor(structs.kvm_sregs(efer=0xD01, cr4=0x6F0))
    assert state.is_hypervisor(structs.kvm_sregs(efer=0x1D01, cr4=0x6F0))
    assert state.is_hypervisor(structs.kvm_sregs(efer=0xD01, cr4=0x26F0))
