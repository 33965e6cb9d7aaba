"""A running QEMU, as the driver sees it. Implements hyper.vm.monitor.Monitor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ambi.core.deadline import Deadline
from ambi.core.errors import Unsupported
from hyper.qemu.qmp import Qmp
from hyper.vm.jail import Child
from hyper.vm.monitor import BOOT, number


class QemuMonitor:
    """Owns the QMP socket and the child. layers: the descriptor of the VMDK, None for a guest without layers."""

    hotplug_bytes = 0  # its microvm has no place for a virtio-mem device
    __slots__ = ("_accelerator", "child", "layers", "origin", "parted", "qmp")

    def __init__(self, child: Child, qmp: Qmp, accelerator: str, *, origin: str = BOOT, layers: int | None = None) -> None:
        self.child = child
        self.qmp = qmp
        self._accelerator = accelerator
        self.origin = origin
        self.layers = layers
        self.parted = False  # the guest's disk of layers has nothing behind it: it must not run

    def block_bytes(self, by: Deadline) -> tuple[int, int]:
        return block_bytes(self.qmp.execute("query-blockstats", by))

    def inspect(self, by: Deadline) -> dict[str, Any]:
        return {"vmm": "qemu", "accelerator": self._accelerator, "started": self.origin}

    def resize_memory(self, more_bytes: int, by: Deadline) -> int:
        raise Unsupported("QEMU's microvm cannot change the memory of a running virtual machine")

    def memory_plugged(self, by: Deadline) -> int:
        return 0

    def resize_disk(self, serial: str, size_bytes: int, by: Deadline) -> None:
        self.qmp.execute("block_resize", by, **{"node-name": serial}, size=size_bytes)

    def sysrq(self, key: str, write: Callable[[bytes], None], by: Deadline) -> None:
        self.qmp.execute("chardev-send-break", by, id="console")
        write(key.encode())

    def plug_disk(self, serial: str, fd: int, by: Deadline, *, readonly: bool) -> int:
        raise _fixed("disk", "give it to the virtual machine when it is made")

    def plug_share(self, tag: str, fd: int, by: Deadline) -> int:
        raise _fixed("file tree", "start it with a bind mount (-v): others can be attached to it then")

    def unplug(self, slot: int, by: Deadline) -> None:
        """There is nothing."""

    def why(self) -> str:
        return self.qmp.why_shut_down()

    def close(self) -> None:
        self.qmp.close()


def _fixed(what: str, hint: str) -> Unsupported:
    """microvm has no bus that a device can be plugged into."""
    return Unsupported(f"a virtual machine of QEMU's microvm cannot get a {what} while it runs", hint=hint)


def block_bytes(stats: Any) -> tuple[int, int]:
    """Bytes read and written, of all disks, from the answer to query-blockstats; 0, 0 when it is none."""
    read = written = 0
    for entry in stats if isinstance(stats, list) else ():
        found = entry.get("stats") if isinstance(entry, dict) else None
        if isinstance(found, dict) and entry.get("qdev"):
            read += number(found.get("rd_bytes"))
            written += number(found.get("wr_bytes"))
    return read, written
