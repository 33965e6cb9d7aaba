"""A user's VM of QEMU saved, and gone on with: a migration into a file, the memory with it.

QEMU saves no machine that reads a VMDK, although nobody writes to ours. So while the guest stands still its disk of layers
is parted from the VMDK, which is closed, and joined to it again afterwards. Every snapshot is whole.
"""

from __future__ import annotations

import os
import time
from typing import Any, ClassVar

from ambi.core.deadline import Deadline
from ambi.core.errors import Corrupt, Internal, Unavailable, Unsupported
from ambi.core.version import VERSION
from ambi.linux import memfd
from hyper import probe
from hyper.qemu import argv
from hyper.qemu.monitor import QemuMonitor
from hyper.qemu.start import start
from hyper.qemu.template import start_with_memory
from hyper.vm.backend import Files, Place, Still
from hyper.vm.hardware import Hardware, Memory
from hyper.vm.monitor import SNAPSHOT, Monitor, end, number
from hyper.vm.snapshots import AGAIN, STATE, Snapshot

BANDWIDTH = 1 << 40  # bytes a second, so as fast as the disk
NOTHING = "nothing"  # the node that takes the VMDK's place
LOOK_S = 0.005  # between two looks at how far it is
NOT_SHARED = ({"capability": "x-ignore-shared", "state": False},)


class QemuSnapshots:
    """Implements hyper.vm.backend.Snapshots."""

    name: ClassVar[str] = "qemu"
    files: ClassVar[tuple[str, ...]] = (STATE,)

    def words(self, *, kvm: bool) -> dict[str, str]:
        qemu = probe.find_qemu()
        if qemu is None:
            raise Unsupported("there is no QEMU", hint="apt-get install qemu-system-x86")
        path = os.path.realpath(qemu)
        info = os.stat(path)
        found = {"version of ambi": VERSION, "QEMU": f"{path} of {info.st_size} bytes, {info.st_mtime_ns}"}
        if kvm:
            found |= {"kernel": os.uname().release, "processor": probe.processor()}
        return {**found, "accelerator": "kvm" if kvm else "tcg"}

    def save(self, monitor: Monitor, files: Files, by: Deadline) -> Still:
        assert isinstance(monitor, QemuMonitor)
        qmp = monitor.qmp
        since = time.monotonic_ns()
        qmp.execute("stop", by)
        _part(monitor, by)
        qmp.execute("migrate-set-capabilities", by, capabilities=NOT_SHARED)
        qmp.execute("migrate-set-parameters", by, **{"max-bandwidth": BANDWIDTH})
        qmp.send_fd("state", files.state, by)
        qmp.execute("migrate", by, uri="fd:state")
        while (status := _status(monitor, by))[0] != "completed":
            if status[0] in ("failed", "cancelled"):
                raise _failed(files.state, status[1])
            by.check("the state of the virtual machine")
            time.sleep(LOOK_S)
        return Still(since)

    def go_on(self, monitor: Monitor, by: Deadline) -> None:
        """A save that is under way is given up first."""
        assert isinstance(monitor, QemuMonitor)
        while _status(monitor, by)[0] not in ("", "completed", "failed", "cancelled"):
            monitor.qmp.execute("migrate_cancel", by)
            time.sleep(LOOK_S)
        _join(monitor, by)
        monitor.qmp.execute("cont", by)

    def check(self, snapshot: Snapshot, files: Files) -> None:
        """The words are all that there is."""

    def restore(self, hardware: Hardware, snapshot: Snapshot, files: Files, place: Place, by: Deadline) -> QemuMonitor:
        if snapshot.common:  # its memory was in a file, and has another name in the stream then
            fd = place.handles.add(memfd.sized("guest memory", hardware.memory_bytes))
            monitor = start_with_memory(hardware._replace(memory=Memory(fd, shared=True)), place, by, files.state)
        else:
            monitor = start(hardware, place, state=files.state)
        monitor.origin = SNAPSHOT
        try:
            os.lseek(files.state, 0, os.SEEK_SET)  # which it shares with us
            monitor.qmp.execute("migrate-incoming", by, uri=f"fd:{files.state}")
            while (status := _status(monitor, by))[0] != "completed":
                if status[0] == "failed":
                    raise Corrupt(
                        f"QEMU cannot go on from the saved state: {status[1] or 'it does not say why'}", hint=AGAIN
                    )
                by.check("the restore of the virtual machine")
                time.sleep(LOOK_S)
            monitor.qmp.execute("cont", by)
        except BaseException:
            end(monitor)
            raise
        return monitor


def _part(monitor: QemuMonitor, by: Deadline) -> None:
    """Close the VMDK: nothing as large is in its place."""
    if monitor.layers is None:
        return
    image = _nodes(monitor, by).get(argv.EXTENTS, {}).get("image")
    size = number(image.get("virtual-size")) if isinstance(image, dict) else 0
    nothing = {"driver": "null-co", "node-name": NOTHING, "size": size, "read-only": True, "read-zeroes": True}
    monitor.parted = True
    monitor.qmp.execute("blockdev-add", by, **nothing)
    _read_from(monitor, NOTHING, by)
    monitor.qmp.execute("blockdev-del", by, **{"node-name": argv.EXTENTS})


def _join(monitor: QemuMonitor, by: Deadline) -> None:
    """Undo `_part`, also one that was not finished."""
    if not monitor.parted:
        return
    nodes = _nodes(monitor, by)
    if argv.EXTENTS not in nodes:
        file = {"driver": "file", "read-only": True, "filename": f"/dev/fdset/{monitor.layers}"}
        vmdk = {"driver": "vmdk", "node-name": argv.EXTENTS, "read-only": True, "file": file}
        monitor.qmp.execute("blockdev-add", by, **vmdk)
    if NOTHING in nodes:
        _read_from(monitor, argv.EXTENTS, by)
        monitor.qmp.execute("blockdev-del", by, **{"node-name": NOTHING})
    monitor.parted = False


def _nodes(monitor: QemuMonitor, by: Deadline) -> dict[str, dict[str, Any]]:
    """What QEMU tells of its block nodes, by name."""
    answer = monitor.qmp.execute("query-named-block-nodes", by, flat=True)
    if not isinstance(answer, list) or not all(isinstance(it, dict) for it in answer):
        raise Unavailable("QEMU's answer about its disks is damaged")
    return {str(it.get("node-name")): it for it in answer}


def _read_from(monitor: QemuMonitor, node: str, by: Deadline) -> None:
    options = {"driver": "raw", "node-name": "layers", "read-only": True, "file": node}
    monitor.qmp.execute("blockdev-reopen", by, options=[options])


def _status(monitor: QemuMonitor, by: Deadline) -> tuple[str, str]:
    """How far a migration is, "" before the first, and what QEMU says about a failure. Raises Unavailable."""
    answer = monitor.qmp.execute("query-migrate", by)
    if not isinstance(answer, dict):
        raise Unavailable("QEMU's answer about its migration is damaged")
    text = answer.get("error-desc")
    return str(answer.get("status", "")), "".join(c for c in str(text or "") if c.isprintable())[:300]


def _failed(fd: int, text: str) -> Exception:
    """A stream that QEMU could not write; a full disk is the usual cause, which QEMU does not always name."""
    try:
        os.pwrite(fd, bytes(1), os.fstat(fd).st_size)
    except OSError as error:
        return error
    return Internal(f"QEMU did not save its state: {text or 'it does not say why'}")
