"""The vCPUs' threads. Each does nothing but KVM_RUN and, when the guest needs us, one access to a bus."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from hyper.kvm import api
from hyper.kvm.errors import KvmError
from hyper.kvm.vcpu import Vcpu
from hyper.vmm.bus import Bus

MAX_PLACES = 256  # that exits are counted by, one by one, of a vCPU; a hostile guest tries them all
OTHERS = ("other", 0)
RUN, PAUSE, STOP = "run", "pause", "stop"

Exits = dict[tuple[str, int], int]  # what and where (a port or an address), how often


class Vcpus:
    """ended: called from a vCPU's thread, once for each that cannot go on, with what happened in words: `shutdown` for a
    triple fault, else what KVM says."""

    __slots__ = ("_change", "_ended", "_exits", "_live", "_mmio", "_ports", "_still", "_threads", "_wanted", "all")

    def __init__(self, vcpus: Sequence[Vcpu], ports: Bus, mmio: Bus, ended: Callable[[str], None]) -> None:
        self.all = tuple(vcpus)
        self._ports = ports
        self._mmio = mmio
        self._ended = ended
        self._exits: list[Exits] = [{} for _ in vcpus]
        self._change = threading.Condition()
        self._wanted = PAUSE
        self._still = 0  # threads that wait for the next word
        self._live = 0
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Make the threads, which wait for `resume`. Idempotent."""
        if self._threads:
            return
        for vcpu, exits in zip(self.all, self._exits, strict=True):
            thread = threading.Thread(target=self._thread, args=(vcpu, exits), name=f"vcpu{vcpu.index}", daemon=True)
            self._threads.append(thread)
        self._live = len(self._threads)
        for thread in self._threads:
            thread.start()

    def pause(self) -> None:
        """Returns when no vCPU runs, each with its last instruction finished. Idempotent; nothing to do after `stop`."""
        with self._change:
            if self._wanted == STOP:
                return
            self._wanted = PAUSE
        self._kick()
        with self._change:
            self._change.wait_for(lambda: self._still >= self._live)

    def resume(self) -> None:
        """Idempotent."""
        with self._change:
            if self._wanted == PAUSE:
                self._wanted = RUN
                self._change.notify_all()

    def stop(self) -> None:
        """They end soon. From any thread, and for ever."""
        with self._change:
            self._wanted = STOP
            self._change.notify_all()
        self._kick()

    def join(self) -> None:
        """Wait for their ends, after `stop`."""
        for thread in self._threads:
            thread.join()

    def _kick(self) -> None:
        for vcpu in self.all:
            vcpu.kick()

    def exits(self) -> Exits:
        """What came to user space, of all of them: (`in`, `out`, `read`, `write`) and the address, or a reason and 0."""
        total: Exits = {}
        for exits in self._exits:
            for place, count in tuple(exits.items()):
                total[place] = total.get(place, 0) + count
        return total

    # in the threads

    def _thread(self, vcpu: Vcpu, exits: Exits) -> None:
        try:
            why = self._run(vcpu, exits)
        except KvmError as error:
            why = str(error)
        except Exception as error:  # of a device: the machine ends, and says what it was
            why = f"{type(error).__name__}: {error}"
        with self._change:
            self._live -= 1
            self._change.notify_all()
        if why:
            self._ended(why)

    def _run(self, vcpu: Vcpu, exits: Exits) -> str:
        """Until `stop` (then "") or something that nobody can go on after."""
        if not self._goes_on():
            return ""
        while True:
            reason = vcpu.run()
            if reason == api.KVM_EXIT_IO:
                self._io(vcpu, exits)
            elif reason == api.KVM_EXIT_MMIO:
                self._access(vcpu, exits)
            elif reason == api.KVM_EXIT_INTR:
                _count(exits, ("interrupted", 0))
                if not self._goes_on():
                    return ""
            elif reason == api.KVM_EXIT_SHUTDOWN:
                _count(exits, ("shutdown", 0))
                return "shutdown"
            else:
                return vcpu.describe_exit()

    def _io(self, vcpu: Vcpu, exits: Exits) -> None:
        io = vcpu.exit.io
        port, size, data = io.port, io.size, vcpu.io_data()
        if io.direction == api.KVM_EXIT_IO_OUT:
            _count(exits, ("out", port))
            for at in range(0, len(data), size):
                self._ports.write(port, bytes(data[at : at + size]))
        else:
            _count(exits, ("in", port))
            for at in range(0, len(data), size):
                data[at : at + size] = self._ports.read(port, size)

    def _access(self, vcpu: Vcpu, exits: Exits) -> None:
        mmio = vcpu.exit.mmio
        address, data = mmio.phys_addr, vcpu.mmio_data()
        if mmio.is_write:
            _count(exits, ("write", address))
            self._mmio.write(address, bytes(data))
        else:
            _count(exits, ("read", address))
            data[:] = self._mmio.read(address, len(data))

    def _goes_on(self) -> bool:
        """Stand still while that is wanted; False when it is over."""
        with self._change:
            if self._wanted == PAUSE:
                self._still += 1
                self._change.notify_all()
                self._change.wait_for(lambda: self._wanted != PAUSE)
                self._still -= 1
            return self._wanted == RUN


def _count(exits: Exits, place: tuple[str, int]) -> None:
    if place not in exits and len(exits) >= MAX_PLACES:
        place = OTHERS
    exits[place] = exits.get(place, 0) + 1
