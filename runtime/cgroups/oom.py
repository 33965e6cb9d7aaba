"""Hearing that the kernel has killed for memory, while the rest of a group runs on."""

from __future__ import annotations

import os
import select
from typing import NamedTuple

from runtime.cgroups.hierarchies import write


class Bell(NamedTuple):
    """A descriptor and the events of poll(2) on it that tell of memory that ran out. The receiver closes it."""

    fd: int
    events: int

    def quiet(self) -> None:
        """Have it ring only for what comes next."""
        try:
            if self.events & select.POLLPRI:
                os.pread(self.fd, 4096, 0)
            else:
                os.read(self.fd, 8)
        except OSError:  # the group is gone, or it has been quiet
            pass


def bell_v1(directory: str) -> Bell | None:
    """Documentation/admin-guide/cgroup-v1/memory.rst, 10. It rings at the group's removal as well."""
    bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        control = os.open(f"{directory}/memory.oom_control", os.O_RDONLY | os.O_CLOEXEC)
        try:
            write(directory, "cgroup.event_control", f"{bell} {control}")
        finally:
            os.close(control)
    except OSError:  # no memory controller, or the group is gone
        os.close(bell)
        return None
    return Bell(bell, select.POLLIN)


def bell_v2(directory: str) -> Bell | None:
    """`memory.events` rings for each of its numbers."""
    try:
        bell = Bell(os.open(f"{directory}/memory.events", os.O_RDONLY | os.O_CLOEXEC), select.POLLPRI)
    except OSError:
        return None
    bell.quiet()
    return bell
