"""virtio over memory-mapped registers, without an exit where it counts.

The register page is one that the guest reads without an exit and cannot write: a write exits to `Transport.write`, which
puts what is to be read next into the page. What happens all the time does not even exit:

- QueueNotify is an ioeventfd a queue (the value written is the queue's number);
- InterruptStatus reads a constant 1, "a buffer was used": a driver that looks in vain at a queue loses nothing;
- InterruptACK of that 1 is swallowed by an ioeventfd. While a configuration change is to be told the status is 3, and the
  ACK of 3 does exit: that is how we know that it was seen.

Register writes come from the vCPUs' threads and everything else from the loop's; a lock a transport makes that one at a
time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from typing import Protocol

from ambi.core.loop import POLLIN, Loop
from hyper.vmm.memory import GuestMemory
from hyper.vmm.virtio import registers as reg
from hyper.vmm.virtio.device import Device, State
from hyper.vmm.virtio.queue import Damaged
from hyper.vmm.virtio.slots import QueueSlot

_EVENT = os.EFD_CLOEXEC | os.EFD_NONBLOCK


class Events(Protocol):
    """What a transport needs of `hyper.kvm`'s Vm."""

    def irqfd(self, eventfd: int, gsi: int) -> object: ...

    def ioeventfd(self, eventfd: int, address: int, length: int, datamatch: int | None = None) -> object: ...


class Removable(Protocol):
    """What `remove` needs of it."""

    def remove_irqfd(self, eventfd: int, gsi: int) -> object: ...

    def remove_ioeventfd(self, eventfd: int, address: int, length: int, datamatch: int | None = None) -> object: ...


