"""The agent's channel: a named port of a virtio console (virtio 1.2, section 5.3) joined to a stream socket.

There is one port, number 1; port 0, which would be a terminal, is not there. Bytes go between the socket and guest memory
without a copy. Whoever does not read stops the other: without receive buffers, or before the guest has opened the port, the
socket is not read; while the socket is full a buffer of the guest's stays in use, and its writer waits.

    queues      0, 1 of port 0 (idle), 2 control to the driver, 3 control from it, 4 to the guest, 5 from the guest
    control     u32 port, u16 event, u16 value; after PORT_NAME the name
"""

from __future__ import annotations

import os
import struct
from collections import deque
from collections.abc import Sequence

from ambi.core.loop import POLLHUP, POLLIN, POLLOUT
from hyper.vmm.virtio.device import Device, State
from hyper.vmm.virtio.queue import Chain, Damaged, Queue, advance, fill, take
from hyper.vmm.virtio.registers import RING_FEATURES

F_MULTIPORT = 1 << 1
PORT = 1
TO_DRIVER, FROM_DRIVER, TO_GUEST, FROM_GUEST = 2, 3, 4, 5
# Events of struct virtio_console_control
DEVICE_READY, PORT_ADD, PORT_READY, PORT_OPEN, PORT_NAME = 0, 1, 3, 6, 7

MAX_WAITING = 64  # control messages that a driver asks for and does not take
MAX_WRITE = 1 << 20  # of one request; Linux makes them of 32 KiB
BATCH = 16  # receive buffers that one read fills
MAX_PIECES = 256  # of one call; the kernel takes 1024

_CONFIG = struct.Struct("<HHII")  # columns, rows, ports, emergency write
_CONTROL = struct.Struct("<IHH")


