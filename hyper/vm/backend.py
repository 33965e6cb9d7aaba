"""A back-end: what turns hardware into a running VMM. `hyper/qemu/backend.py` and `hyper/vmm/backend.py` are two."""

from __future__ import annotations

import os
import socket
from typing import Protocol

from hyper.vm.cgroup import Cgroup
from hyper.vm.hardware import Hardware
from hyper.vm.monitor import Monitor


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


class Backend(Protocol):
    """Stateless; loaded by the shim when it makes a VM."""

    def overhead_bytes(self, kvm: bool) -> int:
        """What the VMM and its virtiofsd may use beyond the guest's memory."""

    def start(self, hardware: Hardware, user: int, cgroup: Cgroup, output: int, handles: Handles) -> Monitor:
        """Start the VMM as `user` in `cgroup`, its own words going to `output`; the guest is still to boot.

        `hardware.control` is still to be made. Nothing of ours is needed by path; `handles` closes our copies afterwards.
        Raises Unsupported when the program is not there.
        """
