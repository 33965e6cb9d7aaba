"""Block I/O of a group: OCI's `blockIO` as lines for control files.

Weights are of a scheduler: of bfq in both versions, of CFQ (before Linux 5.0) in version 1, of io.cost in version 2. A
kernel may have none, or two that both take them. Limits of single devices are always there with the controller; the kernel
has them for whole disks, not for partitions.

Documentation/admin-guide/cgroup-v1/blkio-controller.rst, cgroup-v2.rst, block/bfq-iosched.rst
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import Any

from ambi.core.errors import InvalidRequest, Unsupported
from runtime.cgroups.change import Setting
from runtime.cgroups.hierarchies import write

THROTTLES = {  # member of blockIO: file of version 1, key of io.max
    "throttleReadBpsDevice": ("blkio.throttle.read_bps_device", "rbps"),
    "throttleWriteBpsDevice": ("blkio.throttle.write_bps_device", "wbps"),
    "throttleReadIOPSDevice": ("blkio.throttle.read_iops_device", "riops"),
    "throttleWriteIOPSDevice": ("blkio.throttle.write_iops_device", "wiops"),
}


def check(block: dict[str, Any]) -> None:
    """Raises KeyError, TypeError for entries that are no entries."""
    numbers = [block.get("weight") or 0]
    numbers += [entry[key] for entry in block.get("weightDevice") or () for key in ("major", "minor", "weight")]
    numbers += [entry[key] for name in THROTTLES for entry in block.get(name) or () for key in ("major", "minor", "rate")]
    for number in numbers:
        if not isinstance(number, int):
            raise TypeError(f"{number!r} of blockIO is no number")


def v1(directory: str, block: dict[str, Any]) -> list[Setting]:
    """For the group at `directory` of the blkio hierarchy. Raises Unsupported for weights that this kernel does not have."""
    found = list(_weights(directory, block, ("blkio.weight", "blkio.bfq.weight"), "_device"))
    for member, (name, _) in THROTTLES.items():
        found += [Setting(directory, name, f"{_number(e)} {e['rate']}") for e in block.get(member) or ()]
    return found


def v2(directory: str, block: dict[str, Any]) -> list[Setting]:
    """The same in the unified hierarchy."""
    found = list(_weights(directory, block, ("io.bfq.weight", "io.weight"), ""))
    for member, (_, key) in THROTTLES.items():
        found += [Setting(directory, "io.max", f"{_number(e)} {key}={e['rate']}") for e in block.get(member) or ()]
    return found


def _weights(directory: str, block: dict[str, Any], names: tuple[str, ...], suffix: str) -> Iterator[Setting]:
    """suffix: of the file for single devices."""
    weight, devices = block.get("weight") or 0, block.get("weightDevice") or []
    if not weight and not devices:
        return
    there = [name for name in names if os.path.exists(f"{directory}/{name}")]
    if not there:
        raise Unsupported(
            f"cannot set the block I/O weight: this kernel has none for {directory}",
            hint="leave --blkio-weight out, or have the scheduler bfq: modprobe bfq",
        )
    for name in there:
        scale = _of_io_cost if name == "io.weight" else str
        if weight:
            yield Setting(directory, name, scale(weight))
        for entry in devices:
            yield Setting(directory, name + suffix, f"{_number(entry)} {scale(entry['weight'])}")


def _of_io_cost(weight: int) -> str:
    """10 to 1000 as 1 to 10000 (runc's and crun's formula)."""
    return str(1 + (weight - 10) * 9999 // 990)


def _number(entry: dict[str, Any]) -> str:
    return f"{entry['major']}:{entry['minor']}"


def apply(settings: list[Setting]) -> None:
    """Write them into a new group. Raises Unsupported, InvalidRequest naming the device."""
    for setting in settings:
        try:
            write(setting.directory, setting.name, setting.value)
        except FileNotFoundError:
            controller = setting.name.partition(".")[0]
            raise Unsupported(
                f"cannot limit block I/O: controller {controller} is not there for {setting.directory}",
                hint="`ambi doctor` shows which controllers this host has",
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENODEV, errno.EINVAL, errno.EOPNOTSUPP):
                raise
            raise InvalidRequest(
                f"cannot limit block I/O: {setting.name} refuses '{setting.value}': {os.strerror(error.errno).lower()}",
                hint="name a whole disk, not a partition of it; its scheduler must be bfq to have a weight of its own",
            ) from None
