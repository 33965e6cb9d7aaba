"""The size of a running machine: memory beyond what it booted with, CPUs on line, its disk."""

from __future__ import annotations

import time
from pathlib import Path

from ambi.core.deadline import Deadline
from ambi.core.errors import AmbiError, Conflict, Unavailable
from hyper.guest.protocol import CpusTag, GrowTag, Type
from hyper.vm import disk
from hyper.vm.cgroup import Cgroup, Limits
from hyper.vm.link import Link
from hyper.vm.monitor import Monitor

LOOK_S = 0.02
PATIENCE_S = 3.0  # with a guest that neither takes nor gives any memory
AGENT = "the guest's agent"
SERIAL = "disk"


class Sizes:
    """What has changed since the boot. host_bytes: the limit of the VMM's cgroup then, 0 for none."""

    __slots__ = ("_cgroup", "_host_bytes", "_link", "_monitor", "_vcpus", "more", "on_line")

    def __init__(self, monitor: Monitor, cgroup: Cgroup, link: Link, vcpus: int) -> None:
        self._monitor = monitor
        self._cgroup = cgroup
        self._host_bytes = cgroup.memory_bytes
        self._link = link
        self._vcpus = self.on_line = vcpus
        self.more = 0  # bytes that the guest uses beyond what it booted with

    def set_cpus(self, count: int, by: Deadline) -> None:
        """So many of the machine's CPUs on line. Raises what the agent says."""
        if count != self.on_line:
            self._link.wait(self._link.request(Type.CPUS, ((CpusTag.COUNT, count),)), by, AGENT)
            self.on_line = count

    def grow_memory(self, size_bytes: int, by: Deadline) -> None:
        """Have the guest use `size_bytes` beyond what it booted with, more than now. Nothing has changed when this raises
        Unavailable (the guest does not take it), or what the monitor says."""
        before = self.more
        self._limit_host(size_bytes)
        try:
            self.more = self._settle(size_bytes, by)
            if self.more < size_bytes:
                raise Unavailable(
                    f"the guest took {self.more - before >> 20} MiB of {size_bytes - before >> 20} MiB more memory",
                    hint="its kernel's words are on its console: ambi inspect",
                )
        except BaseException:
            self.shrink_memory(before, Deadline.after(PATIENCE_S))
            raise

    def shrink_memory(self, size_bytes: int, by: Deadline) -> int:
        """Have the guest give back what it uses beyond `size_bytes`; how much of that it could not give yet."""
        try:
            self.more = self._settle(size_bytes, by)
        except AmbiError:  # a monitor that is gone: its end is told elsewhere
            pass
        self._limit_host(max(size_bytes, self.more))
        return max(0, self.more - size_bytes)

    def _settle(self, size_bytes: int, by: Deadline) -> int:
        plugged = self._monitor.resize_memory(size_bytes, by)
        still = Deadline.after(PATIENCE_S)
        while plugged != size_bytes and not still.expired() and not by.expired():
            time.sleep(LOOK_S)
            now = self._monitor.memory_plugged(by)
            if now != plugged:
                still = Deadline.after(PATIENCE_S)
            plugged = now
        return plugged

    def _limit_host(self, more: int) -> None:
        """The VMM's own group has room for it. One that cannot be lowered yet stays as it is."""
        if not self._host_bytes:
            return
        try:
            self._cgroup.limit(Limits(memory_bytes=self._host_bytes + more))
        except AmbiError:
            if more > self.more:
                raise

    def refuse_saving(self) -> None:
        """Raises Conflict for a guest that uses more memory than it booted with: no saved machine has it."""
        if self.more:  # some of it may have come back since
            self.more = self._monitor.memory_plugged(Deadline.after(PATIENCE_S))
        if self.more:
            raise Conflict(
                f"the virtual machine uses {self.more >> 20} MiB more memory than it began with, and cannot be saved so",
                hint="take it back before: ambi update --memory SIZE; or restart it, so that it begins with it",
            )

    def grow_disk(self, path: Path, size_bytes: int, by: Deadline) -> None:
        """The writable disk, and the file system on it. Raises InvalidRequest (it would shrink), what monitor or agent say:
        then the file may be longer, and the next start goes on from there."""
        size_bytes = disk.grow(path, size_bytes)
        self._monitor.resize_disk(SERIAL, size_bytes, by)
        self.fill_disk(size_bytes, by)

    def fill_disk(self, size_bytes: int, by: Deadline) -> None:
        items = ((GrowTag.SERIAL, SERIAL), (GrowTag.BYTES, size_bytes))
        self._link.wait(self._link.request(Type.GROW, items), by, AGENT)
