"""The files of a saved machine: what is written comes back, and no damage, foreign file or wrong order gets through."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ambi.core.errors import AmbiError, Corrupt, Unsupported
from hyper.kvm.cpuid import CpuidEntry
from hyper.kvm.memory import Memory
from hyper.vmm.memory import Buffer, GuestMemory
from hyper.vmm.snapshot import DIGESTS, PAGE, RUNS, Host, Saved, read_state, refuse_other_host, this_host, write_state
from hyper.vmm.snapshot_memory import CHUNK, Chain, Look, unpack_runs, write_memory

HOST = Host("AuthenticAMD", 25, 1, {"0x1.0.ecx": 0b1110, "0x7.0.ebx": 0b1}, "6.1.0-1", "0.1.0")
SECTIONS = {"machine": b'{"vcpus":[]}', "empty": b"", "devices": bytes(range(256))}
LOW, HIGH = 3 * CHUNK + 7, CHUNK + 3  # pages of two regions, neither a whole number of chunks

Files = Callable[[], int]


@pytest.fixture
def files() -> Iterator[Files]:
    opened: list[int] = []

    def new() -> int:
        opened.append(os.memfd_create("snapshot", os.MFD_CLOEXEC))
        return opened[-1]

    yield new
    for fd in opened:
        os.close(fd)


def content(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def replace(fd: int, data: bytes) -> int:
    os.ftruncate(fd, 0)
    os.pwrite(fd, data, 0)
    return fd


def machine() -> GuestMemory:
    return GuestMemory([(0, Buffer(bytearray(LOW * PAGE))), (1 << 32, Buffer(bytearray(HIGH * PAGE)))])


def regions(memory: GuestMemory) -> list[tuple[int, int]]:
    return [(region.gpa, region.end - region.gpa) for region in memory.regions]


def image(memory: GuestMemory) -> bytes:
    return b"".join(region.view for region in memory.regions)


def scribble(memory: GuestMemory, seed: int, pages: int) -> list[bytearray]:
    """Change so many pages, a third of them to zeros; the bitmaps of what was changed."""
    chance = random.Random(seed)
    bitmaps = [bytearray((LOW + 7) // 8), bytearray((HIGH + 7) // 8)]
    for _ in range(pages):
        number = chance.randrange(2)
        page = chance.randrange((LOW, HIGH)[number])
        data = bytes(PAGE) if chance.random() < 0.3 else chance.randbytes(PAGE)
        memory.regions[number].view[page * PAGE : (page + 1) * PAGE] = data
        bitmaps[number][page // 8] |= 1 << page % 8
    return bitmaps


def save(
    files: Files, memory: GuestMemory, parent: Chain | None = None, written: list[bytearray] | None = None
) -> tuple[Saved, int]:
    state_fd, memory_fd = files(), files()
    sections = write_memory(memory_fd, memory, parent, written)
    write_state(state_fd, HOST, regions(memory), sections, parent=parent.top.id if parent else None)
    return read_state(state_fd), memory_fd


# the state file


def test_state_comes_back(files: Files) -> None:
    fd = files()
    made = write_state(fd, HOST, [(0, 2 * PAGE), (1 << 32, PAGE)], SECTIONS, parent="ab" * 32)
    saved = read_state(fd)
    assert saved == Saved(made, "ab" * 32, HOST, ((0, 2 * PAGE), (1 << 32, PAGE)), SECTIONS)
    assert saved.memory_bytes == 3 * PAGE
    refuse_other_host(saved.host, HOST)
    assert write_state(fd, HOST, [(0, PAGE)], {}) != made
    assert read_state(fd).sections == {} and read_state(fd).parent is None, "a shorter one leaves nothing of the old"


def test_no_byte_can_change_unseen(files: Files) -> None:
    fd = files()
    write_state(fd, HOST, [(0, PAGE)], SECTIONS)
    whole = content(fd)
    for at in range(len(whole)):
        for mask in (0x01, 0x80):
            damaged = bytearray(whole)
            damaged[at] ^= mask
            with pytest.raises(Unsupported if 8 <= at < 12 else Corrupt):
                read_state(replace(fd, bytes(damaged)))


def test_no_cut_and_no_tail_goes_unseen(files: Files) -> None:
    fd = files()
    write_state(fd, HOST, [(0, PAGE)], SECTIONS)
    whole = content(fd)
    for length in range(len(whole)):
        with pytest.raises(Corrupt):
            read_state(replace(fd, whole[:length]))
    with pytest.raises(Corrupt, match="1 bytes follow its last section"):
        read_state(replace(fd, whole + b"\0"))


def forged(header: object, rest: bytes = b"") -> bytes:
    """A file whose checksums are right, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<8sII32s", b"AMBI-VM\n", 1, len(text), hashlib.blake2b(text, digest_size=32).digest()) + text + rest


