"""The whole machine: memory, interrupt controllers, buses, devices, vCPUs; and how it ended."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from ambi.core.errors import InvalidRequest, NotFound
from ambi.core.loop import POLLIN, Loop
from ambi.core.undo import Undo
from ambi.linux import memfd
from hyper.kvm import api
from hyper.kvm.cpuid import CpuidEntry
from hyper.kvm.memory import Memory
from hyper.kvm.stats import stats
from hyper.kvm.system import Kvm
from hyper.kvm.vcpu import Vcpu
from hyper.vmm import layout
from hyper.vmm.boot import cpuid, load, registers
from hyper.vmm.bus import Bus
from hyper.vmm.config import Config, check, slots_of
from hyper.vmm.console import Console
from hyper.vmm.devices import build as build_devices
from hyper.vmm.fill import fill
from hyper.vmm.memory import GuestMemory, Region
from hyper.vmm.pci import PORTS as PCI_PORTS
from hyper.vmm.pci import WORDS as PCI_WORDS
from hyper.vmm.pci import ConfigPorts
from hyper.vmm.power import ResetLine, SleepControl
from hyper.vmm.snapshot_memory import Look
from hyper.vmm.uart import Uart
from hyper.vmm.vcpus import Vcpus
from hyper.vmm.virtio import mmio
from hyper.vmm.virtio.blk import Blk
from hyper.vmm.virtio.device import Device
from hyper.vmm.virtio.mem import Mem

D = TypeVar("D", bound=Device)

NEEDED = (
    api.KVM_CAP_IRQCHIP, api.KVM_CAP_USER_MEMORY, api.KVM_CAP_READONLY_MEM, api.KVM_CAP_IRQFD, api.KVM_CAP_IOEVENTFD,
    api.KVM_CAP_IMMEDIATE_EXIT, api.KVM_CAP_TSC_DEADLINE_TIMER, api.KVM_CAP_EXT_CPUID,
)  # fmt: skip
WORDS = (*PCI_WORDS, "i8042.nopnp=0")  # ACPI says that there is no keyboard controller: the kernel need not try its ports
HOTPLUG_SLOT = 7  # the memory slot of the region of memory that comes later
REGISTER_SLOT = 8  # the memory slot of the virtio register pages; RAM has those below, windows of devices those above


def _reader(look: Look, region: Region, offset: int) -> Callable[[int, int], bytes | bytearray]:
    return lambda at, length: look.read(region, at, length // layout.PAGE, offset + at)


class Ending(NamedTuple):
    """How a machine ended: a cause of PROTOCOL.md, what there is to say about it, and the class of an error that it was."""

    cause: str
    detail: str = ""
    kind: str = ""


class Machine:
    """A machine that is ready to boot. `close` undoes what it made. Descriptors of the configuration stay the caller's, but
    for those of its devices."""

    def __init__(self, config: Config, loop: Loop) -> None:
        """Raises InvalidRequest, Unsupported, KvmError and OSError; then nothing is left."""
        check(config)
        self.config = config
        self.ending: Ending | None = None
        self.ports = Bus()
        self.mmio = Bus()
        self.transports: list[mmio.Transport] = []  # by slot
        self._vacant: set[int] = set()  # slots among them whose device is gone
        self.region = layout.hotplug(config.memory_bytes, config.hotplug_bytes)
        self.grown = False  # there is memory in the region
        self._loop = loop
        self._lock = threading.Lock()
        self._undo = Undo()
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    # making it, in this order

    def _build(self) -> None:
        self.kvm = kvm = Kvm(os.dup(self.config.kvm))
        self._undo.add("close KVM", kvm.close)
        kvm.require(*NEEDED)
        self.vm = kvm.create_vm()
        self._undo.add("close the VM", self.vm.close)
        self._pieces = layout.ram(self.config.memory_bytes)
        self.ram = tuple(self._own(self._make_ram(piece)) for piece in self._pieces)
        for slot, (piece, memory) in enumerate(zip(self._pieces, self.ram, strict=True)):
            self.vm.add_memory(slot, piece.gpa, memory)
        self.memory = self.booted
        self.vm.create_irqchip()
        self._add_ports()
        self._add_slots()
        supported = kvm.supported_cpuid()
        vcpus = [self._make_vcpu(supported, index) for index in range(self.config.vcpus)]
        self.vcpus = Vcpus(vcpus, self.ports, self.mmio, self._failed)
        self._stats = self._open_stats()

    def _open_stats(self) -> list[int]:
        """The kernel's counters of the VM and of each vCPU. Now: a vCPU that runs has nobody open them."""
        if not self.vm.check(api.KVM_CAP_BINARY_STATS_FD):
            return []
        fds = [self.vm.stats_fd(), *(vcpu.stats_fd() for vcpu in self.vcpus.all)]
        for fd in fds:
            self._undo.add("close statistics", lambda fd=fd: os.close(fd))  # type: ignore[misc]
        return fds

    def _own(self, memory: Memory) -> Memory:
        self._undo.add("unmap memory", memory.close)
        return memory

    def _make_ram(self, piece: layout.Piece) -> Memory:
        if self.config.memory < 0:
            return Memory(piece.size)
        memory = Memory.of_file(self.config.memory, piece.size, piece.offset, shared=self.config.memory_shared)
        if self.config.source >= 0:
            fill(memory.view, self.config.source, piece.offset)
        return memory

    def _add_ports(self) -> None:
        self._wake = self._eventfd()
        self._loop.watch(self._wake, POLLIN, lambda _: None)
        self._undo.add("unwatch the end", lambda: self._loop.unwatch(self._wake))
        self.console = Console(self._loop, self.config.console)
        self._undo.add("close the console", self.console.close)
        line = self._eventfd()
        self.vm.irqfd(line, layout.COM1_IRQ)
        self.uart = Uart(self.console.put, lambda: os.eventfd_write(line, 1))
        self.ports.add(layout.COM1, 8, self.uart)
        swallow = self._eventfd()
        for port in (layout.PORT_CMOS, layout.PORT_CMOS + 1):  # the first CPU writes there for each other one that it starts
            self.vm.ioeventfd(swallow, port, 1, pio=True)
        self.ports.add(layout.PORT_PCI, PCI_PORTS, ConfigPorts())
        self.ports.add(layout.PORT_I8042, 5, ResetLine(lambda: self._reset(crashed=False)))
        self.ports.add(layout.PORT_SLEEP, 2, SleepControl(lambda: self.end("guest-shutdown")))

    def _eventfd(self) -> int:
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._undo.add("close an eventfd", lambda: os.close(fd))
        return fd

    def _add_slots(self) -> None:
        """The register pages of all slots, read-only for the guest, and a device behind each but the spare ones."""
        self.slots = slots_of(self.config)
        self.pages = self._own(Memory(self.slots * layout.PAGE))
        for slot in range(self.slots):
            mmio.clear(self._page(slot))
        self.vm.add_memory(REGISTER_SLOT, layout.VIRTIO, self.pages, readonly=True)
        for device in build_devices(self.config):
            self.plug(device)

    def _page(self, slot: int) -> memoryview:
        return self.pages.view[slot * layout.PAGE : (slot + 1) * layout.PAGE]

    def plug(self, device: Device) -> int:
        """Put `device`, which it takes over, into the next free slot; returns its number. The guest finds it at boot,
        or when its agent binds the driver. The caller sees to it that there is one: `has_room`."""
        slot = min(self._vacant, default=len(self.transports))
        base = layout.slot_address(slot)
        transport = mmio.Transport(self.vm, self.memory, self._page(slot), base, layout.slot_gsi(slot), device, self._loop)
        transport.broken = lambda why: self.end("device", f"{device.name}{slot}: {why}")
        self.transports[slot : slot + 1] = [transport]
        self._vacant.discard(slot)
        self._undo.add(f"close the {device.name} device", transport.close)
        self.mmio.add(base, layout.PAGE, transport)
        return slot

    @property
    def has_room(self) -> bool:
        """Whether a slot is empty."""
        return len(self.transports) - len(self._vacant) < self.slots

    def unplug(self, slot: int) -> None:
        """Take the device of `slot` away, whatever the guest does with it; the slot is empty then.

        Raises NotFound when nothing is in it, KvmError.
        """
        if not 0 <= slot < len(self.transports) or slot in self._vacant:
            raise NotFound(f"the machine has no device in slot {slot}")
        self.transports[slot].remove(self.vm)
        self.mmio.remove(layout.slot_address(slot))
        self._vacant.add(slot)
        while len(self.transports) - 1 in self._vacant:
            self._vacant.discard(len(self.transports) - 1)
            del self.transports[-1]

    def share_memory(self) -> int:
        """A descriptor of the file that RAM is, which others can map. Memory that is ours alone is moved into one, for which
        the machine stands still. Raises OSError; the machine goes on as it was."""
        config = self.config
        if config.memory >= 0 and config.memory_shared:
            return config.memory
        fd = memfd.sized("guest memory", config.memory_bytes)
        self.vcpus.pause()
        try:
            for transport in self.transports:
                transport.save()  # so that nothing writes, in the kernel neither
            look = None if config.pagemap < 0 else Look(config.pagemap, config.memory)
            for region, piece, memory in zip(self.booted.regions, self._pieces, self.ram, strict=True):
                memory.share(fd, piece.offset, _reader(look, region, piece.offset) if look else None)
            if self.grown:
                self._share_region()
        except BaseException:
            self.config = config._replace(pagemap=-1)  # which tells nothing of memory that is a file's in part
            os.close(fd)
            raise
        finally:
            self.resume()
        self._undo.add("close the memory", lambda: os.close(fd))
        self.config = config._replace(memory=fd, memory_shared=True)
        return fd

    def _share_region(self) -> None:
        place = self.memory.regions[-1]
        region = place.memory
        assert isinstance(region, Memory)
        look = None if self.config.pagemap < 0 else Look(self.config.pagemap)
        own = memfd.sized("guest memory", region.size)
        try:
            region.share(own, 0, _reader(look, place, 0) if look else None)
        except BaseException:
            os.close(own)
            raise
        region.fd = own

    def _make_vcpu(self, supported: list[CpuidEntry], index: int) -> Vcpu:
        vcpu = self.vm.create_vcpu(index)
        self._undo.add("close a vCPU", vcpu.close)
        vcpu.set_cpuid(cpuid.for_vcpu(supported, index, self.config.vcpus))
        vcpu.set_msrs(registers.msrs())
        return vcpu

    # its life

    def boot(self) -> None:
        """Put the kernel into memory and the first vCPU at its entry. Raises as `load.load`."""
        cmdline = " ".join((self.config.cmdline, *WORDS)).strip()
        sources = load.Sources(self.config.kernel, self.config.initramfs, cmdline)
        entry = load.load(self.memory, self._pieces, sources, vcpus=self.config.vcpus, slots=self.slots)
        first = self.vcpus.all[0]
        sregs = first.sregs
        registers.set_segments(sregs, entry)
        control = registers.control_registers(entry)
        sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = control
        first.set_sregs(sregs)
        regs = first.regs
        for name, value in registers.general_registers(entry).items():
            setattr(regs, name, value)
        first.set_regs(regs)

    def start(self) -> None:
        """Make the vCPUs' threads: no other thread is made later. `run` does it where nothing comes in between."""
        self.vcpus.start()

    def run(self) -> Ending:
        """Run until the guest, a device or `end` ends it. No vCPU runs afterwards."""
        self.start()
        self.resume()
        try:
            self._loop.run(lambda: self.ending is not None)
        finally:
            self.vcpus.stop()
            self.vcpus.join()
            self.console.flush()
        assert self.ending is not None
        return self.ending

    def pause(self) -> None:
        """No vCPU runs until `resume`. Idempotent. From the loop's thread."""
        self.vcpus.pause()

    def resume(self) -> None:
        """Go on, also after `saving`: devices first, which tell the guest again what it may have missed."""
        for transport in self.transports:
            transport.resume()
        self.vcpus.resume()

    # changes while it runs, from the loop's thread

    def resize_memory(self, size_bytes: int) -> int:
        """Ask the guest to use so much beyond what it booted with; how much it uses now, which follows when it likes.

        Raises InvalidRequest (more than it can ever have), OSError; nothing is changed then.
        """
        found = self._find(Mem)
        most = 0 if self.region is None else self.region.size
        if found is None or not 0 <= size_bytes <= most:
            raise InvalidRequest(
                f"a virtual machine that booted with {self.config.memory_bytes >> 20} MiB can have {most >> 20} MiB more,"
                f" not {size_bytes >> 20}"
            )
        transport, device = found
        if size_bytes and not self.grown:
            self._add_region()
        transport.run(lambda: device.resize(size_bytes))
        return device.plugged

    @property
    def booted(self) -> GuestMemory:
        """The RAM that the machine began with."""
        return GuestMemory((piece.gpa, memory) for piece, memory in zip(self._pieces, self.ram, strict=True))

    def memory_plugged(self) -> int:
        """What the guest uses beyond what it booted with."""
        found = self._find(Mem)
        return found[1].plugged if found else 0

    def _add_region(self) -> None:
        """The whole region, of which nothing is there until it is touched. It stays until the end."""
        assert self.region is not None
        shared = self.config.memory >= 0 and self.config.memory_shared
        memory = Memory.memfd(self.region.size, "guest memory") if shared else Memory(self.region.size)
        try:
            self.vm.add_memory(HOTPLUG_SLOT, self.region.gpa, memory)
        except BaseException:
            memory.close()
            raise
        self._own(memory)
        self.memory.add(self.region.gpa, memory)
        self.grown = True
        for transport in self._live():
            transport.run(transport.device.memory_changed)

    def resize_disk(self, serial: str) -> int:
        """Look at the size of the file behind the disk `serial` again, and tell the guest: bytes. Raises NotFound."""
        for transport in self._live():
            device = transport.device
            if isinstance(device, Blk) and device.serial == serial:
                transport.run(device.refresh)
                return device.size
        raise NotFound(f"the machine has no disk {serial}")

    def _live(self) -> list[mmio.Transport]:
        """Those whose device is there."""
        return [transport for slot, transport in enumerate(self.transports) if slot not in self._vacant]

    def _find(self, kind: type[D]) -> tuple[mmio.Transport, D] | None:
        return next(((t, t.device) for t in self.transports if isinstance(t.device, kind)), None)

    def end(self, cause: str, detail: str = "") -> None:
        """End the machine, from any thread; the first to say so is believed."""
        with self._lock:
            if self.ending is None:
                self.ending = Ending(cause, detail)
        self.vcpus.stop()
        os.eventfd_write(self._wake, 1)

    def _failed(self, why: str) -> None:
        """A vCPU cannot go on."""
        if why == "shutdown":
            self._reset(crashed=True)
        else:
            self.end("internal", why)

    def _reset(self, *, crashed: bool) -> None:
        """The guest resets the machine: by the reset line, or (crashed) by a triple fault, which is how `reboot=t` does it.
        What the kernel said before tells why."""
        panic = self.console.panic()
        if panic:
            self.end("guest-panic", panic)
        elif crashed and not self.console.restarted():
            self.end("guest-crash", "a triple fault")
        else:
            self.end("guest-reset")

    # figures

    def exits(self) -> dict[str, int]:
        """Exits to user space by cause: `out 0x3f8`, `write 0xd0000070`, `interrupted`."""
        places = sorted(self.vcpus.exits().items(), key=lambda item: -item[1])
        return {f"{what} {where:#x}" if where else what: count for (what, where), count in places}

    def counters(self) -> dict[str, dict[str, int]]:
        """Of each device, by its name and slot: `console0`."""
        return {f"{t.device.name}{slot}": t.counters() for slot, t in enumerate(self.transports) if slot not in self._vacant}

    def kernel_stats(self) -> dict[str, int]:
        """The kernel's own counters of the VM and all its vCPUs; empty where the kernel has none."""
        total: dict[str, int] = {}
        for fd in self._stats:
            for name, value in stats(fd).items():
                total[name] = total.get(name, 0) + value
        return total

    def close(self) -> None:
        """Idempotent. After `run`, or without it."""
        self._undo.run()
