"""What a driver needs of a VMM beside the agent's link: the process, some figures, why it ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from ambi.core.deadline import Deadline
from hyper.vm.jail import Child

BOOT, TEMPLATE, SNAPSHOT = "boot", "template", "snapshot"  # how a guest began


class Monitor(Protocol):
    """One running VMM. It is not trusted: answers are checked, and every wait has an end."""

    origin: str  # BOOT, TEMPLATE or SNAPSHOT
    hotplug_bytes: int  # how much more memory the guest can get than it began with

    @property
    def child(self) -> Child: ...

    def block_bytes(self, by: Deadline) -> tuple[int, int]:
        """Bytes read and written by all disks. Raises Unavailable, DeadlineExceeded."""

    def inspect(self, by: Deadline) -> dict[str, Any]:
        """What `inspect` shows of a running VM: {"vmm": name, "accelerator": name, "started": origin, ...} with
        the back-end's own figures."""

    def resize_memory(self, more_bytes: int, by: Deadline) -> int:
        """Ask the guest to use so much beyond what it began with; how much it uses now, which follows when it likes."""

    def memory_plugged(self, by: Deadline) -> int:
        """How much the guest uses beyond what it began with."""

    def resize_disk(self, serial: str, size_bytes: int, by: Deadline) -> None:
        """Tell the guest that the file behind the disk `serial` has become longer."""

    def sysrq(self, key: str, write: Callable[[bytes], None], by: Deadline) -> None:
        """Have the guest's kernel obey a key of SysRq. write: to the serial port, for a VMM that takes keys there."""

    def plug_disk(self, serial: str, fd: int, by: Deadline, *, readonly: bool) -> int:
        """One more disk, of the file `fd`, which stays the caller's: the slot that it is in. Its driver is not bound yet.

        Raises Unsupported (this back-end has no devices that come later), Conflict (no slot is empty).
        """

    def plug_share(self, tag: str, fd: int, by: Deadline) -> int:
        """The same of a file tree; `fd` is connected to its virtiofsd."""

    def unplug(self, slot: int, by: Deadline) -> None:
        """Take away what was plugged into `slot`, whatever the guest does with it."""

    def why(self) -> str:
        """Of a VMM that has ended: the cause that it gave (`guest-reset`, `guest-panic`, ...), else ""."""

    def close(self) -> None:
        """Close what the monitor holds, but for the child."""


def end(monitor: Monitor) -> None:
    """Kill the VMM and let go of it. Idempotent."""
    monitor.child.kill()
    monitor.child.close()
    monitor.close()


def number(value: object) -> int:
    """A figure that a VMM gave; 0 for what is none."""
    return value if isinstance(value, int) and value >= 0 else 0
