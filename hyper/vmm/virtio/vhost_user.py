"""Back-ends in another process (docs/interop/vhost-user of QEMU): what vhost is by ioctls, over a stream socket.

    message     u32 request, u32 flags (1 version, 4 reply, 8 wants one), u32 bytes, payload; descriptors by SCM_RIGHTS

The other process maps the guest's memory, so that has to be a file. It is one of ours, but it reads what a guest wrote:
replies are checked, and awaited for a bounded time.
"""

from __future__ import annotations

import array
import errno
import socket
import struct
from collections.abc import Mapping

from ambi.core.loop import POLLIN
from hyper.vmm.memory import GuestMemory
from hyper.vmm.virtio.device import Port
from hyper.vmm.virtio.queue import Queue

GET_FEATURES, SET_FEATURES, SET_OWNER, SET_MEM_TABLE = 1, 2, 3, 5
SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE, GET_VRING_BASE = 8, 9, 10, 11
SET_VRING_KICK, SET_VRING_CALL = 12, 13
GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, SET_VRING_ENABLE = 15, 16, 18

VERSION, REPLY, WANTS_REPLY = 1, 4, 8
F_PROTOCOL_FEATURES = 1 << 30
PROTOCOL_REPLY_ACK = 1 << 3
REPLY_S = 10.0

_HEADER = struct.Struct("=III")
_U64 = struct.Struct("=Q")
_STATE = struct.Struct("=II")
_ADDRESSES = struct.Struct("=IIQQQQ")
_REGION = struct.Struct("=QQQQ")  # gpa, bytes, address here, offset in the file


class VhostUser:
    """A back-end by the descriptor of a connected socket, which it owns. memory_fd: of the file that RAM is, in the order of
    its regions; it stays the caller's. Nothing is said before `start`."""

    __slots__ = ("_acknowledges", "_has_owner", "_memory_fd", "_port", "_queues", "_sock")

    def __init__(self, sock: int, memory_fd: int) -> None:
        # With all three Python asks the kernel for none of them, which the filter of system calls refuses.
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=sock)
        self._sock.settimeout(REPLY_S)
        self._memory_fd = memory_fd
        self._has_owner = False
        self._acknowledges = False
        self._queues: dict[int, Queue] = {}
        self._port: Port | None = None

    def start(self, port: Port, features: int, queues: Mapping[int, Queue]) -> None:
        """Have it serve `queues`. Raises OSError when it is gone, does not answer, or lacks one of `features`."""
        offered = self._ask(GET_FEATURES)
        if features & ~offered:
            raise OSError(errno.EPROTO, f"a back-end with features {offered:#x} where {features:#x} are agreed on")
        self._introduce(offered)
        self._send(SET_FEATURES, _U64.pack(features | offered & F_PROTOCOL_FEATURES))
        self._set_memory(port.memory)
        self._port = port
        for index, queue in queues.items():
            self._queues[index] = queue
            self._set_queue(index, queue, port)
        if offered & F_PROTOCOL_FEATURES:
            for index in queues:
                self._send(SET_VRING_ENABLE, _STATE.pack(index, 1))
        port.watch(self._sock.fileno(), POLLIN, self._gone)

    def _introduce(self, offered: int) -> None:
        if self._has_owner:
            return
        if offered & F_PROTOCOL_FEATURES:
            protocol = self._ask(GET_PROTOCOL_FEATURES) & PROTOCOL_REPLY_ACK
            self._send(SET_PROTOCOL_FEATURES, _U64.pack(protocol))
            self._acknowledges = bool(protocol)
        self._send(SET_OWNER)
        self._has_owner = True

    def memory_changed(self) -> None:
        """While it serves queues, too. Raises OSError."""
        if self._port is not None:
            self._set_memory(self._port.memory)

    def _set_memory(self, memory: GuestMemory) -> None:
        """RAM is one file, what came later has each its own."""
        table = _STATE.pack(len(memory.regions), 0)
        offset = 0
        fds = []
        for region in memory.regions:
            own = getattr(region.memory, "fd", -1)
            table += _REGION.pack(region.gpa, region.end - region.gpa, region.memory.address, 0 if own >= 0 else offset)
            fds.append(own if own >= 0 else self._memory_fd)
            offset += 0 if own >= 0 else region.end - region.gpa
        self._send(SET_MEM_TABLE, table, fds, acknowledged=True)

    def _set_queue(self, index: int, queue: Queue, port: Port) -> None:
        descriptors, driver, device = queue.addresses
        memory = port.memory
        self._send(SET_VRING_NUM, _STATE.pack(index, queue.size))
        self._send(SET_VRING_BASE, _STATE.pack(index, queue.save()["next"]))
        addresses = _ADDRESSES.pack(
            index, 0,
            memory.address(descriptors, 16 * queue.size),
            memory.address(device, 6 + 8 * queue.size),
            memory.address(driver, 6 + 2 * queue.size),
            0,
        )  # fmt: skip
        self._send(SET_VRING_ADDR, addresses)
        self._send(SET_VRING_CALL, _U64.pack(index), [port.call_fd()])
        self._send(SET_VRING_KICK, _U64.pack(index), [port.kick_fd(index)])

    def _gone(self, _: int) -> None:
        """It says nothing unasked, so this is its end of file, or nonsense."""
        raise OSError(errno.ECONNRESET, "the process behind the device has ended")

    def stop(self) -> None:
        """Take the queues back; it has finished what it had in hand. Idempotent. Raises OSError."""
        queues, self._queues = self._queues, {}
        if self._port is not None:
            self._port.unwatch(self._sock.fileno())
            self._port = None
        for index, queue in queues.items():
            reply = self._ask(GET_VRING_BASE, _STATE.pack(index, 0))
            queue.continue_at(reply >> 32 & 0xFFFF)

    def _ask(self, request: int, payload: bytes = b"") -> int:
        """The reply's 8 bytes."""
        self._message(request, VERSION, payload, [])
        return self._reply(request)

    def _send(self, request: int, payload: bytes = b"", fds: list[int] | None = None, *, acknowledged: bool = False) -> None:
        wants = acknowledged and self._acknowledges
        self._message(request, VERSION | WANTS_REPLY * wants, payload, fds or [])
        if wants and self._reply(request):
            raise OSError(errno.EPROTO, f"a back-end that refuses request {request}")

    def _message(self, request: int, flags: int, payload: bytes, fds: list[int]) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        data = _HEADER.pack(request, flags, len(payload)) + payload
        sent = self._sock.sendmsg([data], rights)
        self._sock.sendall(data[sent:])

    def _reply(self, request: int) -> int:
        kind, flags, size = _HEADER.unpack(self._receive(_HEADER.size))
        if kind != request or flags & 3 != VERSION or not flags & REPLY or size != _U64.size:
            raise OSError(errno.EPROTO, f"a back-end that answers request {request} with {kind}, {size} bytes")
        return int(_U64.unpack(self._receive(size))[0])

    def _receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self._sock.recv(size - len(data))
            if not piece:
                raise OSError(errno.ECONNRESET, "the process behind the device has ended")
            data += piece
        return data

    def close(self) -> None:
        """Idempotent."""
        self._sock.close()
