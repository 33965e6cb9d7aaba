"""Which device an access to a port or to MMIO belongs to.

What no device owns reads all ones, as on a real bus, and swallows what is written; it is counted, because every such access
is an exit that somebody could do without.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple, Protocol

MAX_UNOWNED = 256  # addresses counted one by one; a guest that tries them all must not make us grow


class Device(Protocol):
    """`offset` is from the base that it was added at; an access does not cross the end of the device."""

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes."""

    def write(self, offset: int, data: bytes) -> None: ...


class _Map(NamedTuple):
    """Bases, ascending, and for each the end and the device."""

    bases: tuple[int, ...]
    devices: tuple[tuple[int, Device], ...]


class Bus:
    """One for ports and one for MMIO. `unowned` counts accesses to nothing by their address, at most MAX_UNOWNED of them;
    `unowned[-1]` are the others. Devices may come and go while vCPUs run."""

    __slots__ = ("_map", "unowned")

    def __init__(self) -> None:
        self._map = _Map((), ())  # replaced as a whole: a vCPU's thread sees the old one or the new one
        self.unowned: dict[int, int] = {}

    def add(self, base: int, size: int, device: Device) -> None:
        """Give [base, base + size) to `device`. ValueError when some of it is taken."""
        bases, devices = self._map
        at = bisect_right(bases, base)
        if size <= 0 or (at and devices[at - 1][0] > base) or (at < len(bases) and bases[at] < base + size):
            raise ValueError(f"{base:#x} to {base + size:#x} is taken, or empty")
        entry = (base + size, device)
        self._map = _Map((*bases[:at], base, *bases[at:]), (*devices[:at], entry, *devices[at:]))

    def remove(self, base: int) -> None:
        """Take away what begins at `base`. KeyError when nothing does."""
        bases, devices = self._map
        if base not in bases:
            raise KeyError(base)
        at = bases.index(base)
        self._map = _Map((*bases[:at], *bases[at + 1 :]), (*devices[:at], *devices[at + 1 :]))

    def read(self, address: int, length: int) -> bytes:
        bases, devices = self._map
        at = bisect_right(bases, address) - 1
        if at >= 0:
            end, device = devices[at]
            if address + length <= end:
                return device.read(address - bases[at], length)
        self._count(address)
        return b"\xff" * length

    def write(self, address: int, data: bytes) -> None:
        bases, devices = self._map
        at = bisect_right(bases, address) - 1
        if at >= 0:
            end, device = devices[at]
            if address + len(data) <= end:
                device.write(address - bases[at], data)
                return
        self._count(address)

    def _count(self, address: int) -> None:
        if address not in self.unowned and len(self.unowned) >= MAX_UNOWNED:
            address = -1
        self.unowned[address] = self.unowned.get(address, 0) + 1