class Console(Device):
    """sock: a connected stream socket of the host's side, or None for none yet. It is owned, and made non-blocking."""

    device_id = 3
    name = "console"
    features = RING_FEATURES | F_MULTIPORT
    queue_sizes = (16, 16, 32, 32, 64, 64)

    def __init__(self, sock: int | None, port_name: str) -> None:
        super().__init__()
        self._name = port_name.encode()
        self._sock: int | None = None
        self._events = 0  # that the socket is watched for
        self._waiting: deque[bytes] = deque()  # control messages
        self._sending: Chain | None = None  # a request of the guest's that the socket did not take whole
        self._held = b""  # what was left of it when the machine was saved
        self._active = False
        self._known = False  # the driver asked for the port
        self._open = False  # the guest has the port open
        if sock is not None:
            self._take_socket(sock)

    def config(self) -> bytes:
        return _CONFIG.pack(0, 0, PORT + 1, 0)

    def connect(self, sock: int) -> None:
        """Join the port to another socket, in place of one that there may be. Through Transport.run."""
        self.disconnect()
        self._take_socket(sock)
        if self._known:
            self._tell(PORT_OPEN, 1)
        self._watch()

    def disconnect(self) -> None:
        """Close the socket: the guest reads an end of file. Through Transport.run."""
        if self._sock is None:
            return
        self._unwatch()
        os.close(self._sock)
        self._sock = None
        self._held = b""
        if self._known:
            self._tell(PORT_OPEN, 0)
        self._send()  # what waited for the socket is lost, and its writer goes on

    def _take_socket(self, sock: int) -> None:
        os.set_blocking(sock, False)
        self._sock = sock

    # The driver

    def activate(self, queues: Sequence[Queue | None], features: int) -> None:
        super().activate(queues, features)
        self._active = True
        self._watch()

    def notified(self, index: int) -> None:
        if index == FROM_DRIVER:
            self._read_control()
        elif index == TO_DRIVER:
            self._write_control()
        elif index == TO_GUEST:
            self._watch(reading=True)
        elif index == FROM_GUEST and self._sending is None and not self._held:
            self._send()

    def reset(self) -> None:
        super().reset()
        self._unwatch()
        self._waiting.clear()
        self._sending = None
        self._active = self._known = self._open = False

    def _queue(self, index: int) -> Queue | None:
        return self.queues[index] if self._active else None

    # Control messages

    def _read_control(self) -> None:
        queue = self._queue(FROM_DRIVER)
        assert queue is not None
        for chain in queue.chains():
            port, event, value = _CONTROL.unpack(take(chain.readable, _CONTROL.size))
            queue.push(chain, 0)
            self._control(port, event, value)
        queue.signal()

    def _control(self, port: int, event: int, value: int) -> None:
        if event == DEVICE_READY and value:
            self._tell(PORT_ADD, 1)
        elif port != PORT:
            self.counts["errors"] += 1
        elif event == PORT_READY and value:
            self._known = True
            self._tell(PORT_NAME, 1, self._name)
            self._tell(PORT_OPEN, int(self._sock is not None))
        elif event == PORT_OPEN:
            self._open = bool(value)
            self._watch(reading=self._open)

    def _tell(self, event: int, value: int, more: bytes = b"") -> None:
        if len(self._waiting) >= MAX_WAITING:
            raise Damaged(f"a driver of the console that leaves {MAX_WAITING} control messages waiting")
        self._waiting.append(_CONTROL.pack(PORT, event, value) + more)
        self._write_control()

    def _write_control(self) -> None:
        queue = self._queue(TO_DRIVER)
        while queue is not None and self._waiting:
            chain = queue.pop()
            if chain is not None:
                queue.push(chain, fill(chain.writable, self._waiting.popleft()))
            elif not queue.arm():
                break
        if queue is not None:
            queue.signal()

    # Bytes

    def _watch(self, *, reading: bool = True) -> None:
        """Wait for the socket: for bytes of its if they can be taken, for room if something is to be sent."""
        events = POLLIN if reading and self._open and self._queue(TO_GUEST) is not None else 0
        if self._active and (self._sending is not None or self._held):
            events |= POLLOUT
        if self._sock is not None and events != self._events:
            self._events = events
            if events:
                self.port.watch(self._sock, events, self._ready)
            else:
                self.port.unwatch(self._sock)

    def _unwatch(self) -> None:
        if self._events and self._sock is not None:
            self.port.unwatch(self._sock)
        self._events = 0

    def _ready(self, revents: int) -> None:
        if self._events & POLLOUT and revents & (POLLOUT | POLLHUP):
            self._send()
        if self._events & POLLIN and revents & (POLLIN | POLLHUP):
            self._receive()

    def _receive(self) -> None:
        queue = self._queue(TO_GUEST)
        assert queue is not None and self._sock is not None
        chains, pieces = self._buffers(queue)
        if not chains:
            self._watch(reading=False)  # until the driver notifies
            return
        try:
            count = os.readv(self._sock, pieces)
        except BlockingIOError:
            queue.unpop(len(chains))
            return
        except OSError:  # the other side was killed: its end of file
            count = 0
        self.counts["bytes"] += count
        if not count:
            queue.unpop(len(chains))
            self.disconnect()
            return
        for number, chain in enumerate(chains):
            if count <= 0:
                queue.unpop(len(chains) - number)
                break
            queue.push(chain, min(count, chain.writable_bytes))
            self.counts["requests"] += 1
            count -= chain.writable_bytes
        queue.signal()

    def _buffers(self, queue: Queue) -> tuple[list[Chain], list[memoryview]]:
        chains: list[Chain] = []
        pieces: list[memoryview] = []
        while len(chains) < BATCH and len(pieces) < MAX_PIECES:
            chain = queue.pop()
            if chain is None:
                if chains or not queue.arm():
                    break
                continue
            if not chain.writable:
                raise Damaged("a receive buffer of the console that cannot be written")
            chains.append(chain)
            pieces += chain.writable
        return chains, pieces

    def _send(self) -> None:
        """Send what waits, then what the guest has added, until the socket is full."""
        queue = self._queue(FROM_GUEST)
        if queue is None:
            return
        if self._held:
            self._held = self._held[self._write([memoryview(self._held)]) :]
        if self._sending is not None and not self._held:
            self._send_chain(queue, self._sending)
        if self._sending is None and not self._held:
            for chain in queue.chains():
                if chain.readable_bytes > MAX_WRITE:
                    raise Damaged(f"{chain.readable_bytes} bytes to the console at once")
                self._send_chain(queue, chain)
                if self._sending is not None:
                    break
        queue.signal()
        self._watch(reading=bool(self._events & POLLIN))

    def _send_chain(self, queue: Queue, chain: Chain) -> None:
        self._sending = chain
        while chain.readable:
            count = self._write(chain.readable[:MAX_PIECES])
            if not count:
                return
            advance(chain.readable, count)
        self._sending = None
        self.counts["requests"] += 1
        queue.push(chain, 0)

    def _write(self, pieces: list[memoryview]) -> int:
        """How much is done with: what the socket took, 0 when it is full, all of it where nobody listens."""
        size = sum(map(len, pieces))
        if self._sock is None:
            return size
        try:
            count = os.writev(self._sock, pieces)
        except BlockingIOError:
            return 0
        except OSError:  # nobody reads it any more; its end of file is found by reading
            self.counts["errors"] += 1
            return size
        self.counts["bytes"] += count
        return count

    # Snapshots

    def drain(self) -> None:
        queue = self._queue(FROM_GUEST)
        if self._sending is not None and queue is not None:
            self._held += b"".join(self._sending.readable)
            queue.push(self._sending, 0)
            self._sending = None
            queue.signal()
        self._unwatch()

    def resume(self) -> None:
        self._watch()

    def save(self) -> State:
        return {
            "known": self._known, "open": self._open, "held": self._held.hex(),
            "waiting": [message.hex() for message in self._waiting],
        }  # fmt: skip

    def restore(self, state: State) -> None:
        held, waiting = state["held"], state["waiting"]
        if not isinstance(held, str) or not isinstance(waiting, list) or len(waiting) > MAX_WAITING:
            raise ValueError("not the state of a console")
        self._held = bytes.fromhex(held)
        self._waiting = deque(bytes.fromhex(message) for message in waiting)
        self._known, self._open = bool(state["known"]), bool(state["open"])

    def close(self) -> None:
        if self._sock is not None:
            os.close(self._sock)
            self._sock = None
