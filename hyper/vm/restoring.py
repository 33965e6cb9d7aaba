"""A VM that goes on from a snapshot: what is checked before, copies of the disks, and when they take the old ones' place.

Restoring(...)      everything is read and checked, the disks are copied beside the old ones; nothing else has changed
.start(...)         the VMM, with the copies, where the saved one stood still
.take_place()       the guest has answered: the copies get the disks' names
.abandon()          instead of that: they are removed
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from ambi.core.deadline import Deadline
from ambi.core.errors import Corrupt, Unsupported, from_os_error
from ambi.core.plan import LaunchPlan, Layers
from ambi.core.undo import Undo
from hyper import translate
from hyper.vm import disk, saving, snapshots
from hyper.vm.backend import Files, Handles, Place, Snapshots
from hyper.vm.hardware import Hardware
from hyper.vm.monitor import Monitor
from hyper.vm.saving import Line
from hyper.vm.snapshots import Snapshot

BESIDE = ".restored-"  # and the name of a disk: its copy until the guest runs


def read(home: Path, plan: LaunchPlan) -> tuple[Snapshot, LaunchPlan]:
    """The snapshot, and the plan with the sizes that the machine had. Raises as snapshots.read."""
    snapshot = snapshots.read(home)
    shape = translate.shape(plan)._replace(vcpus=snapshot.vcpus, memory_bytes=snapshot.memory_bytes)
    return snapshot, plan._replace(vm=shape)


class Restoring:
    """Owns descriptors and the copies; `undo` lets go of them when what follows fails."""

    def __init__(
        self, snapshot: Snapshot, plan: LaunchPlan, backend: Snapshots, *, kvm: bool, undo: Undo, by: Deadline
    ) -> None:
        """Raises Corrupt, Unsupported, Conflict (the disk of a volume is in use), StorageFull."""
        self.snapshot = snapshot
        self._backend = backend
        self._kvm = kvm
        self._disks = saving.disks(plan)
        self._handles = Handles()
        self._copies: dict[str, int] = {}
        self._open = True
        undo.add("let go of the snapshot", self.abandon)
        saving.refuse_shares(plan)
        self._check_machine()
        try:
            self._chain = snapshots.chain(snapshot)
            self.files = self._open_files()
            backend.check(snapshot, self.files)
            snapshots.verify(snapshot._replace(files=_without_disks(snapshot)), by)
            self._lock_volumes(plan)
            for name, file in snapshot.disks.items():
                self._copy(name, file, by)
        except FileNotFoundError as error:
            raise Corrupt(f"snapshot {snapshot.name} is damaged: {error.filename} is gone", hint=snapshots.AGAIN) from error
        except OSError as error:
            raise from_os_error(f"cannot restore snapshot {snapshot.name}", error) from error

    def _check_machine(self) -> None:
        snapshot, backend = self.snapshot, self._backend
        if snapshot.vmm != backend.name:
            raise Unsupported(
                f"snapshot {snapshot.name} was made by another monitor: {snapshot.vmm}, here is {backend.name}",
                hint=f"{snapshots.ELSEWHERE}; `ambi doctor` shows which monitor runs here, and why",
            )
        here = backend.words(kvm=self._kvm)
        for what in sorted({*here, *snapshot.words}):
            if snapshot.words.get(what) != here.get(what):
                raise Unsupported(
                    f"snapshot {snapshot.name} was made with another {what}: {snapshot.words.get(what, 'none')},"
                    f" here is {here.get(what, 'none')}",
                    hint=snapshots.ELSEWHERE,
                )
        if set(snapshot.disks) != set(self._disks):
            raise Unsupported(
                f"snapshot {snapshot.name} has the disks {', '.join(sorted(snapshot.disks))},"
                f" and the machine {', '.join(sorted(self._disks))}",
                hint=snapshots.ELSEWHERE,
            )

    def _open_files(self) -> Files:
        opened = saving.open_chain(self._chain, self._handles)
        return Files(*opened[-1], opened[:-1])

    def _lock_volumes(self, plan: LaunchPlan) -> None:
        """The disks that are there are nobody else's as long as copies are to take their place."""
        for volume in translate.volumes(plan):
            if volume.name in self._disks:
                self._handles.add(disk.open_volume(volume))

    def _copy(self, name: str, file: str, by: Deadline) -> None:
        path = _beside(self._disks[name])
        path.unlink(missing_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        self._copies[name] = fd
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with open(self.snapshot.home / file, "rb") as source:
            snapshots.copy(source.fileno(), fd, by)
        size, digest = self.snapshot.files[file]
        snapshots.check_file(fd, size, digest, self.snapshot.home / file, by)

    @property
    def disks(self) -> dict[str, int]:
        """Descriptors of the copies, ours, by what the guest calls them."""
        return self._copies

    def line(self) -> Line:
        snapshot = self.snapshot
        line = Line(self._backend, kvm=self._kvm, common=snapshot.common, nics=snapshot.nics)
        line.homes += [it.home for it in self._chain]
        return line

    def start(self, hardware: Hardware, place: Place, by: Deadline) -> Monitor:
        return self._backend.restore(hardware, self.snapshot, self.files, place, by)

    def take_place(self) -> None:
        """The machine runs: from now on its disks are the instance's. Raises an AmbiError."""
        try:
            for name in self._copies:
                os.rename(_beside(self._disks[name]), self._disks[name])
        except OSError as error:
            raise from_os_error("cannot put the disks of a snapshot into their place", error) from error
        self.abandon()

    def abandon(self) -> None:
        """Let go of everything; copies that have not taken their place are removed. Idempotent."""
        if not self._open:
            return
        self._open = False
        for name, fd in self._copies.items():
            os.close(fd)
            _beside(self._disks[name]).unlink(missing_ok=True)
        self._handles.__exit__()


def _without_disks(snapshot: Snapshot) -> dict[str, tuple[int, str | None]]:
    return {name: it for name, it in snapshot.files.items() if name not in snapshot.disks.values()}


def _beside(path: Path) -> Path:
    return path.with_name(BESIDE + path.name)


def sweep(plan: LaunchPlan) -> None:
    """Remove copies that a dead shim left. Idempotent."""
    if isinstance(plan.rootfs, Layers):
        for path in saving.disks(plan).values():
            _beside(path).unlink(missing_ok=True)
