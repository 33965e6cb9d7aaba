"""A back-end: what turns hardware into a running VMM. `hyper/qemu/backend.py` and `hyper/vmm/backend.py` are two."""

from __future__ import annotations

import os
import socket
from typing import ClassVar, NamedTuple, Protocol

from ambi.core.deadline import Deadline
from hyper.vm.cgroup import Cgroup
from hyper.vm.hardware import Hardware
from hyper.vm.monitor import Monitor
from hyper.vm.snapshots import Snapshot


class Handles:
    """Descriptors for children: ours are closed once the children run, or when something went wrong before."""

    __slots__ = ("_fds",)

    def __init__(self) -> None:
        self._fds: list[int] = []

    def add(self, fd: int) -> int:
        self._fds.append(fd)
        return fd

    def socket_pair(self) -> tuple[socket.socket, int]:
        """A stream pair: our end, which is the caller's to close, and the descriptor for the child."""
        ours, theirs = socket.socketpair()
        return ours, self.add(theirs.detach())

    def __enter__(self) -> Handles:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._fds:
            os.close(fd)


class Place(NamedTuple):
    """Where a VMM runs: its user, its cgroup, where its own words go; what keeps the descriptors for it."""

    user: int
    cgroup: Cgroup
    output: int
    handles: Handles


class Templates(Protocol):
    """How a back-end saves an idle guest and goes on from copies of it; see hyper/vm/template.py for the rest.

    shares: whether a copy may have file trees by virtiofs, which its template has not.
    """

    shares: ClassVar[bool]

    def words(self, hardware: Hardware) -> tuple[str, ...]:
        """All that a saved guest of `hardware` depends on, beside its kernel and initramfs: a copy needs the same."""

    def boot(self, hardware: Hardware, place: Place, by: Deadline) -> Monitor:
        """Start `hardware`, which is blank and has shared memory in a file."""

    def save(self, monitor: Monitor, by: Deadline) -> bytes:
        """Stop the guest for good: all of its state but for the memory, which is complete in its file."""

    def restore(self, hardware: Hardware, state: bytes, place: Place, by: Deadline) -> Monitor:
        """Start `hardware`, whose memory is to be a copy of its file, where the saved guest stopped; it runs when this ends.

        Raises Unavailable, Internal (it is not to be restored), DeadlineExceeded; nothing runs then.
        """


class Files(NamedTuple):
    """Descriptors of the files of a snapshot. memory: -1 where it is in the state. parents: state and memory of those that
    it is a difference to, the first one first."""

    state: int
    memory: int
    parents: tuple[tuple[int, int], ...] = ()


class Still(NamedTuple):
    """A guest that stands still, since when (CLOCK_MONOTONIC). whole: what was saved is no difference to the parents."""

    since_ns: int
    whole: bool = True


class Snapshots(Protocol):
    """How a back-end saves users' machines and goes on with them; see hyper/vm/saving.py and restoring.py for the rest."""

    name: ClassVar[str]
    files: ClassVar[tuple[str, ...]]  # names of those that it writes

    def words(self, *, kvm: bool) -> dict[str, str]:
        """What must be the same here and there, by what people call it, beside what `check` looks at."""

    def save(self, monitor: Monitor, files: Files, by: Deadline) -> Still:
        """Write all of the machine but its disks into empty files. Nothing is in flight then: the disks may be copied.

        Raises an AmbiError; the guest may stand still then, too.
        """

    def go_on(self, monitor: Monitor, by: Deadline) -> None:
        """Idempotent."""

    def check(self, snapshot: Snapshot, files: Files) -> None:
        """Raises Unsupported (another host), Corrupt."""

    def restore(self, hardware: Hardware, snapshot: Snapshot, files: Files, place: Place, by: Deadline) -> Monitor:
        """Start `hardware`, which has its disks and no memory yet, where the saved guest stood; it runs when this returns.

        Raises as Templates.restore, and Corrupt for a damaged file; nothing runs then.
        """


class Backend(Protocol):
    """Stateless; loaded by the shim when it makes a VM."""

    def overhead_bytes(self, kvm: bool) -> int:
        """What the VMM and its virtiofsd may use beyond the guest's memory."""

    def start(self, hardware: Hardware, place: Place) -> Monitor:
        """Start the VMM at `place`; the guest is still to boot.

        `hardware.control` is still to be made. Nothing of ours is needed by path; `handles` closes our copies afterwards.
        Raises Unsupported when the program is not there.
        """

    def templates(self) -> Templates | None:
        """None: its guests always boot."""

    def snapshots(self) -> Snapshots: ...
