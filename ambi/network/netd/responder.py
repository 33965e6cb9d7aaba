"""The name servers on the gateways: UDP and TCP sockets for each network, and who may ask."""

from __future__ import annotations

import errno
import socket
import struct
from collections import Counter
from collections.abc import Callable
from typing import Any

from dnslib import RCODE

from ambi.core.errors import Conflict, from_os_error
from ambi.core.loop import POLLIN, POLLOUT, Loop, Timer
from ambi.network.netd import dns, holder
from ambi.network.netd.forward import Forwarder
from ambi.network.netd.loop import Acceptor
from ambi.network.netd.names import Asker, NameTable, NetworkNames
from ambi.network.netd.resolvers import HostResolvers, Resolvers

PORT = 53
_IP_FREEBIND, _IPV6_FREEBIND = 15, 78  # linux/in.h, linux/in6.h
_MOST_CONNECTIONS, _MOST_OF_ONE = 512, 16  # by TCP, in all and of one instance
_IDLE_S = 10.0
_DATAGRAMS = 64  # of one socket before others have their turn


class Responder:
    """Answers for all networks of a table."""

    def __init__(self, loop: Loop, table: NameTable, resolvers: HostResolvers) -> None:
        self._loop, self._table, self._resolvers = loop, table, resolvers
        self._forwarder = Forwarder(loop)
        self._serving: dict[str, tuple[tuple[object, ...], list[Callable[[], None]]]] = {}  # with what ends it
        self._connections: Counter[str] = Counter()

    def serve(self, id: str, names: NetworkNames) -> None:
        """Answer for a network from now on. Raises Conflict when port 53 of a gateway is taken, other AmbiErrors."""
        self._table.put(id, names)
        where = (names.bridge, names.gateways)
        before = self._serving.get(id)
        if before is not None and before[0] == where:
            return
        self._close(id)
        opened: list[socket.socket] = []
        try:
            for gateway in names.gateways:
                for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
                    opened.append(_listener(gateway, kind, names.bridge))
        except BaseException:
            for sock in opened:
                sock.close()
            raise
        self._serving[id] = (where, [self._listen(id, sock) for sock in opened])

    def _listen(self, id: str, sock: socket.socket) -> Callable[[], None]:
        """What ends it."""
        if sock.type == socket.SOCK_STREAM:
            return Acceptor(self._loop, sock, lambda client, address: self._taken(id, client, address)).close
        self._loop.watch(sock.fileno(), POLLIN, self._datagrams(id, sock))

        def close() -> None:
            self._loop.unwatch(sock.fileno())
            sock.close()

        return close

    def drop(self, id: str) -> None:
        self._table.drop(id)
        self._close(id)

    def _close(self, id: str) -> None:
        for end in self._serving.pop(id, ((), []))[1]:
            end()

    def _datagrams(self, network: str, sock: socket.socket) -> Callable[[int], None]:
        def ready(_: int) -> None:
            for _count in range(_DATAGRAMS):
                try:
                    data, address = sock.recvfrom(65535)
                except OSError:  # none left, or an ICMP error of an earlier answer
                    return
                asker = self._table.asker(network, address[0].partition("%")[0])
                if asker is not None:
                    self.ask(asker, data, tcp=False, answered=_sender(sock, address))

        return ready

    def _taken(self, network: str, client: socket.socket, address: Any) -> None:
        asker = self._table.asker(network, address[0].partition("%")[0])
        if (
            asker is None
            or self._connections.total() >= _MOST_CONNECTIONS
            or self._connections[asker.instance] >= _MOST_OF_ONE
        ):
            client.close()
            return
        self._connections[asker.instance] += 1
        _Connection(self, self._loop, client, asker)

    def connection_ended(self, asker: Asker) -> None:
        self._connections[asker.instance] -= 1
        if not self._connections[asker.instance]:
            del self._connections[asker.instance]

    def ask(self, asker: Asker, data: bytes, *, tcp: bool, answered: Callable[[bytes], None]) -> None:
        """Answer one query: from the table, or by sending it on. Bytes that are no query have no answer."""
        question = dns.parse(data)
        if question is None:
            return
        own = dns.local_answer(self._table, asker, question)
        if own is not None:
            answered(own if tcp else dns.fitting(question, own))
            return
        resolvers = self._resolvers.now()
        if asker.servers:
            resolvers = Resolvers(asker.servers, resolvers.timeout_s, resolvers.attempts)
        if asker.internal or self._forwarder.full(asker.instance):
            answered(dns.failure(question, RCODE.REFUSED if asker.internal else RCODE.SERVFAIL))
            return
        self._forwarder.send(
            asker.instance,
            data,
            resolvers,
            tcp=tcp,
            answered=lambda reply: answered(reply if reply is not None else dns.failure(question, RCODE.SERVFAIL)),
        )


