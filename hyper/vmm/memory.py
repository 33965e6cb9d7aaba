"""The guest's memory as the devices see it: every access is checked, once, and nothing is copied.

Addresses and lengths come from the guest and are hostile. What is not wholly inside one region of RAM is a BadAddress.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple, Protocol

_U16 = struct.Struct("<H")
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class Mapping(Protocol):
    """What a region is made of: `hyper.kvm`'s Memory, or a stand-in over any writable buffer (see Buffer)."""

    @property
    def address(self) -> int:
        """Of the first byte, in this process."""

    @property
    def size(self) -> int: ...

    @property
    def view(self) -> memoryview:
        """All of it: writable, format B."""

    def discard(self, offset: int, length: int) -> None:
        """Give the pages back to the host; what they hold is lost."""


class Buffer:
    """A Mapping over a bytearray or mmap that is not mapped into any guest. It has no address that a kernel could use."""

    __slots__ = ("address", "size", "view")

    def __init__(self, data: bytearray | memoryview) -> None:
        self.view = memoryview(data).cast("B")
        self.size = len(self.view)
        self.address = 0

    def discard(self, offset: int, length: int) -> None:
        self.view[offset : offset + length] = bytes(length)


class BadAddress(Exception):
    """The guest named bytes that are not RAM. `gpa` and `length` are what it named."""

    def __init__(self, gpa: int, length: int) -> None:
        super().__init__(f"{length} bytes at {gpa:#x} are not in the guest's memory")
        self.gpa = gpa
        self.length = length


class Region(NamedTuple):
    """A piece of RAM: [gpa, end)."""

    gpa: int
    end: int
    memory: Mapping
    view: memoryview


class GuestMemory:
    """RAM as `(guest physical address, Mapping)`, any order, none overlapping. Owns nothing."""

    __slots__ = ("regions",)

    def __init__(self, regions: Iterable[tuple[int, Mapping]]) -> None:
        self.regions: tuple[Region, ...] = ()
        for gpa, memory in regions:
            self.add(gpa, memory)

    def add(self, gpa: int, memory: Mapping) -> None:
        """More RAM, as virtio-mem brings it. ValueError when it overlaps what is there."""
        new = Region(gpa, gpa + memory.size, memory, memory.view)
        for old in self.regions:
            if new.gpa < old.end and old.gpa < new.end:
                raise ValueError(f"RAM at {new.gpa:#x} overlaps RAM at {old.gpa:#x}")
        self.regions = tuple(sorted((*self.regions, new), key=lambda region: region.gpa))

    @property
    def size(self) -> int:
        """Bytes of RAM in all."""
        return sum(region.end - region.gpa for region in self.regions)

    def view(self, gpa: int, length: int) -> memoryview:
        """The bytes themselves, writable. BadAddress unless all of them are in one region; a length of 0 is fine there."""
        for region in self.regions:
            start = region.gpa
            if start <= gpa < region.end:
                if length < 0 or gpa + length > region.end:
                    break
                return region.view[gpa - start : gpa - start + length]
        raise BadAddress(gpa, length)

    def address(self, gpa: int, length: int) -> int:
        """Where the bytes are in this process, for the kernel's back-ends. BadAddress as `view`."""
        for region in self.regions:
            if region.gpa <= gpa and length >= 0 and gpa + length <= region.end and gpa < region.end:
                return region.memory.address + gpa - region.gpa
        raise BadAddress(gpa, length)

    def discard(self, gpa: int, length: int) -> None:
        """Give whole pages back to the host, as a balloon does. BadAddress as `view`; OSError."""
        for region in self.regions:
            if region.gpa <= gpa and length >= 0 and gpa + length <= region.end:
                region.memory.discard(gpa - region.gpa, length)
                return
        raise BadAddress(gpa, length)

    def read(self, gpa: int, length: int) -> bytes:
        """A copy, which the guest cannot change any more."""
        return bytes(self.view(gpa, length))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        self.view(gpa, len(data))[:] = data

    def u16(self, gpa: int) -> int:
        return int.from_bytes(self.view(gpa, 2), "little")

    def u32(self, gpa: int) -> int:
        return int.from_bytes(self.view(gpa, 4), "little")

    def u64(self, gpa: int) -> int:
        return int.from_bytes(self.view(gpa, 8), "little")

    def put_u16(self, gpa: int, value: int) -> None:
        _U16.pack_into(self.view(gpa, 2), 0, value)

    def put_u32(self, gpa: int, value: int) -> None:
        _U32.pack_into(self.view(gpa, 4), 0, value)

    def put_u64(self, gpa: int, value: int) -> None:
        _U64.pack_into(self.view(gpa, 8), 0, value)
