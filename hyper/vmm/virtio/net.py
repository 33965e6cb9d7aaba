"""NICs (virtio 1.2, section 5.1): frames between a tap and the guest, by the kernel's back-end or by hand.

With vhost the kernel moves the frames and this module the control alone. Without it a frame goes by one readv or writev
straight into or out of guest memory, checksums and segments of 64 KiB unfinished as they are.

    queues      0 to the guest, 1 from the guest
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Sequence

from ambi.core.loop import POLLIN
from hyper.vmm.virtio.device import Device
from hyper.vmm.virtio.queue import Chain, Damaged, Queue, fill
from hyper.vmm.virtio.registers import RING_FEATURES
from hyper.vmm.virtio.tap import HEADER_BYTES, Tap
from hyper.vmm.virtio.vhost import Vhost

F_CSUM, F_GUEST_CSUM, F_MAC = 1 << 0, 1 << 1, 1 << 5
F_GUEST_TSO4, F_GUEST_TSO6, F_GUEST_ECN = 1 << 7, 1 << 8, 1 << 9
F_HOST_TSO4, F_HOST_TSO6, F_HOST_ECN = 1 << 11, 1 << 12, 1 << 13
F_MRG_RXBUF = 1 << 15
OFFLOADS = F_CSUM | F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_ECN | F_HOST_TSO4 | F_HOST_TSO6 | F_HOST_ECN

RECEIVE, TRANSMIT = 0, 1
MAX_FRAME = HEADER_BYTES + 65535 + 14 + 4  # the largest segment, with an Ethernet header and a VLAN's
BATCH = 64  # frames of one turn
MAX_PIECES = 1024  # IOV_MAX
VHOST_NET_SET_BACKEND = 0x4008AF30

_CONFIG = struct.Struct("<6sHHH")  # mac, status, most pairs of queues, mtu
_FILE = struct.Struct("=Ii")


class Net(Device):
    """A NIC with `mac` on `tap`, by `vhost` where there is one; without a tap it waits for `attach`. It owns both."""

    device_id = 1
    name = "net"
    queue_sizes = (256, 256)

    def __init__(self, tap: Tap | None, mac: bytes, vhost: Vhost | None = None) -> None:
        super().__init__()
        self._tap = tap
        self._mac = mac
        self._vhost = vhost
        backend = RING_FEATURES | F_MRG_RXBUF
        # There is no link status to ask for: Linux would have the carrier off at first, and on only after it has asked.
        self.features = F_MAC | OFFLOADS | (backend & vhost.features if vhost else backend)
        self._active = False
        self._features = 0
        self._running = False  # vhost has the tap
        self._hand = ByHand(self)

    def config(self) -> bytes:
        return _CONFIG.pack(self._mac, 0, 1, 0)

    def attach(self, tap: Tap, vhost: Vhost | None = None) -> None:
        """Put it on `tap`, as a machine from a template needs that has come up without. Through Transport.run.

        Raises ValueError when it has one, or when `vhost` lacks what the driver was promised.
        """
        if self._tap is not None or (vhost and self.features & (RING_FEATURES | F_MRG_RXBUF) & ~vhost.features):
            raise ValueError("a NIC that has a tap, or a back-end that does less than the NIC")
        self._tap, self._vhost = tap, vhost
        if self._active:
            self._hand.stop()
            self._offload(tap)
            self.resume()

    def activate(self, queues: Sequence[Queue | None], features: int) -> None:
        super().activate(queues, features)
        self._features = features
        self._active = True
        if self._tap is not None:
            self._offload(self._tap)
        self.resume()

    def _offload(self, tap: Tap) -> None:
        features = self._features
        tap.offload(
            checksum=bool(features & F_GUEST_CSUM),
            tso4=bool(features & F_GUEST_TSO4),
            tso6=bool(features & F_GUEST_TSO6),
            ecn=bool(features & F_GUEST_ECN),
        )

    def notified(self, index: int) -> None:
        if self._vhost is None:
            self._hand.notified(index)

    def resume(self) -> None:
        receive, transmit = self.queues
        if receive is None or transmit is None:
            raise Damaged("a NIC with one of its queues alone")
        if self._vhost is None or self._tap is None:
            self._hand.start(receive, transmit, self._tap, mergeable=bool(self._features & F_MRG_RXBUF))
            return
        self.drain()
        self._vhost.start(self.port, self._features, {RECEIVE: receive, TRANSMIT: transmit})
        self._running = True
        self._set_backend(self._tap.fd)

    def _set_backend(self, fd: int) -> None:
        assert self._vhost is not None
        for index in (RECEIVE, TRANSMIT):
            fcntl.ioctl(self._vhost.fd, VHOST_NET_SET_BACKEND, _FILE.pack(index, fd))

    def drain(self) -> None:
        if self._vhost is None:
            self._hand.stop()
            return
        if self._running:
            self._running = False
            self._set_backend(-1)
        self._vhost.stop()

    def memory_changed(self) -> None:
        if self._vhost is not None:
            self._vhost.memory_changed()

    def reset(self) -> None:
        self._active = False
        self.drain()
        super().reset()

    def close(self) -> None:
        if self._vhost is not None:
            self._vhost.close()
        if self._tap is not None:
            self._tap.close()


class ByHand:
    """The queues of a NIC without vhost. Without a tap either, what the guest sends is lost."""

    __slots__ = ("_chains", "_device", "_fd", "_mergeable", "_receive", "_room", "_transmit", "_waiting", "_watched")

    def __init__(self, device: Device) -> None:
        self._device = device
        self._fd = -1  # of the tap
        self._receive: Queue | None = None
        self._transmit: Queue | None = None
        self._mergeable = False
        self._watched = False
        self._chains: list[Chain] = []  # receive buffers in hand
        self._room = 0  # bytes of them
        self._waiting = b""  # a frame for which there was too little of that

    def start(self, receive: Queue, transmit: Queue, tap: Tap | None, *, mergeable: bool) -> None:
        self._receive, self._transmit, self._mergeable = receive, transmit, mergeable
        self._fd = -1 if tap is None else tap.fd
        self._watch()

    def stop(self) -> None:
        """Give the receive buffers back. A frame that waits for some is lost, as frames may be."""
        if self._receive is not None:
            self._receive.unpop(len(self._chains))
        self._receive = self._transmit = None
        self._chains, self._room, self._waiting = [], 0, b""
        self._unwatch()

    def notified(self, index: int) -> None:
        if index == TRANSMIT:
            self._send()
        elif not self._watched:
            self._watch()

    def _watch(self) -> None:
        if self._fd >= 0:
            self._watched = True
            self._device.port.watch(self._fd, POLLIN, self._receive_some)

    def _unwatch(self) -> None:
        if self._watched:
            self._watched = False
            self._device.port.unwatch(self._fd)

    def _send(self) -> None:
        queue, counts = self._transmit, self._device.counts
        assert queue is not None
        for chain in queue.chains():
            size = chain.readable_bytes
            if size < HEADER_BYTES:
                raise Damaged(f"a frame of {size} bytes, which is less than its header")
            try:
                if size > MAX_FRAME or len(chain.readable) > MAX_PIECES:
                    counts["errors"] += 1
                else:
                    os.writev(self._fd, chain.readable)
                    counts["bytes"] += size - HEADER_BYTES
            except OSError:  # the tap is down or full, or the header nonsense: as on a wire, the frame is lost
                counts["errors"] += 1
            counts["requests"] += 1
            queue.push(chain, 0)
        queue.signal()

    def _receive_some(self, _: int) -> None:
        queue = self._receive
        assert queue is not None
        for _ in range(BATCH):
            if not self._next_frame(queue):
                break
        queue.signal()

    def _next_frame(self, queue: Queue) -> bool:
        """Give the driver one frame; False when there is none, or no room for it."""
        self._gather(queue)
        if not self._chains or (self._waiting and self._room < len(self._waiting)):
            if not queue.arm():
                self._unwatch()  # until the driver notifies
                return False
            return True
        try:
            if self._waiting or self._room < MAX_FRAME:
                return self._by_copy()
            size = os.readv(self._fd, self._pieces())
        except BlockingIOError:
            return False
        except OSError:  # the tap has lost its namespace
            self._device.counts["errors"] += 1
            self._unwatch()
            return False
        self._deliver(queue, size)
        return True

    def _gather(self, queue: Queue) -> None:
        """Have receive buffers in hand for the largest frame, if the driver has offered so many."""
        pieces = sum(len(chain.writable) for chain in self._chains)
        while not self._chains or (self._mergeable and self._room < MAX_FRAME):
            chain = queue.pop()
            if chain is None:
                return
            pieces += len(chain.writable)
            if chain.writable_bytes < HEADER_BYTES or pieces > MAX_PIECES:
                raise Damaged("receive buffers of a NIC that are too small")
            self._chains.append(chain)
            self._room += chain.writable_bytes

    def _pieces(self) -> list[memoryview]:
        return [piece for chain in self._chains for piece in chain.writable]

    def _by_copy(self) -> bool:
        """As `_next_frame`, where the buffers in hand might be too small: what does not fit waits for more of them."""
        queue = self._receive
        assert queue is not None
        frame = self._waiting or os.read(self._fd, MAX_FRAME)
        if len(frame) > self._room and (not self._mergeable or len(self._chains) >= queue.size):
            self._device.counts["errors"] += 1
            self._waiting = b""
            return True
        self._waiting = frame
        if len(frame) <= self._room:
            self._waiting = b""
            fill(self._pieces(), frame)
            self._deliver(queue, len(frame))
        return True

    def _deliver(self, queue: Queue, size: int) -> None:
        """Push the buffers that the frame of `size` bytes is in."""
        self._device.counts["requests"] += 1
        self._device.counts["bytes"] += size - HEADER_BYTES
        used = 0
        left = size
        while left > 0:
            left -= self._chains[used].writable_bytes
            used += 1
        _put_count(self._chains[0].writable, used)
        for chain in self._chains[:used]:
            queue.push(chain, min(size, chain.writable_bytes))
            size -= chain.writable_bytes
            self._room -= chain.writable_bytes
        del self._chains[:used]


def _put_count(pieces: Sequence[memoryview], count: int) -> None:
    """num_buffers, bytes 10 and 11 of the header, wherever in `pieces` they are."""
    at = 0
    for piece in pieces:
        for offset, byte in ((10, count & 0xFF), (11, count >> 8)):
            if at <= offset < at + len(piece):
                piece[offset - at] = byte
        at += len(piece)
        if at > 11:
            return
