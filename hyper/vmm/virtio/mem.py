"""Memory that comes and goes while the guest runs (virtio 1.2, section 5.15): blocks of a region that the driver plugs.

The region is RAM of the machine's from the start, of which nothing is there until it is touched. What is unplugged goes back
to the host at once. A guest that touches unplugged blocks all the same is held by the limit of its process, like any other.

    request     u16 type (0 plug, 1 unplug, 2 unplug all, 3 state), u16[3] 0, u64 address, u16 blocks, u16[3] 0
    response    u16 type (0 done, 1 refused, 2 busy, 3 error), u16[3] 0, u16 state (0 plugged, 1 unplugged, 2 both)
"""

from __future__ import annotations

import struct

from hyper.vmm.virtio.device import Device, State
from hyper.vmm.virtio.queue import Damaged, fill, take

PLUG, UNPLUG, UNPLUG_ALL, STATE = range(4)
ACK, NACK, BUSY, ERROR = range(4)
PLUGGED, UNPLUGGED, MIXED = range(3)
BLOCK = 2 << 20

_REQUEST = struct.Struct("<H6xQH6x")
_RESPONSE = struct.Struct("<H6xH")
_CONFIG = struct.Struct("<QH6xQQQQQ")  # block, node, address, size, usable, plugged, requested


class Mem(Device):
    """The region [address, address + size), which is in the port's memory. `resize` says how much of it to use."""

    device_id = 24
    name = "mem"
    queue_sizes = (64,)

    def __init__(self, address: int, size: int) -> None:
        super().__init__()
        if address % BLOCK or size % BLOCK or not size:
            raise ValueError(f"a region of {size} bytes at {address:#x}, which are no multiples of {BLOCK}")
        self._address, self._size = address, size
        self._requested = 0  # bytes
        self._plugged: set[int] = set()  # numbers of blocks

    @property
    def plugged(self) -> int:
        """Bytes that the guest uses."""
        return len(self._plugged) * BLOCK

    def config(self) -> bytes:
        return _CONFIG.pack(BLOCK, 0, self._address, self._size, self._size, self.plugged, self._requested)

    def resize(self, size_bytes: int) -> None:
        """Ask the guest to use so much, rounded down to 2 MiB. Through Transport.run."""
        self._requested = min(size_bytes, self._size) // BLOCK * BLOCK
        self.port.config_changed()

    def notified(self, index: int) -> None:
        queue = self.queues[index]
        assert queue is not None
        for chain in queue.chains():
            kind, address, count = _REQUEST.unpack(take(chain.readable, _REQUEST.size))
            if chain.writable_bytes < _RESPONSE.size:
                raise Damaged("a request for memory without room for its answer")
            result, state = self._do(kind, address, count)
            self.counts["requests"] += 1
            self.counts["errors"] += result != ACK
            queue.push(chain, fill(chain.writable, _RESPONSE.pack(result, state)))
        self.port.refresh_config()
        queue.signal()

    def _do(self, kind: int, address: int, count: int) -> tuple[int, int]:
        """Result and state."""
        if kind == UNPLUG_ALL:
            self._unplug(frozenset(self._plugged))
            return ACK, 0
        first, rest = divmod(address - self._address, BLOCK)
        if kind > STATE or rest or not count or first < 0 or first + count > self._size // BLOCK:
            return ERROR, 0
        blocks = frozenset(range(first, first + count))
        there = len(blocks & self._plugged)
        if kind == STATE:
            return ACK, PLUGGED if there == count else MIXED if there else UNPLUGGED
        if kind == UNPLUG:
            if there < count:
                return ERROR, 0
            self._unplug(blocks)
            return ACK, 0
        if there:
            return ERROR, 0
        if self.plugged + count * BLOCK > self._requested:
            return NACK, 0
        self._plugged |= blocks
        return ACK, 0

    def _unplug(self, blocks: frozenset[int]) -> None:
        for block in blocks:
            self.port.memory.discard(self._address + block * BLOCK, BLOCK)
        self._plugged -= blocks
        self.counts["bytes"] += len(blocks) * BLOCK

    def save(self) -> State:
        return {"requested": self._requested, "plugged": sorted(self._plugged)}

    def restore(self, state: State) -> None:
        requested, plugged = state["requested"], state["plugged"]
        blocks = self._size // BLOCK
        if not isinstance(requested, int) or not isinstance(plugged, list):
            raise TypeError("not the state of a memory device")
        if not all(isinstance(block, int) and 0 <= block < blocks for block in plugged):
            raise ValueError("blocks that the memory device has not")
        self._requested, self._plugged = requested, set(plugged)
