"""Back-ends in the host's kernel (linux/vhost.h): it serves the queues, and no request of theirs is seen here.

A back-end gets the guest's memory, the addresses of the rings in this process, the eventfd that the guest's notification
signals, and the one that raises its interrupt. A ring that is damaged it reports by another eventfd, and serves no more.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Mapping

from ambi.core.loop import POLLIN
from hyper.vmm.memory import GuestMemory
from hyper.vmm.virtio.device import Port
from hyper.vmm.virtio.queue import Damaged, Queue

GET_FEATURES, SET_FEATURES = 0x8008AF00, 0x4008AF00
SET_OWNER, SET_MEM_TABLE = 0xAF01, 0x4008AF03
SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE = 0x4008AF10, 0x4028AF11, 0x4008AF12
GET_VRING_BASE = 0xC008AF12
SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR = 0x4008AF20, 0x4008AF21, 0x4008AF22

_U64 = struct.Struct("=Q")
_STATE = struct.Struct("=II")  # struct vhost_vring_state: index, number
_FILE = struct.Struct("=Ii")  # struct vhost_vring_file: index, fd
_ADDRESSES = struct.Struct("=IIQQQQ")  # struct vhost_vring_addr: index, flags, descriptors, used, available, log
_REGION = struct.Struct("=QQQQ")  # struct vhost_memory_region: gpa, bytes, address, 0


class Vhost:
    """A back-end by its descriptor, which it owns. The process that makes it is the one whose memory it uses.

    Raises OSError when it is no vhost device, or has an owner already.
    """

    __slots__ = ("_error", "_memory", "_port", "_queues", "fd", "features")

    def __init__(self, fd: int) -> None:
        fcntl.ioctl(fd, SET_OWNER)
        self.features = _U64.unpack(fcntl.ioctl(fd, GET_FEATURES, bytes(8)))[0]
        self.fd = fd
        self._error = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._queues: dict[int, Queue] = {}  # those that it serves, by its own numbers
        self._port: Port | None = None

    def start(self, port: Port, features: int, queues: Mapping[int, Queue], first: int = 0) -> None:
        """Hand over `queues`, by their numbers at the device; the back-end counts from `first`. What begins the work is the
        kind's own: see Net and Vsock. Raises OSError."""
        fcntl.ioctl(self.fd, SET_FEATURES, _U64.pack(features & self.features))
        self._set_memory(port.memory)
        self._port = port
        for number, queue in queues.items():
            index = number - first
            self._set_queue(index, queue, port.memory)
            fcntl.ioctl(self.fd, SET_VRING_KICK, _FILE.pack(index, port.kick_fd(number)))
            fcntl.ioctl(self.fd, SET_VRING_CALL, _FILE.pack(index, port.call_fd()))
            fcntl.ioctl(self.fd, SET_VRING_ERR, _FILE.pack(index, self._error))
            self._queues[index] = queue
        port.watch(self._error, POLLIN, self._failed)

    def memory_changed(self) -> None:
        """While it serves queues, too. Raises OSError."""
        if self._port is not None:
            self._set_memory(self._port.memory)

    def _set_memory(self, memory: GuestMemory) -> None:
        regions = memory.regions
        table = struct.pack("=II", len(regions), 0)
        for region in regions:
            table += _REGION.pack(region.gpa, region.end - region.gpa, region.memory.address, 0)
        fcntl.ioctl(self.fd, SET_MEM_TABLE, table)

    def _set_queue(self, index: int, queue: Queue, memory: GuestMemory) -> None:
        descriptors, driver, device = queue.addresses
        fcntl.ioctl(self.fd, SET_VRING_NUM, _STATE.pack(index, queue.size))
        fcntl.ioctl(self.fd, SET_VRING_BASE, _STATE.pack(index, queue.save()["next"]))
        addresses = _ADDRESSES.pack(
            index, 0,
            memory.address(descriptors, 16 * queue.size),
            memory.address(device, 6 + 8 * queue.size),
            memory.address(driver, 6 + 2 * queue.size),
            0,
        )  # fmt: skip
        fcntl.ioctl(self.fd, SET_VRING_ADDR, addresses)

    def _failed(self, _: int) -> None:
        os.eventfd_read(self._error)
        raise Damaged("a queue that the kernel's back-end found damaged")

    def stop(self) -> None:
        """Take the queues back, at the index where the back-end stopped; its own work must have ended before. Idempotent."""
        for index, queue in self._queues.items():
            state = fcntl.ioctl(self.fd, GET_VRING_BASE, _STATE.pack(index, 0))
            queue.continue_at(_STATE.unpack(state)[1])
            for request in (SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR):
                fcntl.ioctl(self.fd, request, _FILE.pack(index, -1))
        self._queues = {}
        if self._port is not None:
            self._port.unwatch(self._error)
            self._port = None

    def close(self) -> None:
        """Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            os.close(self._error)
            self.fd = -1
