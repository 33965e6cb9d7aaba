"""Control groups, version 2: one directory, entered at birth."""

from __future__ import annotations

import math
import os
from pathlib import PurePosixPath
from typing import Any

from ambi.core.deadline import Deadline
from ambi.core.errors import Conflict, Unsupported
from ambi.core.model import Usage
from ambi.linux import device_filter
from runtime.cgroups import blocks, change, freezer, oom
from runtime.cgroups.hierarchies import Hierarchies, below, read, read_number, read_table, write
from runtime.cgroups.v1 import clean, remove_directory
from runtime.devices import Rule

_WANTED = ("cpuset", "cpu", "io", "memory", "pids")


class V2Group:
    """One group of the unified hierarchy."""

    def __init__(self, hierarchies: Hierarchies, path: PurePosixPath) -> None:
        self.path = clean(path)
        self._root = hierarchies.v2
        self.directory = f"{hierarchies.v2}{self.path}"

    @property
    def joins(self) -> list[str]:
        return []

    def born_in(self) -> int | None:
        return os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def create(self, resources: dict[str, Any], rules: list[Rule]) -> None:
        if not self._root:
            raise Unsupported("no cgroup hierarchy is mounted", hint="mount -t cgroup2 none /sys/fs/cgroup")
        try:
            self._make()
        except FileNotFoundError:  # somebody has just removed an empty parent
            self._make()
        device_filter.attach(self.directory, device_filter.compile(rules))
        for name, value in _settings(resources):
            if value is not None:
                self._set(name, str(value))
        blocks.apply(blocks.v2(self.directory, resources.get("blockIO") or {}))

    def _make(self) -> None:
        here = self._root
        for part in self.path.parts[1:]:
            self._delegate(here)
            here += "/" + part
            try:
                os.mkdir(here)
            except FileExistsError:
                pass

    @staticmethod
    def _delegate(directory: str) -> None:
        """Let the groups below `directory` have the controllers that it has itself."""
        active = read(directory, "cgroup.subtree_control").split()
        missing = [c for c in read(directory, "cgroup.controllers").split() if c in _WANTED and c not in active]
        for controller in missing:
            try:
                write(directory, "cgroup.subtree_control", f"+{controller}")
            except OSError:  # EBUSY: processes live in it. The limit that needs the controller says so, should there be one
                pass

    def _set(self, name: str, value: str) -> None:
        try:
            write(self.directory, name, value)
        except FileNotFoundError:
            controller = name.partition(".")[0]
            raise Unsupported(
                f"cannot set {name}: controller {controller} is not enabled for {self.directory}",
                hint=f"echo +{controller} > {os.path.dirname(self.directory)}/cgroup.subtree_control",
            ) from None

    def usage(self) -> Usage:
        cpu = read_table(self.directory, "cpu.stat")
        read_bytes, written_bytes = self._block_bytes()
        return Usage(
            cpu_ns=cpu.get("usage_usec", 0) * 1000,
            cpu_user_ns=cpu.get("user_usec", 0) * 1000,
            cpu_system_ns=cpu.get("system_usec", 0) * 1000,
            memory_bytes=read_number(self.directory, "memory.current"),
            memory_cache_bytes=read_table(self.directory, "memory.stat").get("inactive_file", 0),
            memory_limit_bytes=read_number(self.directory, "memory.max"),
            pids=read_number(self.directory, "pids.current"),
            oom_kills=self.oom_kills(),
            block_read_bytes=read_bytes,
            block_write_bytes=written_bytes,
        )

    def _block_bytes(self) -> tuple[int, int]:
        """Read from and written to all devices. A line of io.stat: `8:0 rbytes=1 wbytes=2 rios=3 ...`."""
        words = [word.partition("=") for word in read(self.directory, "io.stat").split()]
        sums = [sum(int(v) for k, _, v in words if k == key and v.isdecimal()) for key in ("rbytes", "wbytes")]
        return sums[0], sums[1]

    def oom_kills(self) -> int:
        return read_table(self.directory, "memory.events").get("oom_kill", 0)

    def oom_bell(self) -> oom.Bell | None:
        return oom.bell_v2(self.directory)

    def pids(self) -> list[int]:
        found = [read(directory, "cgroup.procs").split() for directory in below(self.directory)]
        return sorted({int(pid) for pids in found for pid in pids if pid != "0"})

    def freeze(self, by: Deadline) -> None:
        freezer.freeze_v2(self.directory, by)

    def thaw(self) -> None:
        freezer.thaw_v2(self.directory)

    def update(self, resources: dict[str, Any]) -> None:
        self._check_memory((resources.get("memory") or {}).get("limit") or 0)
        wanted = [(name, value) for name, value in _settings(resources) if value is not None]
        settings = [change.Setting(self.directory, name, str(value)) for name, value in wanted]
        change.apply([*settings, *blocks.v2(self.directory, resources.get("blockIO") or {})])

    def _check_memory(self, limit: int) -> None:
        """The kernel would kill processes until they fit, where version 1 refuses."""
        files = read_table(self.directory, "memory.stat")
        firm = read_number(self.directory, "memory.current") - files.get("inactive_file", 0) - files.get("active_file", 0)
        if 0 < limit < firm:
            raise Conflict(
                f"cannot change the memory limit to {limit}: {firm} bytes are in use now", hint="`ambi stats` shows how much"
            )

    def kill(self) -> None:
        try:
            write(self.directory, "cgroup.kill", "1")
        except FileNotFoundError:  # the group is gone
            pass

    def remove(self, by: Deadline) -> None:
        for path in below(self.directory):
            remove_directory(path, by)


def weight_of(shares: int) -> int:
    """cpu.weight for cpu.shares: 2 to 1, 1024 to 100, 262144 to 10000 (the curve of runc 1.3 and crun 1.23)."""
    if shares <= 2:
        return 1
    if shares >= 1 << 18:
        return 10000
    log = math.log2(shares)
    return math.ceil(10 ** ((log * log + 125 * log) / 612 - 7 / 34))


def _settings(resources: dict[str, Any]) -> list[tuple[str, Any]]:
    """(file, value or None) in the order of writing. Zero is `unset` in what docker's clients send."""
    memory, cpu = resources.get("memory") or {}, resources.get("cpu") or {}
    limit, swap = memory.get("limit") or 0, memory.get("swap") or 0
    pids = (resources.get("pids") or {}).get("limit")
    quota, period = cpu.get("quota") or 0, cpu.get("period") or 100_000
    shares = cpu.get("shares")
    bandwidth = f"{quota if quota > 0 else 'max'} {period}"
    return [
        ("memory.max", _or_max(limit)),
        ("memory.swap.max", "max" if swap < 0 else swap - limit if swap else None),
        ("memory.low", _or_max(memory.get("reservation") or 0)),
        ("cpu.weight", weight_of(shares) if shares else None),
        ("cpu.max", bandwidth if quota or cpu.get("period") else None),
        ("cpuset.cpus", cpu.get("cpus") or None),
        ("cpuset.mems", cpu.get("mems") or None),
        ("pids.max", _or_max(pids or 0)),
    ]


def _or_max(value: int) -> int | str | None:
    return "max" if value < 0 else value or None
