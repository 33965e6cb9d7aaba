"""Devices that come and go while the machine runs: `plug` and `unplug` of PROTOCOL.md. From the loop's thread."""

from __future__ import annotations

import os
from typing import Any

from ambi.core.errors import Conflict, InvalidRequest
from hyper.vmm.machine import Machine
from hyper.vmm.virtio.blk import Blk
from hyper.vmm.virtio.device import Device
from hyper.vmm.virtio.disk import File
from hyper.vmm.virtio.fs import Fs
from hyper.vmm.virtio.vhost_user import VhostUser


def plug(machine: Machine, request: dict[str, Any], fds: list[int]) -> dict[str, Any]:
    """Raises Conflict, InvalidRequest, OSError; then nothing has been plugged."""
    if len(fds) != 1:
        raise InvalidRequest(f"plug wants one descriptor, not {len(fds)}")
    if not machine.has_room:
        raise Conflict("the virtual machine has no empty slot for one more device")
    device = _made(machine, request, fds[0])
    try:
        return {"slot": machine.plug(device)}
    except BaseException:
        device.close()
        raise


def _made(machine: Machine, request: dict[str, Any], fd: int) -> Device:
    """With a descriptor of its own."""
    kind = request.get("kind")
    if kind == "disk":
        return Blk(File(os.dup(fd), readonly=bool(request.get("readonly"))), str(request.get("serial")))
    if kind == "share":
        memory = machine.share_memory()
        return Fs(str(request.get("tag")), VhostUser(os.dup(fd), memory))
    raise InvalidRequest(f"there are no devices of kind {kind!r:.40} to plug")


def unplug(machine: Machine, request: dict[str, Any]) -> dict[str, Any]:
    """Raises NotFound."""
    slot = request.get("slot")
    if not isinstance(slot, int):
        raise InvalidRequest("unplug wants a slot")
    machine.unplug(slot)
    return {}
