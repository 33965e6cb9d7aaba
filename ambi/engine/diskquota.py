"""`--storage-opt size=10G`: how much a container's writable layer may hold, and how large a VM's disk is.

A container's is a project quota of the data root's file system (ext4 or XFS, mounted with `prjquota`), set on the directory
of its upper before anything is in it. Which project an upper has is asked of the file system, never remembered.
"""

from __future__ import annotations

import os
from pathlib import Path

from ambi.core.errors import InvalidRequest, Unsupported, from_os_error
from ambi.core.model import Isolation
from ambi.core.words import parse_size
from ambi.engine.body import Body
from ambi.linux import quota

_LARGEST = 1 << 60
_FIRST_PROJECT, _PROJECTS = 0x61000000, 1 << 24  # far from those that people choose
SMALLEST_DISK = 32 << 20  # of a VM: its file system wants room for itself


def wanted_bytes(host: Body, isolation: Isolation) -> int:
    """What HostConfig.StorageOpt asks for; 0 for nothing. Raises InvalidRequest, in Docker's words where it has any."""
    options = host.object("StorageOpt").data
    for key, value in options.items():
        if key.lower() != "size":
            raise InvalidRequest(f"Unknown option {key}", hint="--storage-opt size=10G is the only one")
        size = _bytes(value)
        if isolation is Isolation.VM and size < SMALLEST_DISK:
            raise InvalidRequest(
                f"--storage-opt size={value} is too small for the disk of a VM",
                hint=f"at least {SMALLEST_DISK >> 20}m",
            )
        return size
    return 0


def _bytes(text: object) -> int:
    """Raises InvalidRequest for what is no size, and for nothing."""
    size = parse_size(text) if isinstance(text, str) else None
    if size is None:
        raise InvalidRequest(f"invalid size: '{text}'", hint="a number and a unit, for example --storage-opt size=10G")
    if not 0 < size < _LARGEST:
        raise InvalidRequest(f"invalid size: '{text}'", hint="more than nothing, for example --storage-opt size=10G")
    return size


def check(data_root: Path, size_bytes: int) -> None:
    """Raises Unsupported when the file system of the data root cannot hold a container to `size_bytes`."""
    if not size_bytes:
        return
    fd = os.open(data_root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        able = quota.enforced(fd)
    finally:
        os.close(fd)
    if not able:
        raise Unsupported(
            f"--storage-opt is supported only for overlay over xfs or ext4 with 'prjquota' mount option, and {data_root} is"
            " not on such a file system",
            hint="leave it out, use --isolation vm, or put the data root on ext4 (mkfs.ext4 -O quota,project) mounted with"
            " -o prjquota",
        )


def apply(upper: Path, id: str, size_bytes: int) -> None:
    """Hold `upper`, which is empty, to `size_bytes`. Raises an error of the tree; `release` undoes it."""
    fd = os.open(upper, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        number = _free_project(fd, id)
        quota.set_project(fd, number)
        quota.limit(fd, number, size_bytes)
    except OSError as error:
        raise from_os_error(f"cannot limit {upper} to {size_bytes} bytes", error) from error
    finally:
        os.close(fd)


def _free_project(fd: int, id: str) -> int:
    """One that holds nothing and has no limit; ids are random, so two creations at once do not meet."""
    start = int(id[:12], 16)
    for step in range(_PROJECTS):
        number = _FIRST_PROJECT + (start + step) % _PROJECTS
        found = quota.usage(fd, number)
        if not found.limit and not found.used:
            return number
    raise Unsupported("every project of the file system is in use", hint="remove instances: ambi rm")


def release(upper: Path) -> None:
    """Forget the limit of `upper`, which is about to be removed. An upper without one is left as it is."""
    try:
        fd = os.open(upper, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    try:
        number = quota.project(fd)
        if _FIRST_PROJECT <= number < _FIRST_PROJECT + _PROJECTS:
            quota.limit(fd, number, 0)
    except OSError:  # a file system without projects
        pass
    finally:
        os.close(fd)
