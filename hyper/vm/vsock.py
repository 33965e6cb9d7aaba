"""Sockets between a guest and its host (AF_VSOCK): the guest's number there, its CID, which no two VMs of a host share."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import NamedTuple

from ambi.core.errors import Conflict, Unsupported, from_os_error
from ambi.core.plan import LaunchPlan

ANNOTATION = "ambi.vsock"
AUTO = "auto"
DEVICE = "/dev/vhost-vsock"
SET_GUEST_CID = 0x4008AF60  # linux/vhost.h
LOWEST, HIGHEST = 3, 0xFFFF_FFFE
TRIES = 1000


class Vsock(NamedTuple):
    """cid: held by the descriptor, of DEVICE, and by no other VM."""

    cid: int
    fd: int


def wanted(plan: LaunchPlan) -> str:
    """AUTO, a number, or "" for none."""
    return str((plan.config.get("annotations") or {}).get(ANNOTATION) or "")


def problem(plan: LaunchPlan) -> str:
    """What is wrong with the annotation, "" for nothing."""
    text = wanted(plan)
    if not text or text == AUTO or (text.isdecimal() and LOWEST <= int(text) <= HIGHEST):
        return ""
    return f"annotation {ANNOTATION}: {text} is neither {AUTO} nor a number from {LOWEST} to {HIGHEST}"


def take(plan: LaunchPlan) -> Vsock | None:
    """What the plan asks for. The descriptor is the caller's. Raises Unsupported (no DEVICE), Conflict (CID taken)."""
    text = wanted(plan)
    if not text:
        return None
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise Unsupported(f"{ANNOTATION}: this host has no {DEVICE}", hint="modprobe vhost_vsock") from error
    except OSError as error:
        raise from_os_error(f"{ANNOTATION}: cannot open {DEVICE}", error) from error
    try:
        return Vsock(_set(fd, plan, text), fd)
    except BaseException:
        os.close(fd)
        raise


def _set(fd: int, plan: LaunchPlan, text: str) -> int:
    """A chosen one follows from the instance's id, so that it mostly has the same at each start."""
    span = HIGHEST - LOWEST + 1
    first = int(text) if text != AUTO else LOWEST + int(plan.id[:8], 16) % span
    for step in range(TRIES if text == AUTO else 1):
        cid = LOWEST + (first - LOWEST + step) % span
        try:
            fcntl.ioctl(fd, SET_GUEST_CID, struct.pack("=Q", cid))
            return cid
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise from_os_error(f"{ANNOTATION}: cannot use number {cid}", error) from error
    raise Conflict(
        f"{ANNOTATION}: another VM of this host has the number {first}", hint=f"{ANNOTATION}={AUTO} finds a free one"
    )
