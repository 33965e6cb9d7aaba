"""A thread that sleeps until somebody changes the rule sets of this host, and then has ours put back where they were."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import threading
from collections.abc import Callable

# linux/netlink.h, linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h
_NETLINK_NETFILTER, _SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP = 12, 270, 1
_NFNLGRP_NFTABLES = 7
_NLMSGHDR = struct.Struct("=IHHII")
# enum nf_tables_msg_types: new and deleted tables, chains and rules; elements of sets come and go with ports.
_TELLING = {0, 2, 3, 5, 6, 8}
_QUIET_MS, _LONGEST = 150, 20  # a reload is many transactions: wait for a pause, but not for ever
_POLL_MS = 30_000


class Watch:
    """Calls `changed` from a thread of its own, in the namespace of the one that makes this, some time after a change."""

    def __init__(self, changed: Callable[[], None], polled: Callable[[], bool]) -> None:
        self._changed, self._polled = changed, polled
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
        self._socket.bind((0, 0))
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, _NFNLGRP_NFTABLES)
        self._socket.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="firewall", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """The thread has ended when this returns; must not be called from `changed`."""
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._wake)
        self._socket.close()

    def _run(self) -> None:
        waiting = select.poll()
        waiting.register(self._wake, select.POLLIN)
        waiting.register(self._socket, select.POLLIN)
        while True:
            ready = waiting.poll(_POLL_MS if self._polled() else None)
            if any(fd == self._wake for fd, _ in ready):
                return
            if ready and not self._telling():
                continue
            for _ in range(_LONGEST):
                ready = waiting.poll(_QUIET_MS)
                if any(fd == self._wake for fd, _ in ready):
                    return
                if not ready:
                    break
                self._telling()
            self._changed()

    def _telling(self) -> bool:
        """Read what is there; whether a table, chain or rule is among it."""
        found = False
        while True:
            try:
                data = self._socket.recv(1 << 16)
            except BlockingIOError:
                return found
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                return True  # more than the socket holds: anything may have changed
            at = 0
            while at + _NLMSGHDR.size <= len(data):
                length, kind, *_ = _NLMSGHDR.unpack_from(data, at)
                found = found or kind & 0xFF in _TELLING
                at += max(_NLMSGHDR.size, length + -length % 4)