def clear(page: memoryview) -> None:
    """Make `page` that of a slot without a device, which drivers leave alone."""
    page[:] = bytes(reg.PAGE)
    words = page.cast("I")
    words[reg.MAGIC_VALUE // 4] = reg.MAGIC
    words[reg.VERSION_NUMBER // 4] = reg.VERSION


class Transport:
    """One device at `base`. page: its 4 KiB of registers, writable here and read-only in the guest.

    It owns the device: `close` closes both. `failure` is why the device stopped, "" while it has not. `broken` is called,
    from any thread, with that when it was the host's doing, which no reset mends.
    """

    def __init__(
        self, vm: Events, memory: GuestMemory, page: memoryview, base: int, gsi: int, device: Device, loop: Loop
    ) -> None:
        self.memory = memory
        self.device = device
        self.failure = ""
        self.broken: Callable[[str], None] = lambda why: None
        self.writes = 0  # exits to us
        self.interrupts = 0
        self._base, self._gsi = base, gsi
        self._page = page
        self._words = page.cast("I")
        self._loop = loop
        self._thread = threading.get_ident()
        self._lock = threading.Lock()
        self._offered = reg.F_VERSION_1 | device.features
        self._active = False
        self._untold = False  # a restored driver knows another configuration
        self._status = self._features = self._feature_word = self._selected = 0
        self._watched: set[int] = set()  # the device's own descriptors
        self._call = os.eventfd(0, _EVENT)
        self._swallow = os.eventfd(0, _EVENT)
        self._wake = os.eventfd(0, _EVENT)
        self._kicks = [os.eventfd(0, _EVENT) for _ in device.queue_sizes]
        self._slots = [QueueSlot(size) for size in device.queue_sizes]
        device.port = self
        self._forget()
        vm.irqfd(self._call, gsi)
        vm.ioeventfd(self._swallow, base + reg.INTERRUPT_ACK, 4, datamatch=reg.USED_BUFFER)
        loop.watch(self._wake, POLLIN, self._woken)
        for index, fd in enumerate(self._kicks):
            vm.ioeventfd(fd, base + reg.QUEUE_NOTIFY, 4, datamatch=index)
            self._watch_kick(index)

    # What the guest does

    def read(self, offset: int, length: int) -> bytes:
        """Only where the page is not mapped into the guest."""
        return bytes(self._page[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        """A register or the configuration space, from any vCPU's thread. Nonsense is ignored, as hardware does."""
        with self._lock:
            self.writes += 1
            if offset >= reg.CONFIG:
                if self._active:
                    self._guard(self.device.write_config, offset - reg.CONFIG, data)
                    self.refresh_config()
                return
            action = _REGISTERS.get(offset)
            if action is not None and len(data) == 4:
                action(self, int.from_bytes(data, "little"))

    def _select_offered(self, value: int) -> None:
        self._words[reg.DEVICE_FEATURES // 4] = (self._offered >> 32 * value) & 0xFFFFFFFF if value < 2 else 0

    def _select_driver_features(self, value: int) -> None:
        self._feature_word = value

    def _driver_features(self, value: int) -> None:
        if self._feature_word < 2 and not self._status & reg.FEATURES_OK:
            shift = 32 * self._feature_word
            self._features = self._features & ~(0xFFFFFFFF << shift) | value << shift

    def _select_queue(self, value: int) -> None:
        self._selected = value
        slot = self._slot()
        self._words[reg.QUEUE_SIZE_MAX // 4] = slot.most if slot else 0
        self._words[reg.QUEUE_READY // 4] = slot.ready if slot else 0

    def _slot(self) -> QueueSlot | None:
        return self._slots[self._selected] if self._selected < len(self._slots) else None

    def _queue_size(self, value: int) -> None:
        if (slot := self._slot()) and not slot.ready:
            slot.size = value

    def _queue_address(self, word: int, value: int) -> None:
        if (slot := self._slot()) and not slot.ready:
            slot.set_address(word, value)

    def _queue_ready(self, value: int) -> None:
        slot = self._slot()
        if slot is None or value > 1:
            return
        if self._active and slot.ready and not value:
            self._fail("the driver took a queue away that is in use")
        slot.ready = value
        self._words[reg.QUEUE_READY // 4] = value

    def _notify(self, value: int) -> None:
        if value < len(self._kicks):
            os.eventfd_write(self._kicks[value], 1)

    def _acknowledge(self, value: int) -> None:
        if value & reg.CONFIG_CHANGE:
            self._words[reg.INTERRUPT_STATUS // 4] = reg.USED_BUFFER

    def _set_status(self, value: int) -> None:
        if value == 0:
            self._stop()
            self._forget()
            return
        new = (value & 0xFF) | self._status  # only a reset takes a bit away
        if new & reg.FEATURES_OK and not self._status & reg.FEATURES_OK and not self._acceptable():
            new &= ~reg.FEATURES_OK
        if new & reg.DRIVER_OK and not new & reg.FEATURES_OK:
            new &= ~reg.DRIVER_OK
        starts = new & reg.DRIVER_OK and not (self._status | new) & (reg.NEEDS_RESET | reg.FAILED) and not self._active
        self._put_status(new)
        if starts:
            self._start()
            self._kick_all()

    def _acceptable(self) -> bool:
        return bool(self._features & reg.F_VERSION_1) and not self._features & ~self._offered

    # What follows from it; the lock is held

    def _forget(self) -> None:
        """The state after a reset."""
        clear(self._page)
        self._active = False
        self._status = self._features = self._feature_word = self._selected = 0
        for slot in self._slots:
            slot.forget()
        for at, value in (
            (reg.DEVICE_ID, self.device.device_id), (reg.VENDOR_ID, reg.VENDOR), (reg.INTERRUPT_STATUS, reg.USED_BUFFER),
            (reg.SHM_LENGTH, 0xFFFFFFFF), (reg.SHM_LENGTH + 4, 0xFFFFFFFF), (reg.SHM_BASE, 0xFFFFFFFF),
            (reg.SHM_BASE + 4, 0xFFFFFFFF),
        ):  # fmt: skip
            self._words[at // 4] = value
        self._select_offered(0)
        self._select_queue(0)
        self.refresh_config()
        self.failure = ""

    def _put_status(self, value: int) -> None:
        self._status = value
        self._words[reg.STATUS // 4] = value

    def _start(self) -> None:
        self._active = True
        self._guard(self._activate)

    def _activate(self) -> None:
        event_idx = bool(self._features & reg.F_EVENT_IDX)
        queues = [
            slot.queue(self.memory, event_idx=event_idx, interrupt=self.interrupt, again=partial(os.eventfd_write, fd, 1))
            for slot, fd in zip(self._slots, self._kicks, strict=True)
        ]
        self.device.activate(queues, self._features)

    def _stop(self) -> None:
        """The device is still afterwards: no byte of guest memory changes by it."""
        if not self._active:
            return
        self._active = False
        self.device.reset()
        for fd in tuple(self._watched):
            self.unwatch(fd)
        for index in range(len(self._kicks)):
            self._watch_kick(index)

    def _fail(self, why: str) -> None:
        self._stop()
        self.failure = why
        self._put_status(self._status | reg.NEEDS_RESET)
        self._tell_config()

    def _guard(self, action: Callable[..., None], *arguments: object) -> None:
        try:
            action(*arguments)
        except Damaged as error:
            self._fail(str(error))
        except OSError as error:
            self._fail(f"the host: {error}")
            self.broken(self.failure)

    def _tell_config(self) -> None:
        self._words[reg.INTERRUPT_STATUS // 4] = reg.USED_BUFFER | reg.CONFIG_CHANGE
        self.interrupt()

    def _kick_all(self) -> None:
        for fd in self._kicks:
            os.eventfd_write(fd, 1)

    def _watch_kick(self, index: int) -> None:
        self._loop_watch(self._kicks[index], POLLIN, lambda _: self._kicked(index))

    def _kicked(self, index: int) -> None:
        with self._lock:
            try:
                os.eventfd_read(self._kicks[index])
            except BlockingIOError:  # a back-end of the kernel had it when the loop saw it
                return
            if self._active and self._slots[index].ready:
                self._guard(self.device.notified, index)

    def _loop_watch(self, fd: int, events: int, ready: Callable[[int], None]) -> None:
        self._loop.watch(fd, events, ready)
        if threading.get_ident() != self._thread:
            os.eventfd_write(self._wake, 1)  # the loop may be waiting without this descriptor

    def _woken(self, _: int) -> None:
        os.eventfd_read(self._wake)

    # What the device asks for; the lock is held

    def watch(self, fd: int, events: int, ready: Callable[[int], None]) -> None:
        def dispatch(revents: int) -> None:
            with self._lock:
                if fd in self._watched:  # a reset may have come between
                    self._guard(ready, revents)

        self._watched.add(fd)
        self._loop_watch(fd, events, dispatch)

    def unwatch(self, fd: int) -> None:
        self._watched.discard(fd)
        self._loop.unwatch(fd)

    def kick_fd(self, index: int) -> int:
        self._loop.unwatch(self._kicks[index])
        return self._kicks[index]

    def call_fd(self) -> int:
        return self._call

    def kick(self, index: int) -> None:
        os.eventfd_write(self._kicks[index], 1)

    def interrupt(self) -> None:
        self.interrupts += 1
        os.eventfd_write(self._call, 1)

    def refresh_config(self) -> None:
        config = self.device.config()
        generation = self._words[reg.CONFIG_GENERATION // 4]
        # A driver reads it before and after: it must differ for one that began before this write, and for one in its middle.
        self._words[reg.CONFIG_GENERATION // 4] = (generation + 1) & 0xFFFFFFFF
        self._page[reg.CONFIG : reg.CONFIG + len(config)] = config
        self._words[reg.CONFIG_GENERATION // 4] = (generation + 2) & 0xFFFFFFFF

    def config_changed(self) -> None:
        self.refresh_config()
        if self._status & reg.DRIVER_OK:
            self._tell_config()

    # What the machine asks for

    def run(self, action: Callable[[], None]) -> None:
        """Call something of the device from outside of its callbacks: `run(lambda: balloon.resize(...))`."""
        with self._lock:
            self._guard(action)

    def counters(self) -> dict[str, int]:
        """The device's, and `exits` (writes to registers), `interrupts`, `stopped` (1: until the guest resets it)."""
        more = {"exits": self.writes, "interrupts": self.interrupts, "stopped": int(bool(self.failure))}
        return self.device.counters() | more

    def save(self) -> State:
        """The state, while the vCPUs stand still. The device stands still as well until `resume`."""
        with self._lock:
            if self._active:
                self._guard(self.device.drain)
            return {
                "device": self.device.device_id, "status": self._status, "features": self._features,
                "feature_word": self._feature_word, "selected": self._selected, "failure": self.failure,
                "untold": self._words[reg.INTERRUPT_STATUS // 4] != reg.USED_BUFFER, "config": self.device.config().hex(),
                "queues": [slot.save() for slot in self._slots],
                "state": self.device.save(),
            }  # fmt: skip

    def restore(self, state: State) -> None:
        """Become what `save` described, standing still. Raises ValueError, KeyError, TypeError when it cannot be that."""
        with self._lock:
            self._stop()
            self._forget()
            queues, own = state["queues"], state["state"]
            if state["device"] != self.device.device_id or not isinstance(queues, list) or not isinstance(own, dict):
                raise ValueError(f"not the state of a {self.device.name} device")
            numbers = [state[key] for key in ("status", "features", "feature_word", "selected")]
            status, features, word, selected = (
                value for value in numbers if isinstance(value, int) and 0 <= value < 1 << 64
            )
            for slot, saved in zip(self._slots, queues, strict=True):
                slot.restore(saved)
            self._features, self._feature_word = features, word & 0xFFFFFFFF
            if status & reg.FEATURES_OK and not self._acceptable():
                raise ValueError(f"features {features:#x} of a {self.device.name} device, which has {self._offered:#x}")
            self.device.restore(own)
            self.refresh_config()
            self._select_queue(selected & 0xFFFFFFFF)
            self._put_status(status & 0xFF)
            self.failure = str(state["failure"])
            self._untold = state.get("untold") is True or state.get("config") != self.device.config().hex()
            if status & reg.DRIVER_OK and not status & reg.NEEDS_RESET:
                self._start()

    def resume(self) -> None:
        """Go on after `save` or `restore`: every queue is looked at, and the interrupt is raised that may have been owed,
        with news of the configuration if what is behind the device is not what it was."""
        with self._lock:
            if self._active:
                self._guard(self.device.resume)
            self._kick_all()
            if self._status & reg.DRIVER_OK:
                if self._untold:
                    self._tell_config()
                else:
                    self.interrupt()
            self._untold = False

    def remove(self, vm: Removable) -> None:
        """Take the device out of a machine that runs: stop it, let go of everything, and leave an empty slot."""
        with self._lock:
            self._stop()
            self._forget()
            if self._wake >= 0:
                vm.remove_irqfd(self._call, self._gsi)
                vm.remove_ioeventfd(self._swallow, self._base + reg.INTERRUPT_ACK, 4, datamatch=reg.USED_BUFFER)
                for index, fd in enumerate(self._kicks):
                    vm.remove_ioeventfd(fd, self._base + reg.QUEUE_NOTIFY, 4, datamatch=index)
        self.close()
        clear(self._page)

    def close(self) -> None:
        """Stop the device and let go of everything. Idempotent."""
        with self._lock:
            self._stop()
            fds, self._kicks = [self._wake, self._call, self._swallow, *self._kicks], []
            if self._wake >= 0:
                for fd in fds:
                    self._loop.unwatch(fd)
                    os.close(fd)
                self._wake = self._call = self._swallow = -1
                self.device.close()


def _address_register(word: int) -> Callable[[Transport, int], None]:
    return lambda transport, value: transport._queue_address(word, value)


_REGISTERS: dict[int, Callable[[Transport, int], None]] = {
    reg.DEVICE_FEATURES_SELECT: Transport._select_offered,
    reg.DRIVER_FEATURES: Transport._driver_features,
    reg.DRIVER_FEATURES_SELECT: Transport._select_driver_features,
    reg.QUEUE_SELECT: Transport._select_queue,
    reg.QUEUE_SIZE: Transport._queue_size,
    reg.QUEUE_READY: Transport._queue_ready,
    reg.QUEUE_NOTIFY: Transport._notify,
    reg.INTERRUPT_ACK: Transport._acknowledge,
    reg.STATUS: Transport._set_status,
    **{
        at + 4 * half: _address_register(2 * number + half)
        for number, at in enumerate((reg.QUEUE_DESCRIPTORS, reg.QUEUE_DRIVER, reg.QUEUE_DEVICE))
        for half in (0, 1)
    },
}
