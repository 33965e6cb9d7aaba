"""Random numbers of the host's (virtio 1.2, section 5.4): the driver offers room, and it is filled."""

from __future__ import annotations

import os

from hyper.vmm.virtio.device import Device
from hyper.vmm.virtio.queue import Damaged, fill

MOST = 4096  # of one request: a driver asks again


class Rng(Device):
    device_id = 4
    name = "rng"
    queue_sizes = (16,)

    def notified(self, index: int) -> None:
        queue = self.queues[index]
        assert queue is not None
        for chain in queue.chains():
            if not chain.writable or chain.readable:
                raise Damaged("a request for random numbers that has something to read, or no room")
            written = fill(chain.writable, os.urandom(min(MOST, chain.writable_bytes)))
            queue.push(chain, written)
            self.counts["requests"] += 1
            self.counts["bytes"] += written
        queue.signal()
