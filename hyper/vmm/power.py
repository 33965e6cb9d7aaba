"""How a guest says that it is done: the sleep control register of ACPI, and the keyboard controller's reset line."""

from __future__ import annotations

from collections.abc import Callable

from hyper.vmm.boot.acpi import RESET_VALUE, SLEEP_TYPE_S5

SLEEP_ENABLE = 1 << 5
COMMAND = 4  # of the keyboard controller: port 0x64; read, it is the status
HAS_DATA = 1


class SleepControl:
    """Two ports, control and status (ACPI 6.5, section 4.8.3.7). Entering S5 is `power_off`."""

    __slots__ = ("_power_off",)

    def __init__(self, power_off: Callable[[], None]) -> None:
        self._power_off = power_off

    def read(self, offset: int, length: int) -> bytes:
        return bytes(length)

    def write(self, offset: int, data: bytes) -> None:
        if offset == 0 and data[0] & SLEEP_ENABLE and data[0] >> 2 & 7 == SLEEP_TYPE_S5:
            self._power_off()


class ResetLine:
    """Ports 0x60 to 0x64, of which only the pulse on the reset line does something (`reboot=k`, ACPI's reset register).

    The status is always "has data, is not busy". So a Linux that looks for a keyboard finds one that never falls silent and
    gives up after 17 bytes; if there were no data it would ask 10,000 times, if it were busy 65,000 times before it resets.
    """

    __slots__ = ("_reset",)

    def __init__(self, reset: Callable[[], None]) -> None:
        self._reset = reset

    def read(self, offset: int, length: int) -> bytes:
        return bytes((HAS_DATA if offset == COMMAND else 0,)) * length

    def write(self, offset: int, data: bytes) -> None:
        if offset == COMMAND and data[0] == RESET_VALUE:
            self._reset()
