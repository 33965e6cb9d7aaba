"""What this host offers to containers."""

from __future__ import annotations

import os

from ambi.core.driver import Features, Problem
from ambi.linux import capabilities
from runtime import cgroups

_NEEDED = ("mnt", "pid", "uts", "ipc", "net", "cgroup")
_KERNEL = (5, 12)  # mount_setattr; openat2, clone3 into a cgroup and close_range are older


def probe() -> Features:
    """Cheap, and without side effects."""
    details = {"kernel": os.uname().release, "cgroups": cgroups.hierarchies().mode}
    details["seccomp"] = "yes" if os.path.exists("/proc/sys/kernel/seccomp/actions_avail") else "no"
    details["file systems"] = ", ".join(name for name in ("overlay", "erofs") if _has_filesystem(name)) or "none needed"
    details["raise limits (CAP_SYS_RESOURCE)"] = "yes" if _holds("CAP_SYS_RESOURCE") else "no"
    return Features(_problem(), details)


def _holds(name: str) -> bool:
    return bool(capabilities.permitted() & capabilities.mask_of([name]))


def _has_filesystem(name: str) -> bool:
    with open("/proc/filesystems", encoding="ascii") as file:
        return name in file.read().split()


def _problem() -> Problem | None:
    release = os.uname().release.split("-")[0].split(".")
    if tuple(int(part) for part in release[:2]) < _KERNEL:
        return Problem(f"Linux {os.uname().release} is too old for containers", "use Linux 5.12 or newer")
    missing = [name for name in _NEEDED if not os.path.exists(f"/proc/self/ns/{name}")]
    if missing:
        return Problem(f"this kernel has no {missing[0]} namespaces", "use a distribution's kernel")
    if not _holds("CAP_SYS_ADMIN"):
        return Problem("containers need CAP_SYS_ADMIN", "run as root")
    if cgroups.hierarchies().mode == "none":
        return Problem("no cgroup hierarchy is mounted", "mount -t cgroup2 none /sys/fs/cgroup")
    if not _has_filesystem("overlay") and not os.path.isdir(f"/lib/modules/{os.uname().release}"):
        return Problem("this kernel has no overlay file system", "modprobe overlay")
    return None
