"""A balloon (virtio 1.2, section 5.5): pages that the guest gives to us, or says it does not use, go back to the host.

queues      0 inflate, 1 deflate: arrays of u32 page numbers of 4 KiB; then, each only if it is negotiated:
            statistics: (u16 tag, u64 value)[]; reports: the free pages themselves, as writable pieces
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence

from hyper.vmm.memory import BadAddress
from hyper.vmm.virtio.device import Device, State
from hyper.vmm.virtio.queue import Chain, Damaged, Queue, take
from hyper.vmm.virtio.registers import RING_FEATURES

F_STATS, F_DEFLATE_ON_OOM, F_REPORTING = 1 << 1, 1 << 2, 1 << 5
INFLATE, DEFLATE = 0, 1
PAGE = 4096
MOST_PAGES = 16384  # of one request; Linux names 256
MOST_STATISTICS = 64
NAMES = (
    "swap_in", "swap_out", "major_faults", "minor_faults", "free", "total", "available", "caches",
    "huge_pages", "huge_failures",
)  # fmt: skip
REPORTED = "reported"

_STATISTIC = struct.Struct("<HQ")


class Balloon(Device):
    """`resize` says how much the guest should give; `actual` is how much it has given, in bytes."""

    device_id = 5
    name = "balloon"
    features = RING_FEATURES | F_STATS | F_DEFLATE_ON_OOM | F_REPORTING
    queue_sizes = (128, 128, 16, 64)

    def __init__(self) -> None:
        super().__init__()
        self.counts |= {REPORTED: 0}
        self.actual = 0
        self.statistics: dict[str, int] = {}  # the guest's own, bytes and numbers, as of the last answer
        self._wanted = 0  # pages
        self._roles: dict[int, str] = {}
        self._held: Chain | None = None  # the driver's buffer for statistics, which asks for new ones when it comes back

    def config(self) -> bytes:
        return struct.pack("<IIII", self._wanted, self.actual // PAGE, 0, 0)

    def write_config(self, offset: int, data: bytes) -> None:
        if offset == 4 and len(data) == 4:
            self.actual = int.from_bytes(data, "little") * PAGE

    def resize(self, size_bytes: int) -> None:
        """Ask the guest for so much of its memory; 0 gives all of it back. Through Transport.run."""
        self._wanted = size_bytes // PAGE
        self.port.config_changed()

    def ask(self) -> None:
        """Have the guest bring `statistics` up to date; it answers when it likes. Through Transport.run."""
        queue = next((self.queues[index] for index, role in self._roles.items() if role == "statistics"), None)
        if self._held is not None and queue is not None:
            queue.push(self._held, 0)
            self._held = None
            queue.signal()

    def activate(self, queues: Sequence[Queue | None], features: int) -> None:
        super().activate(queues, features)
        # A queue of a feature that was not agreed on does not exist: those after it have lower numbers.
        optional = [name for flag, name in ((F_STATS, "statistics"), (F_REPORTING, REPORTED)) if features & flag]
        self._roles = dict(enumerate(optional, 2))

    def notified(self, index: int) -> None:
        queue = self.queues[index]
        assert queue is not None
        if self._roles.get(index) == "statistics":
            self._take_statistics(queue)
            return
        for chain in queue.chains(max_bytes=1 << 32):
            if index == INFLATE:
                self._give_back(self._pages(chain))
            elif self._roles.get(index) == REPORTED:
                self._report(chain)
            self.counts["requests"] += 1
            queue.push(chain, 0)
        queue.signal()

    def _pages(self, chain: Chain) -> list[int]:
        size = chain.readable_bytes
        if size % 4 or size > 4 * MOST_PAGES:
            raise Damaged(f"{size} bytes of page numbers")
        return sorted(struct.unpack(f"<{size // 4}I", take(chain.readable, size)))

    def _give_back(self, pages: Iterable[int]) -> None:
        for first, count in _runs(pages):
            self._discard(first * PAGE, count * PAGE)
            self.counts["bytes"] += count * PAGE

    def _report(self, chain: Chain) -> None:
        for address, length in chain.ranges:
            if address % PAGE or length % PAGE:
                raise Damaged(f"a free range of {length} bytes at {address:#x}, which are no pages")
            self._discard(address, length)
            self.counts[REPORTED] += length

    def _discard(self, address: int, length: int) -> None:
        try:
            self.port.memory.discard(address, length)
        except BadAddress as error:
            raise Damaged(str(error)) from error

    def _take_statistics(self, queue: Queue) -> None:
        for chain in queue.chains():
            if self._held is not None:
                queue.push(self._held, 0)  # a driver has one; whatever this is, it gets its own back
            self._held = chain
            self.counts["requests"] += 1
            size = min(chain.readable_bytes, MOST_STATISTICS * _STATISTIC.size) // _STATISTIC.size * _STATISTIC.size
            pairs = _STATISTIC.iter_unpack(take(chain.readable, size))
            self.statistics = {NAMES[tag]: value for tag, value in pairs if tag < len(NAMES)}

    def drain(self) -> None:
        if self._held is not None:
            for index, role in self._roles.items():
                queue = self.queues[index]
                if role == "statistics" and queue is not None:
                    queue.unpop(1)
            self._held = None

    def reset(self) -> None:
        super().reset()
        self._held = None
        self._roles = {}
        self.actual = 0

    def save(self) -> State:
        return {"wanted": self._wanted, "actual": self.actual}

    def restore(self, state: State) -> None:
        wanted, actual = state["wanted"], state["actual"]
        if not isinstance(wanted, int) or not isinstance(actual, int):
            raise TypeError("a balloon's sizes are no numbers")
        self._wanted, self.actual = wanted, actual


def _runs(pages: Iterable[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of numbers in ascending order that follow one another."""
    first = count = 0
    for page in pages:
        if count and page == first + count:
            count += 1
        elif not count or page >= first + count:
            if count:
                yield first, count
            first, count = page, 1
    if count:
        yield first, count
