"""File trees (virtio 1.2, section 5.11): a virtiofsd serves the queues, and nothing of theirs is seen here.

queues      0 what must not wait, 1 requests
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from hyper.vmm.virtio.device import Device
from hyper.vmm.virtio.queue import Damaged, Queue
from hyper.vmm.virtio.vhost_user import VhostUser

TAG_BYTES = 36


class Fs(Device):
    """The tree that the guest mounts by `tag`. backend: None when it comes by `attach`, before the driver. It is owned."""

    device_id = 26
    name = "fs"
    queue_sizes = (128, 128)

    def __init__(self, tag: str, backend: VhostUser | None = None) -> None:
        super().__init__()
        self._tag = tag.encode()
        if not 0 < len(self._tag) <= TAG_BYTES:
            raise ValueError(f"a tag of {len(self._tag)} bytes where {TAG_BYTES} are most")
        self._backend = backend
        self._features = 0
        self.counts = {}

    def config(self) -> bytes:
        return struct.pack("<36sI", self._tag, 1)

    def attach(self, backend: VhostUser) -> None:
        """Put a server behind it, in place of one that there may be. Through Transport.run. Raises OSError."""
        old, self._backend = self._backend, backend
        if old is not None:
            old.close()
        if self.queues:
            self.resume()

    def activate(self, queues: Sequence[Queue | None], features: int) -> None:
        super().activate(queues, features)
        self._features = features
        self.resume()

    def resume(self) -> None:
        if self._backend is None:
            raise Damaged("a driver for a file system that has no server yet")
        used = {index: queue for index, queue in enumerate(self.queues) if queue is not None}
        self._backend.stop()
        self._backend.start(self.port, self._features, used)

    def memory_changed(self) -> None:
        if self._backend is not None:
            self._backend.memory_changed()

    def drain(self) -> None:
        if self._backend is not None:
            self._backend.stop()

    def reset(self) -> None:
        super().reset()
        if self._backend is not None:
            try:
                self._backend.stop()
            except OSError:  # it has ended, or does so when it reads the end of its socket; it gets no other queue
                self._backend.close()

    def close(self) -> None:
        if self._backend is not None:
            self._backend.close()
