"""What a driver has said of a queue before it is in use, and the queue once it is."""

from __future__ import annotations

from collections.abc import Callable

from hyper.vmm.memory import GuestMemory
from hyper.vmm.virtio.queue import Damaged, Queue


class QueueSlot:
    """The registers of one queue. most: its largest size. live: the queue, while its device is active."""

    __slots__ = ("_indices", "_words", "live", "most", "ready", "size")

    def __init__(self, most: int) -> None:
        self.most = most
        self.forget()

    def forget(self) -> None:
        """The state after a reset."""
        self.size = 0
        self.ready = 0
        self._words = [0] * 6  # descriptors, driver, device: each low and high
        self._indices: dict[str, int] | None = None
        self.live: Queue | None = None

    def set_address(self, word: int, value: int) -> None:
        self._words[word] = value

    def queue(
        self, memory: GuestMemory, *, event_idx: bool, interrupt: Callable[[], object], again: Callable[[], object]
    ) -> Queue | None:
        """The queue as it was set up, None when it is not enabled. Raises Damaged."""
        self.live = None
        if not self.ready:
            return None
        if self.size > self.most:
            raise Damaged(f"a queue of {self.size} entries where {self.most} are most")
        low = self._words
        addresses = (low[0] | low[1] << 32, low[2] | low[3] << 32, low[4] | low[5] << 32)
        queue = Queue(memory, self.size, addresses, event_idx=event_idx, interrupt=interrupt, again=again)
        if self._indices is not None:
            queue.restore(self._indices)
        self.live = queue
        return queue

    def save(self) -> dict[str, object]:
        return {
            "size": self.size, "ready": self.ready, "words": list(self._words),
            "indices": self.live.save() if self.live else None,
        }  # fmt: skip

    def restore(self, state: object) -> None:
        """Raises ValueError, KeyError, TypeError."""
        if not isinstance(state, dict):
            raise TypeError("a queue's state is no object")
        words, indices = state["words"], state["indices"]
        numbers = [state["size"], state["ready"], *words, *(indices.values() if indices else ())]
        if len(words) != 6 or not all(isinstance(value, int) and 0 <= value < 1 << 32 for value in numbers):
            raise ValueError("a queue's state has numbers that are none")
        self.size, self.ready, self._words = state["size"], state["ready"], list(words)
        self._indices = {"next": indices["next"], "used": indices["used"]} if indices else None