def header(**changes: Any) -> dict[str, Any]:
    digest = hashlib.blake2b(b"x", digest_size=32).hexdigest()
    return {"host": HOST._asdict(), "parent": None, "regions": [[0, PAGE]], "sections": {"a": [0, 1, digest]}, **changes}


@pytest.mark.parametrize(
    "wrong",
    [
        b"not JSON", b"[]", b"null", b"[" * 100_000, b'"\\ud800"', b"\xff",
        {}, header(host=None), header(host={**HOST._asdict(), "family": "25"}),
        header(host={**HOST._asdict(), "model": True}),
        header(host={**HOST._asdict(), "features": [1]}), header(host={**HOST._asdict(), "features": {"a": -1}}),
        header(host={**HOST._asdict(), "kernel": None}), header(parent=7), header(regions=[]), header(regions=None),
        header(regions=[[0, 0]]), header(regions=[[0, -PAGE]]), header(regions=[[0, 100]]), header(regions=[[8, PAGE]]),
        header(regions=[[0, 1e20]]), header(regions=[[0, 1 << 70]]), header(regions=[[0]]), header(sections=[]),
        header(sections={"a": [0, 2, ""]}), header(sections={"a": [1, 0, ""]}), header(sections={"a": [0, 1, "00"]}),
        header(sections={"a": [-1, 1, ""]}), header(sections={"a": [0, 1 << 63, ""]}), header(sections={"a": 1}),
        header(sections={}),
    ],
)  # fmt: skip
def test_nonsense_with_right_checksums_is_refused(files: Files, wrong: object) -> None:
    assert read_state(replace(files(), forged(header(), b"x"))).sections == {"a": b"x"}
    with pytest.raises(Corrupt):
        read_state(replace(files(), forged(wrong, b"x")))


def test_what_is_no_snapshot_is_said_to_be_none(files: Files) -> None:
    for data in (b"", b"#!/bin/sh\n" * 100, bytes(4096)):
        with pytest.raises(Corrupt, match="does not begin as one"):
            read_state(replace(files(), data))
    huge = files()
    os.ftruncate(huge, 1 << 40)
    with pytest.raises(Corrupt, match="more than any"):
        read_state(huge)