class _Connection:
    """A client that came by TCP: queries one after another, each with its length before it (RFC 7766)."""

    def __init__(self, owner: Responder, loop: Loop, sock: socket.socket, asker: Asker) -> None:
        self._owner, self._loop, self._sock, self._asker = owner, loop, sock, asker
        self._input, self._output = bytearray(), bytearray()
        self._open = True
        self._idle: Timer = loop.later(_IDLE_S, self.close)
        loop.watch(sock.fileno(), POLLIN, self._ready)

    def _ready(self, events: int) -> None:
        self._loop.cancel(self._idle)
        self._idle = self._loop.later(_IDLE_S, self.close)
        try:
            if events & POLLOUT:
                self._flush()
                return
            data = self._sock.recv(65537)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        if not data:
            self.close()
            return
        self._input += data
        while len(self._input) >= 2 and len(self._input) >= 2 + (size := int.from_bytes(self._input[:2], "big")):
            query = bytes(self._input[2 : 2 + size])
            del self._input[: 2 + size]
            self._owner.ask(self._asker, query, tcp=True, answered=self._answer)

    def _answer(self, reply: bytes) -> None:
        if self._open and len(self._output) < 1 << 20:
            self._output += struct.pack("!H", len(reply)) + reply
            self._flush()

    def _flush(self) -> None:
        try:
            del self._output[: self._sock.send(self._output)]
        except BlockingIOError:
            pass
        except OSError:
            self.close()
            return
        self._loop.watch(self._sock.fileno(), POLLOUT if self._output else POLLIN, self._ready)

    def close(self) -> None:
        if self._open:
            self._open = False
            self._loop.cancel(self._idle)
            self._loop.unwatch(self._sock.fileno())
            self._sock.close()
            self._owner.connection_ended(self._asker)


def _listener(address: str, kind: int, bridge: str) -> socket.socket:
    """A socket at port 53 of `address` that hears `bridge` alone. The address need not be there yet."""
    six = ":" in address
    sock = socket.socket(socket.AF_INET6 if six else socket.AF_INET, kind)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if six:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, bridge.encode() + b"\0")
        sock.bind((address, PORT))
        if kind == socket.SOCK_STREAM:
            sock.listen(64)
        return sock
    except OSError as error:
        sock.close()
        what = f"cannot answer names: port {PORT} of {address} on {bridge}"
        if error.errno == errno.EADDRINUSE:
            who = holder.of("tcp" if kind == socket.SOCK_STREAM else "udp", PORT)
            hint = "have that server listen on its own addresses alone: bind-interfaces for dnsmasq"
            raise Conflict(f"{what} is in use{f' by {who}' if who else ''}", hint=hint) from error
        raise from_os_error(what, error) from error


def _sender(sock: socket.socket, address: Any) -> Callable[[bytes], None]:
    def send(reply: bytes) -> None:
        try:
            sock.sendto(reply, address)
        except OSError:  # a full queue or a client that is gone: it asks again
            pass

    return send
