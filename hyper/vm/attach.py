"""Disks and file trees that a VM gets and loses while it runs. They go with the run: nothing of them is kept.

A tree is one more entry of the one tree that the virtiofsd of the binds serves (share.py); a VM that was started without a
bind gets that virtiofsd with its first, where the back-end can plug it. A disk is a device of its own.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from ambi.core.deadline import Deadline
from ambi.core.errors import AmbiError, Conflict, NotFound, Unsupported, from_os_error
from hyper import translate
from hyper.guest.protocol import DetachTag, Type
from hyper.vm import disk, share
from hyper.vm.cgroup import Cgroup
from hyper.vm.link import Link
from hyper.vm.monitor import Monitor

AGENT = "the guest's agent"
UNDO_S = 10.0


class Home(NamedTuple):
    """Where a virtiofsd of later runs. host_mounts: see share.Place."""

    run_dir: Path
    cgroup: Cgroup
    host_mounts: int | None


class Attached(NamedTuple):
    """One of them. name: of its entry in the tree. slot: of its disk, else -1."""

    name: str
    slot: int = -1


class Attachments:
    """Those of one VM. servers: its virtiofsds, to which one may be added; whoever ends the VM ends them."""

    def __init__(self, home: Home, monitor: Monitor, link: Link, servers: list[share.Server]) -> None:
        self._home = home
        self._monitor = monitor
        self._link = link
        self._servers = servers
        self._made = 0
        self._attached: dict[str, Attached] = {}

    def refuse_saving(self) -> None:
        """Raises Unsupported for a machine that has one, or has had a tree: that is a connection to virtiofsd."""
        if self._attached or self._servers:
            what = ", ".join(self._attached) or "one was attached in this run"
            raise Unsupported(
                f"a virtual machine with disks or file trees that were attached cannot be saved: {what}",
                hint="stop and start it: it is without them then",
            )

    def attach(self, mount: dict[str, Any], by: Deadline) -> None:
        """See ambi.core.driver.Mountable."""
        destination = str(mount["destination"])
        if destination in self._attached:
            raise Conflict(f"something is attached at {destination} already")
        name = f"a{self._made}"  # never one of before: a guest may know of it still
        self._made += 1
        try:
            made = self._tree(name, mount, by) if translate.is_bind(mount) else self._disk(name, mount, by)
        except OSError as error:
            raise from_os_error(f"cannot attach {mount.get('source')} at {destination}", error) from error
        try:
            self._link.wait(self._link.request(Type.ATTACH, translate.mount_items(mount, name)), by, AGENT)
        except BaseException as error:
            self._undo(made, error)
            raise
        self._attached[destination] = made

    def detach(self, destination: str, by: Deadline, *, force: bool) -> None:
        """See ambi.core.driver.Mountable."""
        attached = self._attached.get(destination)
        if attached is None:
            raise NotFound(f"nothing is attached at {destination}")
        items = ((DetachTag.DESTINATION, destination), (DetachTag.FORCE, int(force)))
        self._link.wait(self._link.request(Type.DETACH, items), by, AGENT)
        del self._attached[destination]
        try:
            self._remove(attached, by)
        except OSError as error:
            raise from_os_error(f"cannot take away what was attached at {destination}", error) from error

    def _tree(self, name: str, mount: dict[str, Any], by: Deadline) -> Attached:
        bind = translate.bind(name, mount)
        server = next((server for server in self._servers if server.tag == share.BINDS_TAG), None)
        if server is None:
            self._serve(bind, by)
        else:
            share.add(server, bind, self._home.host_mounts)
        return Attached(name)

    def _serve(self, bind: share.Bind, by: Deadline) -> None:
        """The first tree of a VM that had none."""
        output = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
        try:
            place = share.Place(self._home.run_dir, self._home.cgroup, output, self._home.host_mounts)
            server = share.serve_binds((bind,), place)
        finally:
            os.close(output)
        try:
            self._monitor.plug_share(share.BINDS_TAG, server.sock.fileno(), by)
        except BaseException:
            server.end()
            raise
        self._servers.append(server)

    def _disk(self, name: str, mount: dict[str, Any], by: Deadline) -> Attached:
        if mount.get("type") != translate.DISK:
            raise Unsupported(f"a mount of type {mount.get('type')} cannot be attached", hint="attach a path or a volume")
        volume = disk.Volume(name, Path(mount["source"]), "ro" in (mount.get("options") or ()))
        fd = disk.open_volume(volume)
        try:
            return Attached(name, self._monitor.plug_disk(name, fd, by, readonly=volume.readonly))
        finally:
            os.close(fd)

    def _undo(self, made: Attached, error: BaseException) -> None:
        try:
            self._remove(made, Deadline.after(UNDO_S))
        except (AmbiError, OSError) as problem:
            error.add_note(f"undoing it: {problem}")

    def _remove(self, attached: Attached, by: Deadline) -> None:
        if attached.slot >= 0:
            self._monitor.unplug(attached.slot, by)
            return
        for server in self._servers:
            if server.tag == share.BINDS_TAG:
                share.remove(server, attached.name)
