"""The virtio devices of a machine, in the order of their slots."""

from __future__ import annotations

from hyper.guest.protocol import PORT_NAME
from hyper.vmm.config import Config
from hyper.vmm.virtio.console import Console
from hyper.vmm.virtio.device import Device


def build(config: Config) -> list[Device]:
    """Takes over the descriptors that they need."""
    return [Console(config.agent if config.agent >= 0 else None, PORT_NAME)]