def test_a_state_that_could_not_be_written_is_none(files: Files) -> None:
    fd = files()
    write_state(fd, HOST, [(0, PAGE)], SECTIONS)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(AmbiError, match="cannot write the snapshot's state"):
            write_state(fd, HOST, [(0, PAGE)], {"big": bytes(5000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(Corrupt):
        read_state(fd)


# the host


@pytest.mark.parametrize(
    "here,words",
    [
        (HOST._replace(vendor="GenuineIntel"), "on another processor: AuthenticAMD family 25 model 1, here is GenuineIntel"),
        (HOST._replace(family=23), "here is AuthenticAMD family 23 model 1"),
        (HOST._replace(model=2), "here is AuthenticAMD family 25 model 2"),
        (HOST._replace(features={"0x1.0.ecx": 0b0110, "0x7.0.ebx": 1}), "CPUID 0x1.0.ecx 0xe, here is not its bits 0x8"),
        (HOST._replace(features={"0x1.0.ecx": 0b1110}), "CPUID 0x7.0.ebx 0x1, here is not its bits 0x1"),
        (HOST._replace(kernel="6.1.0-2"), "under another kernel: 6.1.0-1, here is 6.1.0-2"),
        (HOST._replace(version="0.2.0"), "by another version of ambi: 0.1.0, here is 0.2.0"),
    ],
)
def test_another_host_is_refused_with_the_reason(here: Host, words: str) -> None:
    with pytest.raises(Unsupported) as caught:
        refuse_other_host(HOST, here)
    assert words in caught.value.message and caught.value.hint


def test_a_host_with_more_features_is_fine() -> None:
    refuse_other_host(HOST, HOST._replace(features={"0x1.0.ecx": 0b11110, "0x7.0.ebx": 1, "0x7.0.edx": 5}))


def test_a_host_is_known_by_its_cpuid() -> None:
    """AMD's manual has the extended model only in families 15 (and Intel's in 6), the extended family in 15."""

    def entries(eax: int) -> list[CpuidEntry]:
        vendor = struct.unpack("<III", b"AuthenticAMD")
        return [CpuidEntry(0, 0, 0, 16, vendor[0], vendor[2], vendor[1]), CpuidEntry(1, 0, 0, eax, 0, 0xAB, 0xCD)]

    zen = this_host(entries(0x00A20F12))
    assert (zen.vendor, zen.family, zen.model) == ("AuthenticAMD", 0x19, 0x21)
    assert zen.features == {"0x1.0.ecx": 0xAB, "0x1.0.edx": 0xCD} and zen.kernel == os.uname().release
    assert this_host(entries(0x000506E3))[1:3] == (6, 0x5E)
    assert this_host(entries(0x000A0541))[1:3] == (5, 4)


# the memory file


def test_memory_comes_back_and_zeros_are_holes(files: Files) -> None:
    memory = machine()
    scribble(memory, 1, 40)
    saved, fd = save(files, memory)
    assert content(fd) == image(memory), "it can be mapped as it is"
    assert os.fstat(fd).st_blocks * 512 <= 41 * PAGE
    fresh = machine()
    Chain([(saved, fd)]).load(fresh)
    assert image(fresh) == image(memory)
    Chain([(saved, fd)]).check()


def test_a_machine_of_zeros_is_an_empty_file(files: Files) -> None:
    saved, fd = save(files, machine())
    assert os.fstat(fd).st_blocks == 0 and unpack_runs(saved) == []
    Chain([(saved, fd)]).load(fresh := machine())
    assert not any(image(fresh))


@pytest.mark.parametrize("logged", [True, False], ids=["dirty-log", "compared"])
def test_a_chain_of_increments_is_the_last_state(files: Files, logged: bool) -> None:
    memory = machine()
    scribble(memory, 1, 60)
    layers = [save(files, memory)]
    images = [image(memory)]
    for seed in (2, 3):
        written = scribble(memory, seed, 20)
        layers.append(save(files, memory, Chain(layers), written if logged else None))
        images.append(image(memory))
        saved, fd = layers[-1]
        assert sum(end - first for first, end in unpack_runs(saved)) <= 20 and os.fstat(fd).st_blocks * 512 <= 21 * PAGE
        assert saved.parent == layers[-2][0].id
    for length in (1, 2, 3):
        Chain(layers[:length]).load(fresh := machine())
        assert image(fresh) == images[length - 1]


def test_nothing_changed_is_nothing_written(files: Files) -> None:
    memory = machine()
    scribble(memory, 1, 10)
    base = save(files, memory)
    second = save(files, memory, Chain([base]))
    assert unpack_runs(second[0]) == [] and os.fstat(second[1]).st_blocks == 0
    Chain([base, second]).load(fresh := machine())
    assert image(fresh) == image(memory)


def test_a_chain_out_of_order_is_refused(files: Files) -> None:
    memory = machine()
    scribble(memory, 1, 10)
    base = save(files, memory)
    written = scribble(memory, 2, 10)
    second = save(files, memory, Chain([base]), written)
    scribble(memory, 3, 10)
    third = save(files, memory, Chain([base, second]))
    other = save(files, memory)
    for wrong in ([], [second], [second, base], [base, third], [other, second], [base, base], [base, second, third] * 30):
        with pytest.raises(Corrupt):
            Chain(wrong)
    Chain([base, second, third]).check()


def test_damaged_memory_is_refused_by_its_place(files: Files) -> None:
    memory = machine()
    scribble(memory, 1, 10)
    base = save(files, memory)
    written = scribble(memory, 2, 10)
    second = save(files, memory, Chain([base]), written)
    for saved, fd in (base, second):
        page = unpack_runs(saved)[-1][0]
        (byte,) = os.pread(fd, 1, page * PAGE + 5)
        os.pwrite(fd, bytes([byte ^ 1]), page * PAGE + 5)
        with pytest.raises(Corrupt, match=f"snapshot {saved.id[:12]} is damaged: its bytes from .* do not match"):
            Chain([base, second]).load(machine())
        os.pwrite(fd, bytes([byte]), page * PAGE + 5)
    Chain([base, second]).check()


@pytest.mark.parametrize("change", [-PAGE, -1, 1, PAGE])
def test_memory_of_another_length_is_refused(files: Files, change: int) -> None:
    saved, fd = save(files, machine())
    os.ftruncate(fd, (LOW + HIGH) * PAGE + change)
    with pytest.raises(Corrupt, match=f"it has {(LOW + HIGH) * PAGE + change} bytes, not {(LOW + HIGH) * PAGE}"):
        Chain([(saved, fd)])


@pytest.mark.parametrize(
    "pairs",
    [[(0, 0)], [(5, 2), (6, 1)], [(9, 1), (3, 1)], [(LOW + HIGH, 1)], [(LOW + HIGH - 1, 2)], [(0, 0xFFFFFFFF)], [(1, 1)]],
)
def test_a_map_of_pages_that_makes_no_sense_is_refused(files: Files, pairs: list[tuple[int, int]]) -> None:
    """The last one makes sense, and has no checksum."""
    saved, fd = save(files, machine())
    packed = zlib.compress(b"".join(struct.pack("<II", *pair) for pair in pairs))
    with pytest.raises(Corrupt, match=r"the map of its pages has|0 bytes of checksums, not 32"):
        Chain([(saved._replace(sections={**saved.sections, RUNS: packed}), fd)])


@pytest.mark.parametrize("packed", [None, b"", b"garbage", zlib.compress(b"123"), zlib.compress(bytes(8 << 20))[:-1]])
def test_a_map_of_pages_that_cannot_be_read_is_refused(files: Files, packed: bytes | None) -> None:
    saved, fd = save(files, machine())
    sections = {DIGESTS: b""} if packed is None else {DIGESTS: b"", RUNS: packed}
    with pytest.raises(Corrupt, match="the map of its pages"):
        Chain([(saved._replace(sections=sections), fd)])


def test_a_machine_of_another_shape_is_refused(files: Files) -> None:
    chain = Chain([save(files, machine())])
    smaller = GuestMemory([(0, Buffer(bytearray(PAGE)))])
    with pytest.raises(ValueError, match="the snapshot has its RAM at"):
        chain.load(smaller)
    with pytest.raises(ValueError, match="the snapshot has its RAM at"):
        write_memory(files(), smaller, chain)
    with pytest.raises(ValueError, match="without a parent"):
        write_memory(files(), smaller, None, [bytearray(1)])
    with pytest.raises(ValueError, match="in the log of a region"):
        write_memory(files(), machine(), chain, [bytearray(LOW), bytearray(HIGH)[:-1] + b"\x80"])


def test_saving_does_not_fill_the_holes_of_a_memfd(files: Files) -> None:
    with Memory.memfd(64 << 20) as ram:
        ram.view[20 << 20 : (20 << 20) + 4] = b"here"
        memory = GuestMemory([(0, ram)])
        saved, fd = save(files, memory)
        assert os.fstat(ram.fd).st_blocks * 512 <= 2 << 20
        assert unpack_runs(saved) == [((20 << 20) // PAGE, (20 << 20) // PAGE + 1)]
        assert os.pread(fd, 4, 20 << 20) == b"here"


@pytest.mark.parametrize("copied", [False, True])
def test_saving_touches_no_page_that_is_not_there(files: Files, copied: bool) -> None:
    """Of anonymous memory, and of a private copy of a file with holes."""
    size = 64 << 20
    source = files()
    os.ftruncate(source, size)
    os.pwrite(source, b"source" * 1000, 10 << 20)
    ram = Memory.of_file(source, size, shared=False) if copied else Memory(size)
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with ram:
            ram.view[(10 << 20) + 4096] = 1
            ram.view[20 << 20 : (20 << 20) + 4] = b"here"
            assert ram.view[(40 << 20) + 1] == 0  # read: there, and zeros
            blocks = os.fstat(source).st_blocks
            fd = files()
            sections = write_memory(fd, GuestMemory([(0, ram)]), look=Look(pagemap, source if copied else -1))
            assert os.fstat(source).st_blocks == blocks
            entries = os.pread(pagemap, size // PAGE * 8, ram.address // PAGE * 8)
            there = sum(byte & 0xC0 != 0 for byte in entries[7::8])
            assert there <= 3 * CHUNK  # three places were touched, be it by a huge page
            assert os.pread(fd, size, 0) == bytes(ram.view)
            assert len(sections[DIGESTS]) == 2 * 32
    finally:
        os.close(pagemap)
