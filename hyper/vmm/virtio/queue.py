"""Split virtqueues, from the device's side (virtio 1.2, section 2.7), with indirect descriptors and event indices.

The three parts of a queue lie in memory that the guest writes at any time. So each field is read once, what was read is
checked, and only the copy is used. What the specification forbids the driver is Damaged, and the device stops.

    descriptor   u64 address, u32 length, u16 flags (1 next, 2 write, 4 indirect), u16 next
    available    u16 flags (1: no interrupt), u16 index, u16 heads[size], u16 used_event
    used         u16 flags, u16 index, (u32 head, u32 written)[size], u16 available_event

Indices are read and written through memoryviews with native items, because those are single loads and stores; struct's
explicit byte orders go byte by byte, and an index that is torn between two bytes would be a wrong one.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator

from hyper.vmm.memory import BadAddress, GuestMemory

MAX_SIZE = 32768
NEXT, WRITE, INDIRECT = 1, 2, 4
NO_INTERRUPT = 1
MAX_CHAIN_BYTES = (1 << 32) - 1

_DESCRIPTOR = struct.Struct("=QIHH")
_fence = threading.Lock()  # taking it is a locked instruction, which no load after it overtakes


class Damaged(Exception):
    """The guest's driver did what it must not; the text says what."""


class Chain:
    """A request: what the device may read, then what it may write, as views of guest memory. `head` names it.

    ranges: addresses and lengths of all of them, for a balloon, to which the guest hands its memory itself.
    """

    __slots__ = ("head", "ranges", "readable", "readable_bytes", "writable", "writable_bytes")

    def __init__(self, head: int) -> None:
        self.head = head
        self.ranges: list[tuple[int, int]] = []
        self.readable: list[memoryview] = []
        self.writable: list[memoryview] = []
        self.readable_bytes = 0
        self.writable_bytes = 0


