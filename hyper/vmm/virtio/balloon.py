"""A balloon (virtio 1.2, section 5.5): pages that the guest gives to us, or says it does not use, go back to the host.

queues      0 inflate, 1 deflate: arrays of u32 page numbers of 4 KiB
            2 reports, if they were negotiated: the free pages themselves, as writable pieces

Statistics are not offered: what the guest uses its agent tells.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

from hyper.vmm.memory import BadAddress
from hyper.vmm.virtio.device import Device, State
from hyper.vmm.virtio.queue import Chain, Damaged, take
from hyper.vmm.virtio.registers import RING_FEATURES

F_DEFLATE_ON_OOM, F_REPORTING = 1 << 2, 1 << 5
INFLATE, DEFLATE, REPORTS = 0, 1, 2
PAGE = 4096
MOST_PAGES = 16384  # of one request; Linux names 256
REPORTED = "reported"


class Balloon(Device):
    """`resize` says how much the guest should give; `actual` is how much it has given, in bytes."""

    device_id = 5
    name = "balloon"
    features = RING_FEATURES | F_DEFLATE_ON_OOM | F_REPORTING
    queue_sizes = (128, 128, 64)

    def __init__(self) -> None:
        super().__init__()
        self.counts |= {REPORTED: 0}
        self.actual = 0
        self._wanted = 0  # pages

    def config(self) -> bytes:
        return struct.pack("<IIII", self._wanted, self.actual // PAGE, 0, 0)

    def write_config(self, offset: int, data: bytes) -> None:
        if offset == 4 and len(data) == 4:
            self.actual = int.from_bytes(data, "little") * PAGE

    def resize(self, size_bytes: int) -> None:
        """Ask the guest for so much of its memory; 0 gives all of it back. Through Transport.run."""
        self._wanted = size_bytes // PAGE
        self.port.config_changed()

    def notified(self, index: int) -> None:
        queue = self.queues[index]
        assert queue is not None
        for chain in queue.chains(max_bytes=1 << 32):
            if index == INFLATE:
                self._give_back(self._pages(chain))
            elif index == REPORTS:
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

    def reset(self) -> None:
        super().reset()
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
