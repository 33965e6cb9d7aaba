"""Volumes that are a file system of their own: mounted on the host, where the volume is, while an instance with it runs.

As docker does it, so all instances of both kinds see the same, and people find it where `volume inspect` says. Who holds one
is counted in memory alone: after the engine has died its running instances count again, and what nobody holds is unmounted.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
from collections.abc import Iterable
from pathlib import Path

from ambi.core.errors import AmbiError, Forbidden, InvalidRequest, NotFound, Unavailable, Unsupported
from ambi.linux import mount

log = logging.getLogger(__name__)

KINDS = ("tmpfs", "nfs", "nfs4", "cifs")
NETWORKED = ("nfs", "nfs4", "cifs")
_FLAGS = {  # mount(8): word -> (flag, whether it is set)
    "ro": (mount.MS_RDONLY, True), "rw": (mount.MS_RDONLY, False), "nosuid": (mount.MS_NOSUID, True),
    "suid": (mount.MS_NOSUID, False), "nodev": (mount.MS_NODEV, True), "dev": (mount.MS_NODEV, False),
    "noexec": (mount.MS_NOEXEC, True), "exec": (mount.MS_NOEXEC, False), "noatime": (mount.MS_NOATIME, True),
    "atime": (mount.MS_NOATIME, False), "nodiratime": (mount.MS_NODIRATIME, True), "sync": (mount.MS_SYNCHRONOUS, True),
    "async": (mount.MS_SYNCHRONOUS, False), "relatime": (mount.MS_RELATIME, True), "norelatime": (mount.MS_RELATIME, False),
    "strictatime": (mount.MS_STRICTATIME, True), "diratime": (mount.MS_NODIRATIME, False),
}  # fmt: skip
_HINTS = {
    errno.ENODEV: "this kernel has no such file system: modprobe {kind}",
    errno.ENOENT: "see that the server exports it, as -o device=:/path says",
    errno.EACCES: "see that the server lets this host have it",
    errno.EINVAL: "see the options: -o o=addr=SERVER,vers=4",
}


class Mounts:
    """Below `volumes`, the directory of all volumes. Safe to use from any thread."""

    def __init__(self, volumes: Path) -> None:
        self._volumes = volumes
        self._lock = threading.Lock()
        self._held: dict[str, set[str]] = {}
        self._busy: dict[str, threading.Lock] = {}  # a server that does not answer keeps its own volume alone

    def hold(self, name: str, options: dict[str, str], holder: str) -> None:
        """Mount volume `name` unless it is. Raises what `_mount` raises; it is not held then."""
        with self._lock_of(name):
            if not self._is_mounted(name):
                _mount(options, self._place(name))
            with self._lock:
                self._held.setdefault(name, set()).add(holder)

    def release(self, name: str, holder: str) -> None:
        """Unmount it when nobody else holds it."""
        with self._lock_of(name):
            with self._lock:
                holders = self._held.get(name, set())
                holders.discard(holder)
                if not holders:
                    self._held.pop(name, None)
            if not holders and self._is_mounted(name):
                self._unmount(name)

    def settle(self, holders: dict[str, Iterable[str]]) -> None:
        """After a start of the engine: who holds what is mounted; `holders` has every volume that could be."""
        for name, running in holders.items():
            with self._lock:
                self._held[name] = set(running)
            self.release(name, "")

    def _lock_of(self, name: str) -> threading.Lock:
        with self._lock:
            return self._busy.setdefault(name, threading.Lock())

    def _place(self, name: str) -> str:
        return os.path.realpath(self._volumes / name / "_data")

    def _is_mounted(self, name: str) -> bool:
        """By the table of mounts: to look at the place itself could wait for a server."""
        wanted = self._place(name)
        return any(place == wanted for place, _ in mount.table())

    def _unmount(self, name: str) -> None:
        try:
            mount.umount(self._place(name), mount.MNT_DETACH)
        except OSError as error:
            log.warning("volume %s stays mounted: %s", name, error)


def check(options: dict[str, str]) -> None:
    """Refuse now what can be told without mounting. Raises InvalidRequest."""
    kind = options["type"]
    if kind in ("nfs", "nfs4") and not _address(options):
        raise InvalidRequest(
            f"a volume of type {kind} needs the address of its server", hint="-o o=addr=SERVER,vers=4 -o device=:/path"
        )


def _address(options: dict[str, str]) -> str:
    words = options.get("o", "").split(",")
    given = next((word.removeprefix("addr=") for word in words if word.startswith("addr=")), "")
    device = options["device"]
    if not given and options["type"] == "cifs" and device.startswith("//"):
        return device[2:].partition("/")[0]
    return given


def _mount(options: dict[str, str], place: str) -> None:
    """mount(2) with docker's words. Raises NotFound, Forbidden, Unsupported, Unavailable with Docker's text."""
    kind, device = options["type"], options["device"]
    flags, data = _parsed(options)
    if kind in NETWORKED:
        data = _with_address(options, data)
    try:
        mount.mount(device, place, kind, flags, ",".join(data))
    except OSError as error:
        shown = ",".join("password=***" if word.startswith(("password=", "pass=")) else word for word in data)
        text = (
            f"error while mounting volume '{place}': failed to mount local volume: mount {device}:{place}, "
            f"flags: {flags:#x}, data: {shown}: {(error.strerror or str(error)).lower()}"
        )
        hint = _HINTS.get(error.errno or 0, "see `dmesg` for the kernel's reason").format(kind=kind)
        raise _error_of(error)(text, hint=hint) from error


def _parsed(options: dict[str, str]) -> tuple[int, list[str]]:
    flags, data = 0, []
    for word in filter(None, options.get("o", "").split(",")):
        if word in _FLAGS:
            flag, on = _FLAGS[word]
            flags = flags | flag if on else flags & ~flag
        elif word != "defaults":
            data.append(word)
    return flags, data


def _with_address(options: dict[str, str], data: list[str]) -> list[str]:
    """The kernel takes no names: `addr=` is an address, of IPv4 if there is one. Raises NotFound for a name without any."""
    name = _address(options)
    if not name:
        return data
    try:
        known = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise NotFound(
            f"error resolving passed in network volume address: lookup {name}: no such host",
            hint="see the name in -o o=addr=",
        ) from error
    address = min(known, key=lambda row: row[0] != socket.AF_INET)[4][0]
    return [f"addr={address}", *(word for word in data if not word.startswith("addr="))]


def _error_of(error: OSError) -> type[AmbiError]:
    if error.errno in (errno.EPERM, errno.EACCES):
        return Forbidden
    if error.errno == errno.ENODEV:
        return Unsupported
    return Unavailable
