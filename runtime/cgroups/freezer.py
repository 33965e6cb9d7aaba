"""Stopping every process of a group at once, and letting them go on.

Version 1 (Documentation/admin-guide/cgroup-v1/freezer-subsystem.rst): FREEZING may have to be written again until the last
task is caught; a frozen task takes no signal, not even SIGKILL, before it is thawed. Version 2: `cgroup.freeze` is a wish,
and `frozen` of `cgroup.events` tells when it has come true; a frozen task can be killed.
"""

from __future__ import annotations

import time

from ambi.core.deadline import Deadline
from ambi.core.errors import DeadlineExceeded, from_os_error
from runtime.cgroups.hierarchies import read, read_table, write

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.0005, 0.05


def freeze_v1(directory: str, by: Deadline) -> None:
    """Returns when nothing of the group runs. Raises DeadlineExceeded; the group is thawed then."""
    _freeze(directory, "freezer.state", ("FROZEN", "THAWED"), by)


def thaw_v1(directory: str) -> None:
    """A group that is not frozen or is gone is no error."""
    try:
        write(directory, "freezer.state", "THAWED")
    except FileNotFoundError:
        pass


def freeze_v2(directory: str, by: Deadline) -> None:
    """As `freeze_v1`."""
    _freeze(directory, "cgroup.freeze", ("1", "0"), by)


def thaw_v2(directory: str) -> None:
    try:
        write(directory, "cgroup.freeze", "0")
    except FileNotFoundError:
        pass


def _freeze(directory: str, name: str, words: tuple[str, str], by: Deadline) -> None:
    frozen, thawed = words
    pause = _FIRST_PAUSE_S
    try:
        while True:
            write(directory, name, frozen)
            if _is_frozen(directory, name):
                return
            if by.expired():
                write(directory, name, thawed)
                raise DeadlineExceeded(
                    f"cgroup {directory} did not freeze in time: a process in it sleeps where it cannot be interrupted",
                    hint=f"ps -o pid,stat,wchan,args -p $(paste -sd, {directory}/cgroup.procs)",
                )
            time.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE_S)
    except OSError as error:
        raise from_os_error("cannot pause", error) from error


def _is_frozen(directory: str, name: str) -> bool:
    if name == "freezer.state":
        return read(directory, name).strip() == "FROZEN"
    return read_table(directory, "cgroup.events").get("frozen") == 1
