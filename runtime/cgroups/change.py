"""Changing the limits of a group while its processes run: all of them, or none."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import NamedTuple

from ambi.core.errors import AmbiError, Conflict, InvalidRequest, Unsupported, from_os_error
from runtime.cgroups.hierarchies import read, write


class Setting(NamedTuple):
    """One control file and what it is to hold."""

    directory: str
    name: str
    value: str


LIMITS = {
    "memory.limit_in_bytes": "memory limit", "memory.memsw.limit_in_bytes": "limit of memory and swap",
    "memory.soft_limit_in_bytes": "memory reservation", "memory.swappiness": "swappiness",
    "memory.oom_control": "handling of out-of-memory", "memory.max": "memory limit", "memory.swap.max": "swap limit",
    "memory.low": "memory reservation", "cpu.shares": "CPU shares", "cpu.weight": "CPU shares",
    "cpu.cfs_period_us": "CPU period", "cpu.cfs_quota_us": "CPU quota", "cpu.max": "CPU quota",
    "cpuset.cpus": "set of CPUs", "cpuset.mems": "set of memory nodes", "pids.max": "limit of processes",
    "blkio.weight": "block I/O weight", "blkio.bfq.weight": "block I/O weight", "io.weight": "block I/O weight",
    "io.bfq.weight": "block I/O weight",
}  # fmt: skip


def apply(settings: Iterable[Setting]) -> None:
    """Write them in this order. When one is refused those before it are put back, and the error names it.

    Raises Conflict (below what is used now), InvalidRequest, Unsupported (the controller is not there).
    """
    done: list[Setting] = []
    for setting in settings:
        before = read(setting.directory, setting.name).strip()
        try:
            write(setting.directory, setting.name, setting.value)
        except OSError as error:
            _put_back(done)
            raise _refused(setting, error) from error
        done.append(setting._replace(value=before))


def _put_back(done: list[Setting]) -> None:
    for setting in reversed(done):
        try:
            write(setting.directory, setting.name, setting.value)
        except OSError:  # the group is on its way out, or uses more by now: the new limit stands
            continue


def _refused(setting: Setting, error: OSError) -> AmbiError:
    what = f"cannot change the {LIMITS.get(setting.name, setting.name)} to {setting.value}"
    if error.errno == errno.ENOENT:
        controller = setting.name.partition(".")[0]
        return Unsupported(
            f"{what}: controller {controller} is not there for {setting.directory}",
            hint="`ambi doctor` shows which controllers this host has",
        )
    if error.errno == errno.EBUSY:
        return Conflict(f"{what}: more than that is in use now", hint="`ambi stats` shows how much")
    if error.errno in (errno.EINVAL, errno.ERANGE):
        return InvalidRequest(
            f"{what}: the kernel refuses this value in {setting.directory}/{setting.name}",
            hint="it must fit the limits of the groups above, and those that are set already",
        )
    return from_os_error(what, error)
