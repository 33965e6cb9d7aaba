"""The ACPI tables: CPUs, the I/O APIC, the serial port, the virtio-mmio slots, and how to power off.

Hardware-reduced: there is no power management timer, SCI, PIC or PIT to be found, and Linux does not look for them.
The kernel of a distribution takes virtio-mmio devices from ACPI alone (LNRO0005), not from its command line.
Source: ACPI 6.5, sections 5.2.5 to 5.2.12.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from hyper.vmm.boot import aml
from hyper.vmm.layout import (
    ACPI,
    ACPI_END,
    COM1,
    COM1_IRQ,
    IOAPIC,
    LAPIC,
    PAGE,
    PORT_I8042,
    PORT_SLEEP,
    slot_address,
    slot_gsi,
)  # fmt: skip

OEM = b"AMBI  "
OEM_TABLE = b"AMBIVMM "
CREATOR = b"AMBI"
SLEEP_TYPE_S5 = 5
RESET_VALUE = 0xFE  # to the keyboard controller's command port

FADT_WBINVD = 1 << 0
FADT_SLP_BUTTON = 1 << 5  # the control methods' buttons, which are not there
FADT_PWR_BUTTON = 1 << 4
FADT_RESET_REG_SUP = 1 << 10
FADT_HW_REDUCED = 1 << 20
BOOT_ARCH_NO_VGA = 1 << 2
BOOT_ARCH_NO_MSI = 1 << 3
BOOT_ARCH_NO_CMOS_RTC = 1 << 5
SYSTEM_IO = 1  # an address space

_HEADER = struct.Struct("<4sIBB6s8sI4sI")
_RSDP = struct.Struct("<8sB6sBIIQB3x")


class Tables(NamedTuple):
    """`data` belongs at ACPI, and begins with the RSDP."""

    data: bytes
    rsdp: int


def build(vcpus: int, slots: int) -> Tables:
    """The tables of a machine with `vcpus` (APIC ids from 0 on) and virtio-mmio slots 0 to `slots` - 1."""
    at = ACPI + 64  # behind the RSDP
    blob = bytearray(64)

    def put(table: bytes) -> int:
        address = ACPI + len(blob)
        blob.extend(table)
        blob.extend(bytes(-len(blob) % 16))
        return address

    dsdt_at = put(dsdt(slots))
    assert dsdt_at == at
    fadt_at = put(fadt(dsdt_at))
    madt_at = put(madt(vcpus))
    xsdt_at = put(_table(b"XSDT", 1, struct.pack("<QQ", fadt_at, madt_at)))
    blob[: _RSDP.size] = rsdp(xsdt_at)
    assert len(blob) <= ACPI_END - ACPI
    return Tables(bytes(blob), ACPI)


def rsdp(xsdt: int) -> bytes:
    data = bytearray(_RSDP.pack(b"RSD PTR ", 0, OEM, 2, 0, _RSDP.size, xsdt, 0))
    data[8] = -sum(data[:20]) & 0xFF
    data[32] = -sum(data) & 0xFF
    return bytes(data)


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    length = _HEADER.size + len(body)
    data = bytearray(_HEADER.pack(signature, length, revision, 0, OEM, OEM_TABLE, 1, CREATOR, 1) + body)
    data[9] = -sum(data) & 0xFF
    return bytes(data)


def _port(address: int) -> bytes:
    """A generic address structure: a byte-wide register at a port."""
    return struct.pack("<BBBBQ", SYSTEM_IO, 8, 0, 1, address)


def fadt(dsdt_at: int) -> bytes:
    """Revision 6.0, 276 bytes. Offsets are from the start of the table."""
    body = bytearray(276 - _HEADER.size)

    def put(offset: int, data: bytes) -> None:
        body[offset - _HEADER.size : offset - _HEADER.size + len(data)] = data

    flags = FADT_WBINVD | FADT_PWR_BUTTON | FADT_SLP_BUTTON | FADT_RESET_REG_SUP | FADT_HW_REDUCED
    put(109, struct.pack("<H", BOOT_ARCH_NO_VGA | BOOT_ARCH_NO_MSI | BOOT_ARCH_NO_CMOS_RTC))
    put(112, struct.pack("<I", flags))
    put(116, _port(PORT_I8042 + 4))
    put(128, bytes((RESET_VALUE,)))
    put(140, struct.pack("<Q", dsdt_at))
    put(244, _port(PORT_SLEEP))
    put(256, _port(PORT_SLEEP + 1))
    put(268, b"AMBI\0\0\0\0")  # the hypervisor's vendor
    return _table(b"FACP", 6, bytes(body))


def madt(vcpus: int) -> bytes:
    """No source overrides: every pin of the I/O APIC is the GSI of its number."""
    body = struct.pack("<II", LAPIC, 0)
    for apic_id in range(vcpus):
        body += struct.pack("<BBBBI", 0, 8, apic_id, apic_id, 1)  # a local APIC, enabled
    body += struct.pack("<BBBBII", 1, 12, 0, 0, IOAPIC, 0)
    return _table(b"APIC", 4, body)


def dsdt(slots: int) -> bytes:
    devices = [
        aml.device(
            "COM1",
            aml.name("_HID", aml.eisa_id("PNP0501")),
            aml.name("_UID", aml.integer(1)),
            aml.name("_CRS", aml.resources(aml.io_ports(COM1, 8), aml.edge_interrupt(COM1_IRQ))),
        )
    ]
    for slot in range(slots):
        registers = aml.memory32_fixed(slot_address(slot), PAGE)
        devices.append(
            aml.device(
                f"VR{slot:02X}",
                aml.name("_HID", aml.string("LNRO0005")),
                aml.name("_UID", aml.integer(slot)),
                aml.name("_CCA", aml.integer(1)),
                aml.name("_CRS", aml.resources(registers, aml.edge_interrupt(slot_gsi(slot)))),
            )
        )
    sleep = aml.package(*(aml.integer(n) for n in (SLEEP_TYPE_S5, 0, 0, 0)))
    return _table(b"DSDT", 2, aml.scope("_SB_", *devices) + aml.name("_S5_", sleep))
