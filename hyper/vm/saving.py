"""A running VM saved: its machine and its writable disks, taken while the guest stands still. snapshots.py has the files."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from ambi.core.deadline import Deadline
from ambi.core.errors import AmbiError, Unsupported, from_os_error
from ambi.core.plan import LaunchPlan, Layers
from hyper import translate
from hyper.vm import snapshots, vsock
from hyper.vm.backend import Files, Handles, Snapshots
from hyper.vm.monitor import Monitor
from hyper.vm.snapshots import MEMORY, STATE, Snapshot


class Line:
    """What snapshots of a machine must know of it, beside its plan; and those that were made of it, or that it goes on from.

    kvm: whether the host runs it. common: it has the devices of a template. nics: how many devices of networks it has.
    """

    __slots__ = ("backend", "common", "homes", "kvm", "nics")

    def __init__(self, backend: Snapshots, *, kvm: bool, common: bool, nics: int) -> None:
        self.backend = backend
        self.kvm = kvm
        self.common = common
        self.nics = nics
        self.homes: list[Path] = []  # the latest last

    def parents(self, memory_bytes: int) -> list[Snapshot]:
        """The chain that a snapshot may be a difference to; [] when it is to be whole."""
        if MEMORY not in self.backend.files:
            return []
        for home in reversed(self.homes):
            try:
                found = snapshots.chain(snapshots.read(home))
            except AmbiError:  # it was removed, or is damaged
                continue
            same = all(
                it.vmm == self.backend.name and it.memory_bytes == memory_bytes and MEMORY in it.files for it in found
            )
            if same and len(found) < snapshots.MAX_CHAIN:
                return found
        return []


def refuse_shares(plan: LaunchPlan) -> None:
    """Raises Unsupported for a machine with file trees by virtiofs, or with sockets to its host."""
    if vsock.wanted(plan):
        raise Unsupported(
            "a virtual machine with sockets to its host cannot be saved",
            hint=f"make it without --annotation {vsock.ANNOTATION}",
        )
    if not translate.shares(plan):
        return
    mounts = (mount["destination"] for mount in plan.config.get("mounts") or () if translate.is_bind(mount))
    what = ", ".join(mounts) if isinstance(plan.rootfs, Layers) else "/"
    raise Unsupported(
        f"a virtual machine with file trees of the host cannot be saved: {what}",
        hint="use a disk in their place: ambi volume create -o type=disk -o size=1g NAME",
    )


def disks(plan: LaunchPlan) -> dict[str, Path]:
    """Where the writable disks lie, by what the guest calls them."""
    assert isinstance(plan.rootfs, Layers)
    found = {"disk": plan.rootfs.upper / snapshots.DISK}
    return found | {volume.name: volume.path for volume in translate.volumes(plan) if not volume.readonly}


def save(line: Line, plan: LaunchPlan, monitor: Monitor, home: Path, by: Deadline) -> dict[str, Any]:
    """Write the files of the snapshot `home` into its draft; the guest stands still when this returns.

    The result is a manifest for `snapshots.publish`, without what only the caller knows; `still_ns` is when the guest began
    to stand still (CLOCK_MONOTONIC). Raises an AmbiError; it may stand still then, too.
    """
    memory_bytes = translate.shape(plan).memory_bytes
    parents = line.parents(memory_bytes)
    sources = disks(plan)
    names = [*line.backend.files, *(f"{name}.img" for name in sources)]
    try:
        with Handles() as handles:
            draft = snapshots.draft_of(home)
            targets = {name: handles.add(snapshots.create_file(draft, name)) for name in names}
            files = Files(targets[STATE], targets.get(MEMORY, -1), open_chain(parents, handles))
            opened = {name: handles.add(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) for name, path in sources.items()}
            still = line.backend.save(monitor, files, by)
            for name, source in opened.items():
                snapshots.copy(source, targets[f"{name}.img"], by)
    except OSError as error:
        raise from_os_error(f"cannot write snapshot {home.name}", error) from error
    return {
        "name": home.name,
        "created_ns": time.time_ns(),
        "parent": None if still.whole or not parents else parents[-1].name,
        "vmm": line.backend.name,
        "words": line.backend.words(kvm=line.kvm),
        "vcpus": translate.shape(plan).vcpus,
        "memory_bytes": memory_bytes,
        "common": line.common,
        "nics": line.nics,
        "still_ns": still.since_ns,
        "files": names,
    }


def open_chain(chain: list[Snapshot], handles: Handles) -> tuple[tuple[int, int], ...]:
    """Descriptors of state and memory of each, for reading. Raises OSError."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    found = []
    for snapshot in chain:
        state = handles.add(os.open(snapshot.home / STATE, flags))
        memory = handles.add(os.open(snapshot.home / MEMORY, flags)) if MEMORY in snapshot.files else -1
        found.append((state, memory))
    return tuple(found)
