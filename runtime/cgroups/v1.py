"""Control groups, version 1: one directory in each mounted hierarchy."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import PurePosixPath
from typing import Any, Protocol

from ambi.core.deadline import Deadline
from ambi.core.errors import InvalidRequest, Unavailable, Unsupported
from ambi.core.model import Usage
from runtime.cgroups import blocks, change, freezer, oom
from runtime.cgroups.hierarchies import Hierarchies, below, read, read_number, read_table, write
from runtime.devices import Rule

_UNLIMITED = 1 << 62  # version 1 shows a huge number where nothing is limited


class Group(Protocol):
    """What both versions offer."""

    path: PurePosixPath

    @property
    def joins(self) -> list[str]:
        """Directories whose `cgroup.procs` a process writes itself to in order to join; empty when `born_in` does it."""

    def born_in(self) -> int | None:
        """A new descriptor for CLONE_INTO_CGROUP, or None where that does not exist."""

    def create(self, resources: dict[str, Any], rules: list[Rule]) -> None: ...

    def usage(self) -> Usage: ...

    def oom_kills(self) -> int: ...

    def oom_bell(self) -> oom.Bell | None:
        """What tells of memory that runs out; None where nothing can."""

    def pids(self) -> list[int]: ...

    def freeze(self, by: Deadline) -> None:
        """Stop every process of the group; returns when none runs. Raises DeadlineExceeded, Unsupported; thawed then."""

    def thaw(self) -> None:
        """Let them go on; a group that is not frozen or is gone is no error."""

    def update(self, resources: dict[str, Any]) -> None:
        """Change the limits that an OCI `resources` object names: all, or none.

        Raises Conflict, InvalidRequest, Unsupported.
        """

    def kill(self) -> None:
        """SIGKILL every process of the group and of those below it."""

    def remove(self, by: Deadline) -> None:
        """Remove the group and those below it; waits for ended processes to leave. Raises Unavailable when some stay."""


def clean(path: PurePosixPath) -> PurePosixPath:
    """`path` when it is absolute and plain; InvalidRequest otherwise."""
    if not path.is_absolute() or ".." in path.parts or path == PurePosixPath("/"):
        raise InvalidRequest(f"linux.cgroupsPath: {path} is not an absolute path of a group")
    return path


def remove_directory(directory: str, by: Deadline) -> None:
    """rmdir, again and again while processes that were killed are still leaving."""
    pause = 0.001
    while True:
        try:
            os.rmdir(directory)
            return
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EBUSY or by.expired():
                raise Unavailable(
                    f"cannot remove cgroup {directory}: {error.strerror}", hint=f"see {directory}/cgroup.procs"
                ) from None
        time.sleep(pause)
        pause = min(pause * 2, 0.1)


class V1Group:
    """The directories of one group in all version 1 hierarchies."""

    def __init__(self, hierarchies: Hierarchies, path: PurePosixPath) -> None:
        self.path = clean(path)
        self._hierarchies = hierarchies

    def _directory(self, controller: str) -> str:
        """The group in the hierarchy of `controller`; a path that cannot exist where that is not mounted."""
        mount = self._hierarchies.of(controller)
        return f"{mount}{self.path}" if mount else "/proc/0"

    @property
    def joins(self) -> list[str]:
        return [f"{hierarchy.mount}{self.path}" for hierarchy in self._hierarchies.v1]

    def born_in(self) -> int | None:
        return None

    def make(self) -> None:
        """The directories alone, without any limit: what a starter can join."""
        for hierarchy in self._hierarchies.v1:
            directory = f"{hierarchy.mount}{self.path}"
            try:
                os.mkdir(directory)
            except FileExistsError:
                pass
            except FileNotFoundError:
                os.makedirs(directory, exist_ok=True)
            if "cpuset" in hierarchy.controllers:
                self._inherit_cpuset(hierarchy.mount)

    def _inherit_cpuset(self, mount: str) -> None:
        """A new cpuset is empty and takes no process (ENOSPC) until both lists are copied from its parent."""
        here = mount
        for part in self.path.parts[1:]:
            parent, here = here, f"{here}/{part}"
            for name in ("cpuset.cpus", "cpuset.mems"):
                if not read(here, name).strip():
                    write(here, name, read(parent, name).strip())

    def adopt(self, parked: PurePosixPath) -> None:
        """Give the group `parked`, a sibling, this group's name; version 1 alone can rename. All or nothing."""
        done = []
        try:
            for hierarchy in self._hierarchies.v1:
                os.rename(f"{hierarchy.mount}{parked}", f"{hierarchy.mount}{self.path}")
                done.append(hierarchy.mount)
        except OSError:
            for mount in done:
                os.rename(f"{mount}{self.path}", f"{mount}{parked}")
            raise

    def create(self, resources: dict[str, Any], rules: list[Rule]) -> None:
        self.make()
        self.limit(resources, rules)

    def limit(self, resources: dict[str, Any], rules: list[Rule]) -> None:
        """Write the limits of an OCI `resources` object and the device rules into existing directories."""
        devices = self._directory("devices")
        if self._hierarchies.of("devices"):
            write(devices, "devices.deny", "a")
            for rule in rules:
                write(devices, "devices.allow" if rule.allow else "devices.deny", rule.text())
        for controller, name, value in _settings(resources):
            if value is not None:
                write(self._directory(controller), name, str(value))
        blocks.apply(blocks.v1(self._directory("blkio"), resources.get("blockIO") or {}))

    def usage(self) -> Usage:
        cpu, memory = self._directory("cpuacct"), self._directory("memory")
        limit = read_number(memory, "memory.limit_in_bytes")
        read_bytes, written_bytes = self._block_bytes()
        return Usage(
            cpu_ns=read_number(cpu, "cpuacct.usage"),
            cpu_user_ns=read_number(cpu, "cpuacct.usage_user"),
            cpu_system_ns=read_number(cpu, "cpuacct.usage_sys"),
            memory_bytes=read_number(memory, "memory.usage_in_bytes"),
            memory_cache_bytes=read_table(memory, "memory.stat").get("total_inactive_file", 0),
            memory_limit_bytes=0 if limit >= _UNLIMITED else limit,
            pids=read_number(self._directory("pids"), "pids.current"),
            oom_kills=self.oom_kills(),
            block_read_bytes=read_bytes,
            block_write_bytes=written_bytes,
        )

    def _block_bytes(self) -> tuple[int, int]:
        """Read from and written to all devices, but for write-back. A line of blkio: `8:0 Read 4096`."""
        blkio, sums = self._directory("blkio"), {"Read": 0, "Write": 0}
        text = read(blkio, "blkio.throttle.io_service_bytes_recursive") or read(blkio, "blkio.throttle.io_service_bytes")
        for line in text.splitlines():
            words = line.split()
            if len(words) == 3 and words[1] in sums:
                sums[words[1]] += int(words[2])
        return sums["Read"], sums["Write"]

    def oom_kills(self) -> int:
        return read_table(self._directory("memory"), "memory.oom_control").get("oom_kill", 0)

    def oom_bell(self) -> oom.Bell | None:
        return oom.bell_v1(self._directory("memory"))

    def _some_directory(self) -> str:
        """One hierarchy that every process of the group is in."""
        if self._hierarchies.of("freezer"):
            return self._directory("freezer")
        return f"{self._hierarchies.v1[0].mount}{self.path}"

    def pids(self) -> list[int]:
        found = [read(directory, "cgroup.procs").split() for directory in below(self._some_directory())]
        return sorted({int(pid) for pids in found for pid in pids if pid != "0"})

    def kill(self) -> None:
        """Freezes first, so that nothing forks away; a frozen task of version 1 takes the signal when thawed."""
        directory = self._some_directory()
        freezer = self._hierarchies.of("freezer") is not None
        if not self.pids():
            return
        if freezer:
            self._set_frozen(directory, "FROZEN")
        for pid in self.pids():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        if freezer:
            self._set_frozen(directory, "THAWED")

    def freeze(self, by: Deadline) -> None:
        if not self._hierarchies.of("freezer"):
            raise Unsupported(
                "cannot pause: this host has no freezer controller",
                hint="mount -t cgroup -o freezer none /sys/fs/cgroup/freezer",
            )
        freezer.freeze_v1(self._directory("freezer"), by)

    def thaw(self) -> None:
        freezer.thaw_v1(self._directory("freezer"))

    def update(self, resources: dict[str, Any]) -> None:
        settings = [
            change.Setting(self._directory(controller), name, str(value))
            for controller, name, value in _settings(resources)
            if value is not None
        ]
        both = [s for s in settings if s.name in ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")]
        if len(both) == 2 and self._grows(both[1]):  # memory alone must never be above both together
            at = settings.index(both[0])
            settings[at : at + 2] = [both[1], both[0]]
        change.apply([*settings, *blocks.v1(self._directory("blkio"), resources.get("blockIO") or {})])

    @staticmethod
    def _grows(setting: change.Setting) -> bool:
        return setting.value == "-1" or int(setting.value) > read_number(setting.directory, setting.name)

    @staticmethod
    def _set_frozen(directory: str, state: str) -> None:
        try:
            write(directory, "freezer.state", state)
        except OSError:  # the group is gone
            pass

    def remove(self, by: Deadline) -> None:
        for directory in self.joins:
            for path in below(directory):
                remove_directory(path, by)


def _settings(resources: dict[str, Any]) -> list[tuple[str, str, Any]]:
    """(controller, file, value or None) in the order of writing. Zero is `unset` in what docker's clients send."""
    memory, cpu = resources.get("memory") or {}, resources.get("cpu") or {}
    pids = (resources.get("pids") or {}).get("limit")
    swappiness = memory.get("swappiness")
    return [
        ("memory", "memory.limit_in_bytes", memory.get("limit") or None),
        ("memory", "memory.memsw.limit_in_bytes", memory.get("swap") or None),
        ("memory", "memory.soft_limit_in_bytes", memory.get("reservation") or None),
        ("memory", "memory.swappiness", None if swappiness is None or swappiness < 0 else swappiness),
        ("memory", "memory.oom_control", 1 if memory.get("disableOOMKiller") else None),
        ("cpu", "cpu.shares", cpu.get("shares") or None),
        ("cpu", "cpu.cfs_period_us", cpu.get("period") or None),
        ("cpu", "cpu.cfs_quota_us", cpu.get("quota") or None),
        ("cpuset", "cpuset.cpus", cpu.get("cpus") or None),
        ("cpuset", "cpuset.mems", cpu.get("mems") or None),
        ("pids", "pids.max", "max" if pids is not None and pids < 0 else pids or None),
    ]
