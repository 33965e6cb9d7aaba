"""What the monitor puts into a guest's memory before its first instruction, and what it refuses to boot."""

from __future__ import annotations

import itertools
import mmap
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from ambi.core.errors import AmbiError, Corrupt, InvalidRequest, Unsupported
from hyper.guest.initramfs import cpio, directory, file
from hyper.vmm import config, layout
from hyper.vmm.boot import acpi, aml, bzimage, e820, elf, initramfs, load, params, registers
from hyper.vmm.memory import Buffer, GuestMemory

MIB = layout.MIB
INITRAMFS = cpio([directory("dev"), file("init", b"#!/bin/true\n", 0o755)])
CMDLINE = "console=ttyS0 quiet"

Edit = Callable[[bytearray], object]


def bz_image(edit: Edit = lambda image: None, *, init_bytes: int = 32 * MIB, payload: bytes = b"KERN" * 512) -> bytes:
    """A bzImage as far as a loader looks at it: one setup sector, a header of protocol 2.15, `payload`."""
    image = bytearray(2 * 512)
    image[0x1F1] = 1
    struct.pack_into("<I", image, 0x1F4, len(payload) // 16)
    image[0x1FE:0x206] = b"\x55\xaa\xeb\x6aHdrS"  # the jump goes to 0x26c
    struct.pack_into("<H", image, 0x206, 0x020F)
    image[0x211] = 1
    struct.pack_into("<I", image, 0x22C, 0x7FFF_FFFF)
    struct.pack_into("<IBBHI", image, 0x230, 2 * MIB, 1, 21, 0x7F, 2047)
    struct.pack_into("<QI", image, 0x258, 16 * MIB, init_bytes)
    edit(image)
    return bytes(image) + payload


def elf_image(
    edit: Edit = lambda image: None, *, pvh: bool = True, gpa: int = 16 * MIB, memory_bytes: int = 0x3000
) -> bytes:
    """An ELF kernel with a segment at `gpa` and, for PVH, a note behind another one."""
    code = b"\x90" * 0x1000
    notes = struct.pack("<III4sQ", 4, 8, 1, b"Xen\0", 0)
    if pvh:
        notes += struct.pack("<III4sI", 4, 4, elf.XEN_ELFNOTE_PHYS32_ENTRY, b"Xen\0", gpa + 0x40)
    head = bytearray(64 + 2 * 56)
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    struct.pack_into("<16sHHIQQQIHHHHHH", head, 0, ident, 2, 62, 1, gpa + 0x80, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    code_at = len(head) + len(notes)
    struct.pack_into("<IIQQQQQQ", head, 64, elf.PT_NOTE, 4, len(head), 0, 0, len(notes), len(notes), 4)
    struct.pack_into("<IIQQQQQQ", head, 120, elf.PT_LOAD, 5, code_at, gpa, gpa, len(code), memory_bytes, 4096)
    image = head + notes + code
    edit(image)
    return bytes(image)


class Rig:
    """A machine's memory, sparse, and files to boot from."""

    def __init__(self, where: Path) -> None:
        self.where = where
        self.fds: list[int] = []

    def open(self, data: bytes) -> int:
        path = self.where / str(len(self.fds))
        path.write_bytes(data)
        self.fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        return self.fds[-1]

    def load(
        self, kernel: bytes, archive: bytes | None = INITRAMFS, *, memory_bytes: int = 128 * MIB, cmdline: str = CMDLINE
    ) -> tuple[GuestMemory, registers.Entry]:
        pieces = layout.ram(memory_bytes)
        memory = GuestMemory((piece.gpa, Buffer(memoryview(mmap.mmap(-1, piece.size)))) for piece in pieces)
        sources = load.Sources(self.open(kernel), None if archive is None else self.open(archive), cmdline)
        return memory, load.load(memory, pieces, sources, vcpus=2, slots=3)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    for fd in rig.fds:
        os.close(fd)


def test_a_bzimage_gets_its_zero_page(rig: Rig) -> None:
    image = bz_image()
    memory, entry = rig.load(image)
    assert entry == registers.Entry(16 * MIB + 0x200, pvh=False)
    assert memory.read(16 * MIB, 2048) == image[1024:]
    page = memory.read(layout.BOOT_PARAMS, 4096)
    assert page[0x1F1:0x210] == image[0x1F1:0x210], "the setup header is the kernel's own"
    assert struct.unpack_from("<Q", page, 0x258) == (16 * MIB,)
    assert page[0x210] == 0xFF
    assert struct.unpack_from("<Q", page, 0x70) == (layout.ACPI,)
    assert page[0x26C:0x2D0] == bytes(0x64), "nothing of the file behind its header"
    (cmdline,) = struct.unpack_from("<I", page, 0x228)
    assert memory.read(cmdline, len(CMDLINE) + 1) == CMDLINE.encode() + b"\0"
    start, size = struct.unpack_from("<II", page, 0x218)
    assert memory.read(start, size) == INITRAMFS
    assert start % 4096 == 0 and start >= 48 * MIB and start + size <= 128 * MIB
    assert page[0x1E8] == 3
    ranges = [struct.unpack_from("<QQI", page, 0x2D0 + 20 * n) for n in range(3)]
    assert ranges == [(0, 0x9FC00, 1), (0xE0000, 0x20000, 2), (MIB, 127 * MIB, 1)]


def test_a_vmlinux_gets_its_start_info(rig: Rig) -> None:
    memory, entry = rig.load(elf_image())
    assert entry == registers.Entry(16 * MIB + 0x40, pvh=True)
    assert memory.read(16 * MIB, 4096) == b"\x90" * 4096
    magic, version, _, modules, modules_at, cmdline, rsdp, map_at, entries, _ = struct.unpack(
        "<IIIIQQQQII", memory.read(layout.START_INFO, 56)
    )
    assert (magic, version, modules, rsdp, entries) == (0x336EC578, 1, 1, layout.ACPI, 3)
    assert memory.read(cmdline, len(CMDLINE) + 1) == CMDLINE.encode() + b"\0"
    start, size, _, _ = struct.unpack("<QQQQ", memory.read(modules_at, 32))
    assert memory.read(start, size) == INITRAMFS
    assert struct.unpack("<QQII", memory.read(map_at + 48, 24)) == (MIB, 127 * MIB, 1, 0)


def test_a_vmlinux_without_pvh_is_entered_in_long_mode(rig: Rig) -> None:
    memory, entry = rig.load(elf_image(pvh=False), None)
    assert entry == registers.Entry(16 * MIB + 0x80, pvh=False)
    page = memory.read(layout.BOOT_PARAMS, 4096)
    assert page[0x1FE:0x206] != bytes(8) and page[0x202:0x206] == b"HdrS"
    assert struct.unpack_from("<II", page, 0x218) == (0, 0)


def test_a_kernel_is_where_it_wants_to_be_or_nowhere() -> None:
    """One that is loaded lower would move itself up to there, over the end of memory."""
    header = bzimage.Header(0x20F, 1024, 2 << 20, 16 * MIB, 50 * MIB, 2047, 1 << 31, b"")
    assert bzimage.place(header, 66 * MIB) == 16 * MIB
    with pytest.raises(InvalidRequest, match="needs 50 MiB from 0x1000000 on, and the VM has 64 MiB"):
        bzimage.place(header, 64 * MIB)
    with pytest.raises(Corrupt, match="wants to be at 0x9000"):
        bzimage.place(header._replace(preferred=0x9000), 64 * MIB)


@pytest.mark.parametrize(
    "image,kind,words",
    [
        (b"#!/bin/sh\n", InvalidRequest, "neither a bzImage nor an ELF file"),
        (b"x" * 4096, InvalidRequest, "neither a bzImage nor an ELF file"),
        (b"", Corrupt, "kernel is an empty file"),
        (b"\x7fELF", Corrupt, "kernel is truncated"),
        (bz_image()[:0x206], Corrupt, "kernel is truncated"),
        (bz_image()[:-1], Corrupt, "kernel is truncated"),
        (bz_image()[:1100], Corrupt, "kernel is truncated"),
        (bz_image(payload=b""), Corrupt, "kernel is truncated"),
        (bz_image(lambda i: struct.pack_into("<H", i, 0x206, 0x020B)), Unsupported, "protocol 2.11"),
        (bz_image(lambda i: i.__setitem__(0x211, 0)), Unsupported, "no 64-bit entry"),
        (bz_image(lambda i: struct.pack_into("<H", i, 0x236, 0)), Unsupported, "no 64-bit entry"),
        (bz_image(lambda i: i.__setitem__(0x201, 0xFF)), Corrupt, "kernel is truncated"),
        (bz_image(lambda i: i.__setitem__(0x201, 0x10)), Corrupt, "kernel is truncated"),
        (bz_image(init_bytes=200 * MIB), InvalidRequest, "needs 200 MiB.*the VM has 128 MiB"),
        (elf_image()[:-1], Corrupt, "kernel is truncated"),
        (elf_image()[:100], Corrupt, "kernel is truncated"),
        (elf_image(lambda i: i.__setitem__(4, 1)), Unsupported, "not one for x86-64"),
        (elf_image(lambda i: i.__setitem__(18, 183)), Unsupported, "not one for x86-64"),
        (elf_image(lambda i: struct.pack_into("<H", i, 56, 0)), Corrupt, "0 program headers"),
        (elf_image(lambda i: struct.pack_into("<H", i, 56, 65)), Corrupt, "65 program headers"),
        (elf_image(lambda i: struct.pack_into("<Q", i, 32, 1 << 63)), Corrupt, "kernel is truncated"),
        (elf_image(lambda i: struct.pack_into("<Q", i, 120 + 8, 1 << 62)), Corrupt, "kernel is truncated"),
        (elf_image(gpa=0x7000), Corrupt, "wants to be at 0x7000"),
        (elf_image(gpa=1 << 40, pvh=False), InvalidRequest, "occupies memory up to"),
        (elf_image(memory_bytes=1 << 30), InvalidRequest, "occupies memory up to 1040 MiB"),
        (elf_image(lambda i: struct.pack_into("<Q", i, 24, 0), pvh=False), Corrupt, "is to be entered at 0x0"),
    ],
)  # fmt: skip
def test_what_is_no_good_kernel_is_refused_by_name(rig: Rig, image: bytes, kind: type[AmbiError], words: str) -> None:
    with pytest.raises(kind, match=words):
        rig.load(image)


@pytest.mark.parametrize(
    "archive,kind,words",
    [
        (b"", Corrupt, "initramfs is an empty file"),
        (b"PK\3\4" + bytes(100), Corrupt, "not a cpio archive"),
        (bytes(8192), Corrupt, "nothing in it"),
        (INITRAMFS[:200], Corrupt, "truncated"),
        (INITRAMFS[: INITRAMFS.index(b"TRAILER") - 20], Corrupt, "truncated"),
        (INITRAMFS[:110] + b"dev\0" + b"x" * 200, Corrupt, "damaged at byte"),
        (INITRAMFS.replace(b"0000000C", b"FFFFFFFF"), Corrupt, "truncated"),
        (INITRAMFS + b"garbage!", Corrupt, "damaged at byte"),
        (INITRAMFS + bytes(100 * MIB), InvalidRequest, "has 10240. KiB, and beside the kernel there are 81920 KiB"),
    ],
)  # fmt: skip
def test_what_is_no_good_initramfs_is_refused_by_name(rig: Rig, archive: bytes, kind: type[AmbiError], words: str) -> None:
    with pytest.raises(kind, match=words):
        rig.load(bz_image(), archive)


@pytest.mark.parametrize(
    "more", [b"\x1f\x8b" + bytes(9), b"\x28\xb5\x2f\xfd" + b"x" * 90, bytes(8192) + INITRAMFS, INITRAMFS]
)
def test_archives_follow_each_other(rig: Rig, more: bytes) -> None:
    """Microcode in front, the rest compressed: as distributions build them."""
    rig.load(bz_image(), INITRAMFS + more)


@pytest.mark.parametrize(
    "cmdline,words", [("a" * 2048, "has 2048 bytes"), ("a\0b", "zero byte"), ("naïve", "other characters")]
)
def test_what_is_no_good_command_line_is_refused(rig: Rig, cmdline: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        rig.load(bz_image(), cmdline=cmdline)


def test_a_directory_is_no_kernel(rig: Rig) -> None:
    fd = os.open(rig.where, os.O_RDONLY)
    rig.fds.append(fd)
    memory = GuestMemory([(0, Buffer(bytearray(MIB)))])
    with pytest.raises(InvalidRequest, match="not a regular file"):
        load.load(memory, layout.ram(64 * MIB), load.Sources(fd, None, ""), vcpus=1, slots=0)


@pytest.mark.parametrize("make", [bz_image, elf_image])
def test_damaged_kernels_load_or_are_refused(rig: Rig, make: Callable[[], bytes]) -> None:
    """Whatever a kernel's header says: a message, and no byte outside of the guest's memory."""
    seed = random.randrange(1 << 32)
    dice = random.Random(seed)
    pieces = layout.ram(64 * MIB)
    memory = GuestMemory([(0, Buffer(memoryview(mmap.mmap(-1, pieces[0].size))))])
    path = rig.where / "mutated"
    for _ in range(400):
        image = bytearray(make())
        for _ in range(dice.randint(1, 4)):
            image[dice.randrange(min(len(image), 0x280))] = dice.choice((0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)))
        path.write_bytes(image[: dice.choice((len(image), len(image), dice.randrange(1, len(image))))])
        fd = os.open(path, os.O_RDONLY)
        try:
            load.load(memory, pieces, load.Sources(fd, None, CMDLINE), vcpus=1, slots=1)
        except (Corrupt, InvalidRequest, Unsupported):
            pass
        except Exception as error:
            raise AssertionError(f"seed {seed}: {image[:0x280].hex()}") from error
        finally:
            os.close(fd)


def test_memory_goes_around_the_hole() -> None:
    assert layout.ram(3 << 30) == (layout.Piece(0, 3 << 30, 0),)
    assert layout.ram(257 * MIB + 4097) == (layout.Piece(0, 257 * MIB, 0),), "as QEMU's -m has it"
    pieces = layout.ram(5 << 30)
    assert pieces == (layout.Piece(0, 3 << 30, 0), layout.Piece(4 << 30, 2 << 30, 3 << 30))
    assert e820.ranges(pieces)[2:] == [(MIB, (3 << 30) - MIB, 1), (4 << 30, 2 << 30, 1)]
    for wrong, words in (
        (32 * MIB, "32 MiB of memory"),
        (1 << 41, "of memory"),
        (0, "0 MiB"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            layout.ram(wrong)


def test_memory_that_comes_later_is_above_ram_and_does_not_touch_it() -> None:
    assert layout.hotplug(256 * MIB, 0) is None and layout.hotplug(256 * MIB, 127 * MIB) is None
    assert layout.hotplug(256 * MIB, 300 * MIB) == layout.Piece(4 << 30, 256 * MIB, 0)
    for size in (3 << 30, (3 << 30) + MIB, 4 << 30, (5 << 30) - MIB):
        region, last = layout.hotplug(size, 1 << 30), layout.ram(size)[-1]
        assert region is not None and region.gpa % (1 << 30) == 0
        assert region.gpa >= 4 << 30 and region.gpa > last.gpa + last.size
    assert layout.hotplug(layout.MAX_MEMORY - (1 << 30), 1 << 40) == layout.Piece((1 << 40) + (1 << 30), 1 << 30, 0)


def test_machines_that_cannot_be_are_refused() -> None:
    good = config.Config(-1, -1, None, "", vcpus=16, memory_bytes=64 * MIB, console=-1)
    config.check(good)
    config.check(good._replace(spares=layout.SLOTS - 3))
    config.check(good._replace(spares=layout.SLOTS - 4, hotplug_bytes=1 << 30))
    disk = config.Disk("d", fd=3)
    for bad, words in (
        (good._replace(vcpus=17), "17 CPUs: 1 to 16"),
        (good._replace(vcpus=0), "0 CPUs"),
        (good._replace(memory_bytes=MIB), "1 MiB of memory"),
        (good._replace(disks=(disk,) * layout.SLOTS), "room for 19 devices, and 22"),
        (good._replace(shares=(config.Share("root", 3),)), "give a memfd"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            config.check(bad)


# the tables


def tables_of(blob: bytes) -> dict[bytes, bytes]:
    """All tables by signature, found as a kernel finds them; their checksums are checked."""

    def table(address: int) -> bytes:
        at = address - layout.ACPI
        (length,) = struct.unpack_from("<I", blob, at + 4)
        found = blob[at : at + length]
        assert len(found) == length and sum(found) & 0xFF == 0
        return found

    assert blob[:8] == b"RSD PTR " and sum(blob[:20]) & 0xFF == 0 and sum(blob[:36]) & 0xFF == 0
    xsdt = table(struct.unpack_from("<Q", blob, 24)[0])
    found = {b"XSDT": xsdt}
    for (address,) in struct.iter_unpack("<Q", xsdt[36:]):
        found[table(address)[:4]] = table(address)
    found[b"DSDT"] = table(struct.unpack_from("<Q", found[b"FACP"], 140)[0])
    return found


def test_acpi_tables_are_found_and_whole() -> None:
    tables = tables_of(acpi.build(16, layout.SLOTS).data)
    assert set(tables) == {b"XSDT", b"FACP", b"APIC", b"DSDT"}
    fadt, madt = tables[b"FACP"], tables[b"APIC"]
    assert len(fadt) == 276 and struct.unpack_from("<I", fadt, 112)[0] & 1 << 20, "hardware-reduced"
    assert struct.unpack_from("<BBBBQ", fadt, 244) == (1, 8, 0, 1, layout.PORT_SLEEP)
    entries, at = [], 44
    while at < len(madt):
        entries.append(madt[at : at + madt[at + 1]])
        at += madt[at + 1]
    assert [entry[3] for entry in entries if entry[0] == 0] == list(range(16))
    assert [struct.unpack_from("<II", entry, 4) for entry in entries if entry[0] == 1] == [(layout.IOAPIC, 0)]
    assert len(entries) == 17


@pytest.mark.skipif(shutil.which("iasl") is None, reason="no iasl (package acpica-tools)")
def test_iasl_reads_the_tables(tmp_path: Path) -> None:
    tables = tables_of(acpi.build(4, 2).data)
    for name in (b"DSDT", b"FACP", b"APIC"):
        (tmp_path / f"{name.decode()}.aml").write_bytes(tables[name])
        done = subprocess.run(
            ["iasl", "-d", f"{name.decode()}.aml"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        text = (tmp_path / f"{name.decode()}.dsl").read_text()
        assert done.returncode == 0 and "rror" not in text.replace("Error", "", 0).split("*/", 1)[1], (
            done.stdout + done.stderr
        )
    dsl = (tmp_path / "DSDT.dsl").read_text()
    for words in (
        '"LNRO0005"',
        "Device (VR01)",
        'EisaId ("PNP0501")',
        "0xD0001000",
        "ResourceConsumer, Edge, ActiveHigh, Exclusive",
    ):
        assert words in dsl
    made = subprocess.run(["iasl", "-ve", "DSDT.dsl"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout
    assert (tmp_path / "DSDT.aml").read_bytes()[36:] == tables[b"DSDT"][36:], "compiled again it is the same"


def test_aml_lengths_count_themselves() -> None:
    for size in (0, 61, 62, 63, 4092, 4093, 4094, 5000, 1 << 20):
        made = aml.scope("_SB_", bytes(size))
        more = made[1] >> 6
        length = made[1] & 0x3F if not more else made[1] & 0xF | int.from_bytes(made[2 : 2 + more], "little") << 4
        assert length == len(made) - 1
    with pytest.raises(ValueError, match="256 MiB"):
        aml._sized(bytes(1 << 28))
    assert [aml.integer(n) for n in (0, 1, 2, 256, 1 << 16, 1 << 32)] == [
        b"\0", b"\1", b"\x0a\2", b"\x0b\0\1", b"\x0c\0\0\1\0", b"\x0e\0\0\0\0\1\0\0\0",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="64 bits"):
        aml.integer(1 << 64)


# the first instruction


def walk(memory: GuestMemory, address: int) -> int:
    """Translate as a CPU does."""
    table = layout.PAGE_TABLES
    for shift in (39, 30, 21):
        entry = memory.u64(table + 8 * (address >> shift & 511))
        assert entry & 3 == 3
        if entry & 1 << 7:
            return (entry & ~0x1F_FFFF) + (address & 0x1F_FFFF)
        table = entry & ~0xFFF
    raise AssertionError("no page of 2 MiB")


def test_page_tables_map_four_gigabytes_to_themselves() -> None:
    memory = GuestMemory([(0, Buffer(bytearray(MIB)))])
    registers.write_tables(memory)
    for address in (0, 0x7000, 16 * MIB + 0x200, 0x7FFF_FFFF, layout.VIRTIO, 0xFFFF_FFFF):
        assert walk(memory, address) == address
    assert memory.u64(layout.PAGE_TABLES + 8) == 0


@pytest.mark.parametrize("pvh", [False, True])
def test_registers_are_what_the_protocol_wants(pvh: bool) -> None:
    memory = GuestMemory([(0, Buffer(bytearray(MIB)))])
    registers.write_tables(memory)
    names = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "gdt", "idt")
    sregs = SimpleNamespace(**{name: SimpleNamespace() for name in names})
    entry = registers.Entry(0x100_0200, pvh)
    registers.set_segments(sregs, entry)
    assert (sregs.cs.l, sregs.cs.db, sregs.cs.type, sregs.cs.selector) == (1 - int(pvh), int(pvh), 11, 0x10)
    assert (sregs.ds.type, sregs.ds.limit, sregs.ss.selector) == (3, 0xFFFF_FFFF, 0x18)
    assert (sregs.tr.limit, sregs.tr.s) == (0x67, 0)
    control = registers.control_registers(entry)
    general = registers.general_registers(entry)
    assert general["rip"] == 0x100_0200 and general["rflags"] == 2, "interrupts are off"
    if pvh:
        assert control == (0x11, 0, 0, 0) and general["rbx"] == layout.START_INFO
    else:
        assert control.cr0 >> 31 and control.cr3 == layout.PAGE_TABLES and control.efer == 0x500
        assert general["rsi"] == layout.BOOT_PARAMS
    descriptors = struct.unpack("<6Q", memory.read(sregs.gdt.base, sregs.gdt.limit + 1))
    assert descriptors[sregs.cs.selector >> 3] >> 53 & 1, "the table's code segment is of 64 bits"


def test_nothing_below_one_megabyte_overlaps() -> None:
    """The longest of everything, side by side."""
    ranges = e820.ranges(layout.ram(8 << 30))
    placed = initramfs.Placed(1 << 30, 1 << 20)
    used = [
        (layout.GDT, 48),
        (layout.START_INFO, len(params.start_info(ranges, placed, layout.ACPI))),
        (layout.BOOT_PARAMS, 4096),
        (layout.BOOT_STACK - 256, 256),
        (layout.PAGE_TABLES, 6 * 4096),
        (layout.COMMAND_LINE, load.CMDLINE_BYTES + 1),
        (layout.ACPI, len(acpi.build(layout.MAX_VCPUS, layout.SLOTS).data)),
    ]
    for (start, size), (following, _) in itertools.pairwise(used):
        assert start + size <= following
    assert layout.COMMAND_LINE + load.CMDLINE_BYTES < layout.LOW_RAM_END
    assert used[-1][0] + used[-1][1] <= layout.ACPI_END
