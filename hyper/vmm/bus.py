"""Which device an access to a port or to MMIO belongs to.

What no device owns reads all ones, as on a real bus, and swallows what is written; it is counted, because every such access
is an exit that somebody could do without.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Protocol

MAX_UNOWNED = 256  # addresses counted one by one; a guest that tries them all must not make us grow


class Device(Protocol):
    """`offset` is from the base that it was added at; an access does not cross the end of the device."""

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes."""

    def write(self, offset: int, data: bytes) -> None: ...


class Bus:
    """One for ports and one for MMIO. `unowned` counts accesses to nothing by their address, at most MAX_UNOWNED of them;
    `unowned[-1]` are the others."""

    __slots__ = ("_bases", "_devices", "unowned")

    def __init__(self) -> None:
        self._bases: list[int] = []
        self._devices: list[tuple[int, Device]] = []  # end and device, in the order of _bases
        self.unowned: dict[int, int] = {}

    def add(self, base: int, size: int, device: Device) -> None:
        """Give [base, base + size) to `device`. ValueError when some of it is taken."""
        at = bisect_right(self._bases, base)
        if (
            size <= 0
            or (at and self._devices[at - 1][0] > base)
            or (at < len(self._bases) and self._bases[at] < base + size)
        ):
            raise ValueError(f"{base:#x} to {base + size:#x} is taken, or empty")
        self._bases.insert(at, base)
        self._devices.insert(at, (base + size, device))

    def read(self, address: int, length: int) -> bytes:
        at = bisect_right(self._bases, address) - 1
        if at >= 0:
            end, device = self._devices[at]
            if address + length <= end:
                return device.read(address - self._bases[at], length)
        self._count(address)
        return b"\xff" * length

    def write(self, address: int, data: bytes) -> None:
        at = bisect_right(self._bases, address) - 1
        if at >= 0:
            end, device = self._devices[at]
            if address + len(data) <= end:
                device.write(address - self._bases[at], data)
                return
        self._count(address)

    def _count(self, address: int) -> None:
        if address not in self.unowned and len(self.unowned) >= MAX_UNOWNED:
            address = -1
        self.unowned[address] = self.unowned.get(address, 0) + 1