class Queue:
    """One virtqueue. interrupt: tells the driver of used buffers. again: has the device notified once more, later.

    Raises Damaged when a part of it is not in the guest's memory or not aligned.
    """

    __slots__ = (
        "_again", "_available", "_descriptors", "_event_idx", "_interrupt", "_memory", "_next", "_seen", "_signalled",
        "_used", "_used_index", "_used_ring", "addresses", "size",
    )  # fmt: skip

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        addresses: tuple[int, int, int],
        *,
        event_idx: bool,
        interrupt: Callable[[], object],
        again: Callable[[], object],
    ) -> None:
        """addresses: of the descriptors, of what the driver writes (available), of what the device writes (used)."""
        if not 0 < size <= MAX_SIZE or size & (size - 1):
            raise Damaged(f"a queue of {size} entries")
        descriptors, driver, device = addresses
        if descriptors % 16 or driver % 2 or device % 4:
            raise Damaged("a queue that is not aligned")
        self.size = size
        self.addresses = addresses
        self._memory = memory
        self._event_idx = event_idx
        self._interrupt = interrupt
        self._again = again
        try:
            self._descriptors = memory.view(descriptors, 16 * size)
            self._available = memory.view(driver, 6 + 2 * size).cast("H")
            used = memory.view(device, 6 + 8 * size)
        except BadAddress as error:
            raise Damaged(str(error)) from error
        self._used = used.cast("H")
        self._used_ring = used[4 : 4 + 8 * size].cast("I")
        self._next = 0  # of the available ring: the next to be taken
        self._seen = 0  # the available index as it was read last
        self._used_index = 0
        self._signalled = 0  # the used index as it was when we decided last whether to interrupt

    def pop(self) -> Chain | None:
        """The next request, None when there is none. Raises Damaged."""
        if self._next == self._seen and not self._look():
            return None
        head = self._available[2 + (self._next & (self.size - 1))]
        chain = Chain(head)
        try:
            self._walk(chain)
        except BadAddress as error:
            raise Damaged(str(error)) from error
        self._next = (self._next + 1) & 0xFFFF
        return chain

    def _look(self) -> bool:
        """Read the driver's index; whether it has added something."""
        seen = self._available[1]
        if (seen - self._next) & 0xFFFF > self.size:
            raise Damaged(f"an available index of {seen} where {self._next} is next and {self.size} entries are all")
        self._seen = seen
        return seen != self._next

    def _walk(self, chain: Chain) -> None:
        table, entries, index = self._descriptors, self.size, chain.head
        for _ in range(self.size + 1):  # an entry may be that of the indirect table itself
            if index >= entries:
                raise Damaged(f"descriptor {index} of {entries}")
            address, length, flags, following = _DESCRIPTOR.unpack_from(table, index * 16)
            if flags & INDIRECT:
                if table is not self._descriptors or flags & NEXT or not length or length % 16:
                    raise Damaged("an indirect table that is nested, followed by others, or of a wrong length")
                table, entries, index = self._memory.view(address, length), length // 16, 0
                continue
            self._add(chain, address, length, flags)
            if not flags & NEXT:
                return
            index = following
        raise Damaged(f"a chain of more than {self.size} descriptors")

    def _add(self, chain: Chain, address: int, length: int, flags: int) -> None:
        if not length:
            raise Damaged("a descriptor of no bytes")
        piece = self._memory.view(address, length)
        chain.ranges.append((address, length))
        if flags & WRITE:
            chain.writable.append(piece)
            chain.writable_bytes += length
        elif chain.writable:
            raise Damaged("a readable descriptor after a writable one")
        else:
            chain.readable.append(piece)
            chain.readable_bytes += length
        if chain.readable_bytes + chain.writable_bytes > MAX_CHAIN_BYTES:
            raise Damaged("a chain of 4 GiB")

    def unpop(self, count: int) -> None:
        """Give the last `count` requests back, of which nothing was used: they are popped again."""
        self._next = (self._next - count) & 0xFFFF

    def arm(self) -> bool:
        """Have the driver tell us of the next request. True when there is one already: it may not tell of that."""
        if self._event_idx:
            self._used[2 + 4 * self.size] = self._next
        with _fence:
            pass
        return self._look()

    def chains(self, max_bytes: int = 1 << 24) -> Iterator[Chain]:
        """The requests of one turn: until none is left, or so many that other devices should have theirs first.

        max_bytes: after about so many bytes the turn ends. Raises Damaged.
        """
        for _ in range(self.size):
            chain = self.pop()
            if chain is None:
                if not self.arm():
                    return
                continue
            max_bytes -= chain.readable_bytes + chain.writable_bytes
            yield chain
            if max_bytes < 0:
                break
        self._again()

    def push(self, chain: Chain, written: int) -> None:
        """Give `chain` back with `written` bytes in it. The driver learns of it by `signal`."""
        at = 2 * (self._used_index & (self.size - 1))
        self._used_ring[at] = chain.head
        self._used_ring[at + 1] = written
        self._used_index = (self._used_index + 1) & 0xFFFF
        self._used[1] = self._used_index

    def signal(self) -> None:
        """Interrupt the driver if it wants to know of what was pushed since the last call."""
        new, old = self._used_index, self._signalled
        if new == old:
            return
        self._signalled = new
        with _fence:
            pass
        if self._event_idx:
            event = self._available[2 + self.size]
            wanted = (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF
        else:
            wanted = not self._available[0] & NO_INTERRUPT
        if wanted:
            self._interrupt()

    def save(self) -> dict[str, int]:
        """The indices, for a queue of which nothing is in flight."""
        return {"next": self._next, "used": self._used_index}

    def restore(self, state: dict[str, int]) -> None:
        """Go on at what `save` returned, or where a back-end of the kernel stopped."""
        self._next = self._seen = state["next"] & 0xFFFF
        self._used_index = self._signalled = state["used"] & 0xFFFF

    def continue_at(self, index: int) -> None:
        """Go on where a back-end stopped, that has taken what is before `index` and used what the ring says."""
        self.restore({"next": index, "used": self._used[1]})


def take(pieces: list[memoryview], count: int) -> bytes:
    """Remove the first `count` bytes from `pieces`: a copy, that the guest cannot change. Damaged when there are fewer."""
    taken = bytearray()
    while len(taken) < count:
        if not pieces:
            raise Damaged(f"a request of {len(taken)} bytes where {count} are needed")
        piece = pieces[0]
        need = count - len(taken)
        taken += piece[:need]
        if len(piece) > need:
            pieces[0] = piece[need:]
        else:
            del pieces[0]
    return bytes(taken)


def advance(pieces: list[memoryview], count: int) -> None:
    """Remove the first `count` bytes, which there are, from `pieces`."""
    while count:
        piece = pieces[0]
        if len(piece) > count:
            pieces[0] = piece[count:]
            return
        count -= len(piece)
        del pieces[0]


def fill(pieces: list[memoryview], data: bytes | memoryview) -> int:
    """Write `data` to the front of `pieces`, as much as fits; the number of bytes written."""
    at = 0
    for piece in pieces:
        part = data[at : at + len(piece)]
        piece[: len(part)] = part
        at += len(part)
        if at == len(data):
            break
    return at
