"""What every device is, and what its transport does for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from hyper.vmm.memory import GuestMemory
from hyper.vmm.virtio.queue import Queue
from hyper.vmm.virtio.registers import RING_FEATURES

State = dict[str, object]  # plain, as JSON can hold it


class Port(Protocol):
    """The transport as a device sees it. Callbacks run on the loop's thread under the device's lock; what they raise as
    Damaged, or as OSError, stops the device, and the guest is told that it needs a reset."""

    memory: GuestMemory

    def watch(self, fd: int, events: int, ready: Callable[[int], None]) -> None:
        """As Loop.watch. Forgotten at a reset."""

    def unwatch(self, fd: int) -> None: ...

    def kick_fd(self, index: int) -> int:
        """The eventfd of queue `index`'s notifications, which nobody else reads until the next reset."""

    def call_fd(self) -> int:
        """The eventfd that raises the interrupt."""

    def kick(self, index: int) -> None:
        """Have `notified(index)` called from the loop."""

    def refresh_config(self) -> None:
        """Show what `config()` returns now, which the driver knows of."""

    def config_changed(self) -> None:
        """Tell the driver that `config()` returns something else."""


class Device:
    """A device of nothing; subclasses fill in what they are.

    Calls come under one lock: `activate` when the driver is ready, `notified` when it has added to a queue, `reset` at any
    time after `activate`. Between `reset` and `activate` the device must not touch guest memory.
    """

    device_id = 0
    name = ""
    features = RING_FEATURES  # bits that are offered beside VERSION_1
    queue_sizes: tuple[int, ...] = ()  # most entries of each

    def __init__(self) -> None:
        self.port: Port  # set by the transport before anything else is called
        self.queues: Sequence[Queue | None] = ()
        self.counts: dict[str, int] = {"requests": 0, "bytes": 0, "errors": 0}

    def config(self) -> bytes:
        """The configuration space as it is now. Its length never changes."""
        return b""

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver wrote to the configuration space."""

    def activate(self, queues: Sequence[Queue | None], features: int) -> None:
        """Start with these queues (None: the driver did not enable it) and negotiated features. Raises Damaged, OSError."""
        self.queues = queues

    def notified(self, index: int) -> None:
        """The driver added to queue `index`, which is enabled. Raises Damaged."""

    def reset(self) -> None:
        """Stop, and forget the queues."""
        self.queues = ()

    def drain(self) -> None:
        """Leave nothing in flight: what was taken from a queue is done or given back. Stand still until `resume`."""

    def resume(self) -> None:
        """Go on after `drain`, or after `activate` in a machine that is restored."""

    def memory_changed(self) -> None:
        """The port's memory has one region more: tell a back-end that was given the others."""

    def counters(self) -> dict[str, int]:
        return dict(self.counts)

    def save(self) -> State:
        """State beyond features and queues, after `drain`."""
        return {}

    def restore(self, state: State) -> None:
        """Before `activate`. Raises ValueError, KeyError, TypeError when it is not what `save` returned."""

    def close(self) -> None:
        """Let go of the descriptors that it owns. Idempotent."""
