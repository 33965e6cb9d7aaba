"""Where a container's control group is, and its limits of block I/O: HostConfig into `linux.cgroupsPath` and `blockIO`."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from typing import Any

from ambi.core.errors import InvalidRequest
from ambi.core.model import InstanceId
from ambi.engine.body import Body

OWN = "/ambi"  # the group of all that have no other parent
_THROTTLES = {  # HostConfig: Docker's flag, member of `blockIO`
    "BlkioDeviceReadBps": ("--device-read-bps", "throttleReadBpsDevice"),
    "BlkioDeviceWriteBps": ("--device-write-bps", "throttleWriteBpsDevice"),
    "BlkioDeviceReadIOps": ("--device-read-iops", "throttleReadIOPSDevice"),
    "BlkioDeviceWriteIOps": ("--device-write-iops", "throttleWriteIOPSDevice"),
}
_LEAST_WEIGHT, _MOST_WEIGHT = 10, 1000


def path(host: Body, instance: InstanceId) -> str:
    """The group of `instance`: below `--cgroup-parent`, which is a path from the root of each hierarchy and is made if it is
    missing. Raises InvalidRequest."""
    asked = host.text("CgroupParent")
    parts = [part for part in asked.split("/") if part not in ("", ".")]
    if not asked:
        return f"{OWN}/{instance}"
    if ".." in parts or any(len(part) > 255 or not part.isprintable() for part in parts):
        raise InvalidRequest(f"invalid --cgroup-parent '{asked}'", hint="a path of groups, as --cgroup-parent /jobs/a")
    if parts[:1] == [OWN[1:]] and len(parts) > 1:
        raise InvalidRequest(
            f"invalid --cgroup-parent '{asked}': the groups below {OWN} end with their instances", hint="choose another one"
        )
    return "/".join(("", *parts, instance))


def block_io(host: Body) -> dict[str, Any]:
    """The `linux.resources.blockIO` member, {} without limits. Raises InvalidRequest, also for a path that is no block
    device."""
    found: dict[str, Any] = {}
    if weight := host.number("BlkioWeight"):
        found["weight"] = _weight(weight, "--blkio-weight")
    flag = "--blkio-weight-device"
    devices = [{**number, "weight": _weight(entry.number("Weight"), flag)} for entry, number in _devices(host, flag)]
    if devices:
        found["weightDevice"] = devices
    for key, (flag, member) in _THROTTLES.items():
        limits = []
        for entry, number in _devices(host, flag, key):
            rate = entry.number("Rate")
            if rate <= 0:
                raise InvalidRequest(f"{flag} {entry.text('Path')}:{rate}: a rate is above 0", hint=f"{flag} /dev/sda:1mb")
            limits.append({**number, "rate": rate})
        if limits:
            found[member] = limits
    return found


def _weight(weight: int, flag: str) -> int:
    if not _LEAST_WEIGHT <= weight <= _MOST_WEIGHT:
        raise InvalidRequest(
            f"Range of blkio weight is from {_LEAST_WEIGHT} to {_MOST_WEIGHT}", hint=f"{flag} takes such a number"
        )
    return weight


def _devices(host: Body, flag: str, key: str = "BlkioWeightDevice") -> Iterator[tuple[Body, dict[str, int]]]:
    """Each entry, and the numbers of its device."""
    for entry in host.objects(key):
        name = entry.text("Path")
        try:
            about = os.stat(name)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InvalidRequest(f"{flag} {name}: {reason.lower()}", hint="`lsblk -p` lists the block devices") from error
        if not stat.S_ISBLK(about.st_mode):
            raise InvalidRequest(f"{flag} {name}: not a block device", hint="`lsblk -p` lists the block devices")
        yield entry, {"major": os.major(about.st_rdev), "minor": os.minor(about.st_rdev)}
