"""Sockets between guest and host (virtio 1.2, section 5.10): the kernel serves the data, we tell the guest of a restore.

queues      0 to the guest, 1 from the guest, 2 events to the guest: u32 0, all connections are gone
"""

from __future__ import annotations

import fcntl
import struct
from collections.abc import Sequence

from hyper.vmm.virtio.device import Device, State
from hyper.vmm.virtio.queue import Damaged, Queue, fill
from hyper.vmm.virtio.registers import RING_FEATURES
from hyper.vmm.virtio.vhost import Vhost

SET_GUEST_CID, SET_RUNNING = 0x4008AF60, 0x4004AF61
RECEIVE, TRANSMIT, EVENTS = 0, 1, 2
TRANSPORT_RESET = bytes(4)


class Vsock(Device):
    """The guest with number `cid` on this host. vhost: of /dev/vhost-vsock, which is owned. Raises OSError (cid in use)."""

    device_id = 19
    name = "vsock"
    queue_sizes = (128, 128, 128)

    def __init__(self, vhost: Vhost, cid: int) -> None:
        super().__init__()
        self._vhost = vhost
        self._cid = cid
        self._running = False
        self._features = 0
        self._to_tell = False  # the guest has connections of another life
        self.features = RING_FEATURES & vhost.features
        fcntl.ioctl(vhost.fd, SET_GUEST_CID, struct.pack("=Q", cid))

    def config(self) -> bytes:
        return struct.pack("<Q", self._cid)

    def activate(self, queues: Sequence[Queue | None], features: int) -> None:
        super().activate(queues, features)
        self._features = features
        self.resume()

    def notified(self, index: int) -> None:
        if index == EVENTS and self._to_tell:
            self._tell()

    def resume(self) -> None:
        receive, transmit = self.queues[RECEIVE], self.queues[TRANSMIT]
        if receive is None or transmit is None:
            raise Damaged("a vsock with one of its queues alone")
        self.drain()
        self._vhost.start(self.port, self._features, {RECEIVE: receive, TRANSMIT: transmit})
        self._run(1)
        if self._to_tell:
            self._tell()

    def _run(self, running: int) -> None:
        fcntl.ioctl(self._vhost.fd, SET_RUNNING, struct.pack("=i", running))
        self._running = bool(running)

    def _tell(self) -> None:
        queue = self.queues[EVENTS]
        chain = queue.pop() if queue is not None else None
        if queue is not None and chain is not None:
            queue.push(chain, fill(chain.writable, TRANSPORT_RESET))
            queue.signal()
            self._to_tell = False

    def memory_changed(self) -> None:
        self._vhost.memory_changed()

    def drain(self) -> None:
        if self._running:
            self._run(0)
        self._vhost.stop()

    def reset(self) -> None:
        self.drain()
        super().reset()

    def restore(self, state: State) -> None:
        self._to_tell = True

    def close(self) -> None:
        self._vhost.close()
