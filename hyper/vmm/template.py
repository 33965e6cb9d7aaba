"""A guest of our monitor saved, and gone on with as a copy: its memory a file, the rest the state of saving.py."""

from __future__ import annotations

import os
from typing import ClassVar

from ambi.core.deadline import Deadline
from ambi.core.errors import Internal, Unavailable
from ambi.core.version import VERSION
from ambi.linux import memfd
from hyper import probe
from hyper.vm.backend import Place
from hyper.vm.hardware import Hardware
from hyper.vm.monitor import Monitor, end
from hyper.vmm.monitor import VmmMonitor
from hyper.vmm.start import configure, start

MAX_STATE = 8 << 20
WORD = "ambi.disks"  # of the kernel's command line: a template's disks have their driver, which is told what a copy's have


class VmmTemplates:
    """Implements hyper.vm.backend.Templates."""

    shares: ClassVar[bool] = True

    def words(self, hardware: Hardware) -> tuple[str, ...]:
        same = _bound(hardware)._replace(
            name="", kernel=0, initramfs=0, agent=0, console=0, control=0, memory=None, blank=True
        )
        return ("vmm", VERSION, os.uname().release, probe.processor(), str(configure(same, -1)))

    def boot(self, hardware: Hardware, place: Place, by: Deadline) -> VmmMonitor:
        return start(_bound(hardware), place)

    def save(self, monitor: Monitor, by: Deadline) -> bytes:
        assert isinstance(monitor, VmmMonitor)
        fd = os.memfd_create("state", os.MFD_CLOEXEC)
        try:
            monitor.call("save", by, (fd,))
            size = os.fstat(fd).st_size
            if size > MAX_STATE:
                raise Internal(f"the state of a guest has {size} bytes, more than {MAX_STATE}")
            return os.pread(fd, size, 0)
        finally:
            os.close(fd)

    def restore(self, hardware: Hardware, state: bytes, place: Place, by: Deadline) -> VmmMonitor:
        monitor = start(hardware, place, state=place.handles.add(memfd.sealed("state", state)))
        try:
            monitor.call("resume", by)  # answered once it runs
        except BaseException as error:
            monitor.child.kill()
            why = monitor.why()
            end(monitor)
            if isinstance(error, Unavailable) and why:
                raise Unavailable(why) from error
            raise
        return monitor


def _bound(hardware: Hardware) -> Hardware:
    """Its guest binds the disks of the template."""
    return hardware._replace(words=(*hardware.words, WORD))
