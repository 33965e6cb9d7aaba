"""The ports of a PCI bus with nothing on it.

A kernel that finds no way to a PCI bus at all says so on its console, which costs more exits than all that it asks here:
with WORDS it believes that the ports work, does not scan for quirks, and finds no root bridge in the ACPI tables.
"""

from __future__ import annotations

WORDS = ("pci=conf1,noearly",)
PORTS = 8  # from 0xcf8 on: address, data
DATA = 4


class ConfigPorts:
    """Configuration mechanism 1 (PCI Local Bus 3.0, section 3.2.2.3.2): the address reads back, the data is all ones."""

    __slots__ = ("_address",)

    def __init__(self) -> None:
        self._address = bytes(4)

    def read(self, offset: int, length: int) -> bytes:
        if offset + length <= DATA:
            return self._address[offset : offset + length]
        return b"\xff" * length

    def write(self, offset: int, data: bytes) -> None:
        if offset == 0 and len(data) == 4:
            self._address = data
