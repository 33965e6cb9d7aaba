"""Files as memory of the guest's (virtio 1.2, section 5.19): read without a request, and without a copy in the guest by DAX.

The machine maps the file at `start`, and of several guests all share the host's one copy. The queue is for flushes alone.
"""

from __future__ import annotations

import os
import struct

from hyper.vmm.virtio.device import Device
from hyper.vmm.virtio.queue import Damaged, fill, take

FLUSH = 0
ALIGNMENT = 2 << 20  # of the size that the guest is told


class Pmem(Device):
    """The window [start, start + size). fd: of the file, to flush it; it is owned; -1 for a read-only window."""

    device_id = 27
    name = "pmem"
    queue_sizes = (64,)

    def __init__(self, start: int, size: int, fd: int = -1) -> None:
        super().__init__()
        if start % ALIGNMENT or size % ALIGNMENT or not size:
            raise ValueError(f"a window of {size} bytes at {start:#x}, which are no multiples of {ALIGNMENT}")
        self._window = struct.pack("<QQ", start, size)
        self._fd = fd

    def config(self) -> bytes:
        return self._window

    def notified(self, index: int) -> None:
        queue = self.queues[index]
        assert queue is not None
        for chain in queue.chains():
            kind = int.from_bytes(take(chain.readable, 4), "little")
            if chain.writable_bytes < 4:
                raise Damaged("a flush without room for its result")
            self.counts["requests"] += 1
            queue.push(chain, fill(chain.writable, self._flush(kind).to_bytes(4, "little")))
        queue.signal()

    def _flush(self, kind: int) -> int:
        """0, or 1 when it failed."""
        if kind == FLUSH:
            try:
                if self._fd >= 0:
                    os.fdatasync(self._fd)
                return 0
            except OSError:  # the guest is told, and it is counted
                pass
        self.counts["errors"] += 1
        return 1

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
