"""A guest of QEMU saved and restored: its memory a file that the migration leaves alone, the rest a stream.

A stream fits its QEMU's build, machine and list of devices, so all of that is in `words`. The memory of a restored guest is
a private mapping. QEMU opens its file for writing all the same (before 8.2 without a choice), so the open is answered with
a descriptor for reading: a QEMU that is taken over cannot change what other guests start from.
"""

from __future__ import annotations

import fcntl
import os
import select
from typing import ClassVar

from ambi.core.deadline import Deadline
from ambi.core.errors import DeadlineExceeded, Internal, Unavailable, Unsupported, from_os_error
from ambi.linux.handover import Handover
from hyper import probe
from hyper.qemu import argv
from hyper.qemu.monitor import QemuMonitor
from hyper.qemu.start import start
from hyper.vm.backend import Place
from hyper.vm.hardware import Hardware, Memory
from hyper.vm.monitor import Monitor, end

MAX_STATE = 1 << 20  # bytes: what a pipe takes; 0.4 MiB is usual
CAPABILITY = ({"capability": "x-ignore-shared", "state": True},)


class QemuTemplates:
    """Implements hyper.vm.backend.Templates."""

    shares: ClassVar[bool] = False  # QEMU's device for virtiofsd is not to be saved, nor is there one without a virtiofsd

    def words(self, hardware: Hardware) -> tuple[str, ...]:
        qemu = probe.find_qemu()
        if qemu is None:
            raise Unsupported("there is no QEMU", hint="apt-get install qemu-system-x86")
        info = os.stat(qemu)
        same = hardware._replace(
            name="", kernel=0, initramfs=0, agent=0, console=0, control=0, memory=Memory(0, shared=True), blank=True
        )
        cpu = probe.processor() if hardware.kvm else ""
        return (os.path.realpath(qemu), str(info.st_size), str(info.st_mtime_ns), cpu, *argv.build(qemu, same))

    def boot(self, hardware: Hardware, place: Place, by: Deadline) -> QemuMonitor:
        return start_with_memory(hardware, place, by)

    def save(self, monitor: Monitor, by: Deadline) -> bytes:
        assert isinstance(monitor, QemuMonitor)
        reader, writer = os.pipe2(os.O_CLOEXEC)
        try:
            try:
                monitor.qmp.execute("migrate-set-capabilities", by, capabilities=CAPABILITY)
                monitor.qmp.send_fd("state", writer, by)
            finally:
                os.close(writer)
            monitor.qmp.execute("migrate", by, uri="fd:state")
            state = _read(reader, by)
        finally:
            os.close(reader)
        answer = monitor.qmp.execute("query-migrate", by)
        if not isinstance(answer, dict) or answer.get("status") != "completed":
            raise Internal("QEMU did not save its state")
        return state

    def restore(self, hardware: Hardware, state: bytes, place: Place, by: Deadline) -> QemuMonitor:
        reader = place.handles.add(_filled_pipe(state))
        monitor = start_with_memory(hardware, place, by, reader)
        try:
            monitor.qmp.execute("migrate-set-capabilities", by, capabilities=CAPABILITY)
            monitor.qmp.execute("migrate-incoming", by, uri=f"fd:{reader}")
            monitor.qmp.wait_for("RESUME", by)
        except BaseException:
            end(monitor)
            raise
        return monitor


def start_with_memory(hardware: Hardware, place: Place, by: Deadline, state: int | None = None) -> QemuMonitor:
    """Start QEMU and give it its memory."""
    assert hardware.memory is not None
    handover = Handover(argv.MEMORY_PATH)
    try:
        monitor = start(hardware, place, before=handover.announce, state=state)
        try:
            handover.give(hardware.memory.fd, monitor.child.pidfd, by)
        except BaseException:
            end(monitor)
            raise
    finally:
        handover.close()
    return monitor


def _filled_pipe(state: bytes) -> int:
    """The read end of a pipe that has all of `state`, and no writer."""
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, MAX_STATE)
        if os.write(writer, state) < len(state):
            raise Internal(f"the saved state of a guest has {len(state)} bytes: more than {MAX_STATE}")
        os.set_blocking(reader, True)
    except OSError as error:
        os.close(reader)
        raise from_os_error("cannot hand QEMU the state of a guest", error) from error
    except BaseException:
        os.close(reader)
        raise
    finally:
        os.close(writer)
    return reader


def _read(reader: int, by: Deadline) -> bytes:
    """Everything until the writer closes."""
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    state = bytearray()
    while True:
        if not poll.poll(by.milliseconds()):
            raise DeadlineExceeded("QEMU did not save its state in time")
        data = os.read(reader, 1 << 16)
        if not data:
            return bytes(state)
        state += data
        if len(state) > MAX_STATE:
            raise Unavailable(f"the state of a guest has more than {MAX_STATE} bytes")
