"""The cgroup of a VMM: one directory in each v1 hierarchy that matters, or one in the v2 tree."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import NamedTuple

from ambi.core.errors import from_os_error

CONTROLLERS = ("memory", "cpu", "cpuacct", "pids", "freezer")
KILL_ROUNDS = 100
KILL_PAUSE_S = 0.02


class Limits(NamedTuple):
    """0: as it is, none at first; cpu_quota_us -1: none any more. cpu: microseconds of CPU time in each period."""

    memory_bytes: int = 0
    cpu_quota_us: int = 0
    cpu_period_us: int = 100_000
    pids: int = 0


class Hierarchy(NamedTuple):
    """A mounted cgroup file system; `controllers` is empty for v2."""

    mount: Path
    controllers: frozenset[str]


def hierarchies() -> list[Hierarchy]:
    """Those that a VMM joins: v2 alone where nothing of v1 has controllers of ours."""
    v1, v2 = [], []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            before, _, after = line.partition(" - ")
            fstype, _, rest = after.partition(" ")
            mount = Path(before.split()[4].replace("\\040", " "))
            if fstype == "cgroup":
                ours = frozenset(rest.split()[-1].split(",")) & frozenset(CONTROLLERS)
                if ours:
                    v1.append(Hierarchy(mount, ours))
            elif fstype == "cgroup2":
                v2.append(Hierarchy(mount, frozenset()))
    return v1 or v2[:1]


class Cgroup:
    """The directories of `path` (absolute, as in linux.cgroupsPath) in all hierarchies."""

    __slots__ = ("_all", "_path", "memory_bytes")

    def __init__(self, path: str) -> None:
        self._path = os.path.normpath("/" + path).lstrip("/")
        self._all = hierarchies() if self._path else []
        self.memory_bytes = 0  # the limit that it was made with

    def directories(self) -> list[Path]:
        return [h.mount / self._path for h in self._all]

    def create(self, limits: Limits) -> None:
        """Make the directories and set what limits the kernel has files for."""
        self.memory_bytes = limits.memory_bytes
        for hierarchy in self._all:
            directory = hierarchy.mount / self._path
            try:
                if not hierarchy.controllers:
                    _delegate(hierarchy.mount, self._path)
                directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise from_os_error("cannot make the cgroup of a virtual machine", error) from error
        self.limit(limits)

    def limit(self, limits: Limits) -> None:
        for hierarchy in self._all:
            directory = hierarchy.mount / self._path
            for name, value in _files(hierarchy.controllers, limits):
                try:
                    (directory / name).write_text(value)
                except FileNotFoundError:  # the controller is not there: v2 without delegation
                    continue
                except OSError as error:
                    raise from_os_error("cannot limit the cgroup of a virtual machine", error) from error

    def join(self) -> None:
        """Move the calling process into it."""
        for directory in self.directories():
            (directory / "cgroup.procs").write_text("0")

    def members(self) -> set[int]:
        found: set[int] = set()
        for directory in self.directories():
            try:
                found.update(int(word) for word in (directory / "cgroup.procs").read_text().split())
            except FileNotFoundError:
                continue
        return found

    def kill(self) -> None:
        """SIGKILL to every member, until there is none; zombies that nobody reaps here are left to their parents."""
        for _ in range(KILL_ROUNDS):
            members = self.members() - {0, os.getpid()}
            if not members:
                return
            for pid in members:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(KILL_PAUSE_S)

    def remove(self) -> None:
        """Remove the directories; nothing when they are gone."""
        for directory in self.directories():
            _remove(directory)


def _remove(directory: Path) -> None:
    for _ in range(KILL_ROUNDS):
        try:
            directory.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError as error:  # EBUSY while the kernel is still taking the last member apart
            last = error
        time.sleep(KILL_PAUSE_S)
    raise from_os_error("cannot remove the cgroup of a virtual machine", last)


def _delegate(mount: Path, path: str) -> None:
    """v2: hand the controllers down to the parent of `path`; what cannot be handed down is done without."""
    directory = mount
    for part in path.split("/"):
        directory.mkdir(exist_ok=True)
        try:
            offered = (directory / "cgroup.controllers").read_text().split()
            wanted = " ".join(f"+{name}" for name in offered if name in CONTROLLERS)
            (directory / "cgroup.subtree_control").write_text(wanted)
        except OSError:  # a group with processes in it, or not ours: limits that it has no file for are left out
            pass
        directory /= part


def _files(controllers: frozenset[str], limits: Limits) -> list[tuple[str, str]]:
    """Names below the directory and what to write, of the limits that are set."""
    files = []
    if not controllers:
        if limits.memory_bytes:
            files.append(("memory.max", str(limits.memory_bytes)))
        if limits.cpu_quota_us:
            quota = "max" if limits.cpu_quota_us < 0 else str(limits.cpu_quota_us)
            files.append(("cpu.max", f"{quota} {limits.cpu_period_us}"))
        if limits.pids:
            files.append(("pids.max", str(limits.pids)))
    if "memory" in controllers and limits.memory_bytes:
        files.append(("memory.limit_in_bytes", str(limits.memory_bytes)))
    if "cpu" in controllers and limits.cpu_quota_us:
        files.append(("cpu.cfs_period_us", str(limits.cpu_period_us)))
        files.append(("cpu.cfs_quota_us", str(limits.cpu_quota_us)))
    if "pids" in controllers and limits.pids:
        files.append(("pids.max", str(limits.pids)))
    return files
