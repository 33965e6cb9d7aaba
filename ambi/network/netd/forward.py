"""Queries that are not ours, sent on: over UDP with a port and an id of their own each, over TCP for who came by TCP.

Servers are asked one after another, as often as resolv.conf says; only an answer from the server that was asked, with the id
and the question that were sent, counts.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
from collections import Counter
from collections.abc import Callable
from itertools import chain, repeat

from ambi.core.loop import POLLIN, POLLOUT, Loop, Timer
from ambi.network.netd import dns
from ambi.network.netd.resolvers import Resolvers

PORT = 53
MOST, MOST_OF_ONE = 2000, 100  # queries on their way, in all and of one instance
_TRY_S = 2.0  # the first round is quicker than resolv.conf's timeout: a dead server must not cost five seconds
Answered = Callable[[bytes | None], None]


class Forwarder:
    """answered: called once, with the reply to pass on or None when no server has answered."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._of: Counter[str] = Counter()

    def full(self, instance: str) -> bool:
        return self._of.total() >= MOST or self._of[instance] >= MOST_OF_ONE

    def send(self, instance: str, query: bytes, resolvers: Resolvers, *, tcp: bool, answered: Answered) -> None:
        self._of[instance] += 1

        def done(reply: bytes | None) -> None:
            self._of[instance] -= 1
            if not self._of[instance]:
                del self._of[instance]
            answered(reply)

        _Query(self._loop, query, resolvers, tcp=tcp, answered=done).next()


class _Query:
    """One query on its way."""

    def __init__(self, loop: Loop, query: bytes, resolvers: Resolvers, *, tcp: bool, answered: Answered) -> None:
        self._loop, self._query, self._tcp, self._answered = loop, query, tcp, answered
        self._servers = chain.from_iterable(repeat(resolvers.servers, resolvers.attempts))
        self._timeout_s = min(_TRY_S, resolvers.timeout_s)
        self._sock: socket.socket | None = None
        self._timer: Timer | None = None
        self._sent = b""
        self._unsent = b""
        self._got = bytearray()
        self._worst: bytes | None = None  # an answer of a server that could not, for when no other can

    def next(self) -> None:
        """Ask the next server."""
        self._let_go()
        for server in self._servers:
            if self._ask(server):
                self._timer = self._loop.later(self._timeout_s, self.next)
                return
        self._answered(self._worst)

    def _ask(self, server: str) -> bool:
        family = socket.AF_INET6 if ":" in server else socket.AF_INET
        self._sent = os.urandom(2) + self._query[2:]
        try:
            sock = socket.socket(family, socket.SOCK_STREAM if self._tcp else socket.SOCK_DGRAM)
        except OSError:  # no descriptors left
            return False
        sock.setblocking(False)
        try:
            if sock.connect_ex(_address(server)) not in (0, errno.EINPROGRESS):
                raise OSError("no route")
            if not self._tcp:
                sock.send(self._sent)
        except (OSError, ValueError):  # what is no address is no server
            sock.close()
            return False
        self._sock, self._got = sock, bytearray()
        self._unsent = struct.pack("!H", len(self._sent)) + self._sent if self._tcp else b""
        self._loop.watch(sock.fileno(), POLLOUT if self._tcp else POLLIN, self._ready)
        return True

    def _ready(self, _: int) -> None:
        try:
            reply = self._over_tcp() if self._tcp else self._over_udp()
        except BlockingIOError:
            return
        except OSError:
            self.next()
            return
        if reply is None:
            return
        reply = self._query[:2] + reply[2:]
        if dns.refused(reply):
            self._worst = reply
            self.next()
            return
        self._let_go()
        self._answered(reply)

    def _over_udp(self) -> bytes | None:
        assert self._sock is not None
        reply = self._sock.recv(65535)
        return reply if dns.answers(reply, self._sent) else None

    def _over_tcp(self) -> bytes | None:
        assert self._sock is not None
        if self._unsent:
            self._unsent = self._unsent[self._sock.send(self._unsent) :]
            if not self._unsent:
                self._loop.watch(self._sock.fileno(), POLLIN, self._ready)
            return None
        data = self._sock.recv(65537)
        if not data:
            raise OSError("the server has closed the connection")
        self._got += data
        if len(self._got) < 2 or len(self._got) < 2 + int.from_bytes(self._got[:2], "big"):
            return None
        reply = bytes(self._got[2 : 2 + int.from_bytes(self._got[:2], "big")])
        if not dns.answers(reply, self._sent):
            raise OSError("the server answers another question")
        return reply

    def _let_go(self) -> None:
        if self._timer is not None:
            self._loop.cancel(self._timer)
            self._timer = None
        if self._sock is not None:
            self._loop.unwatch(self._sock.fileno())
            self._sock.close()
            self._sock = None


def _address(server: str) -> tuple[object, ...]:
    host, _, zone = server.partition("%")
    if ipaddress.ip_address(host).version == 4:
        return host, PORT
    return host, PORT, 0, socket.if_nametoindex(zone) if zone else 0
