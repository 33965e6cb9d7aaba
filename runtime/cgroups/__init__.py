"""Control groups of one container, version 1, 2 and the hybrid of both behind one interface.

    group = open_group(PurePosixPath("/ambi/3f2a"))     nothing happens yet
    group.create(resources, rules)                      the directories, with their limits and device rules
    group.usage() ; group.oom_kills() ; group.pids()
    group.kill() ; group.remove(by)                     both tolerate what is already gone

A path is relative to the mount of each hierarchy. Migrating a process into a cgroup sleeps for a grace period of the kernel
(6 to 15 ms after idle), so on the way to a start nothing migrates: with version 2 a process is born in its group
(`group.born_in`), with version 1 it is the child of a starter that joined beforehand (see runtime/park.py).
"""

from __future__ import annotations

import os
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from runtime.cgroups.hierarchies import Hierarchies, read_mounts
from runtime.cgroups.v1 import V1Group
from runtime.cgroups.v2 import V2Group

if TYPE_CHECKING:
    from runtime.cgroups.v1 import Group

_hierarchies: Hierarchies | None = None


def hierarchies() -> Hierarchies:
    """What this host has mounted; read once in a process and its forks."""
    global _hierarchies
    if _hierarchies is None:
        with open("/proc/self/mountinfo", "rb", buffering=0) as file:
            _hierarchies = read_mounts(os.fsdecode(file.read()))
    return _hierarchies


def open_group(path: PurePosixPath) -> Group:
    """The group at `path`, which need not exist."""
    found = hierarchies()
    return V1Group(found, path) if found.v1 else V2Group(found, path)
