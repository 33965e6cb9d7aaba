"""A published UDP port for whom nft does not divert: a socket for each client, so that answers find their way back."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, NamedTuple

from ambi.core.loop import POLLIN, Loop, Timer

_IDLE_S = 90.0
_MOST = 1024  # clients of one port
_DATAGRAMS = 64  # of one socket before others have their turn
_IP_PKTINFO, _IPV6_RECVPKTINFO, _IPV6_PKTINFO = 8, 49, 50  # linux/in.h, linux/in6.h
_Key = tuple[Any, bytes]  # a client's address, and in_pktinfo or in6_pktinfo of the address that it has written to


class _Client(NamedTuple):
    sock: socket.socket
    timer: Timer


class UdpProxy:
    """One bound socket. targets: addresses of the instance; the one of the client's family is preferred."""

    def __init__(self, loop: Loop, listener: socket.socket, port: int, targets: tuple[str, ...]) -> None:
        self._loop, self._listener, self._port = loop, listener, port
        self.targets = targets
        self._clients: dict[_Key, _Client] = {}  # who was silent for longest first
        self._six = listener.family == socket.AF_INET6
        self._level, self._info = (socket.IPPROTO_IPV6, _IPV6_PKTINFO) if self._six else (socket.IPPROTO_IP, _IP_PKTINFO)
        listener.setsockopt(self._level, _IPV6_RECVPKTINFO if self._six else _IP_PKTINFO, 1)
        loop.watch(listener.fileno(), POLLIN, self._ready)

    def _ready(self, _: int) -> None:
        for _count in range(_DATAGRAMS):
            try:
                data, ancillary, _flags, address = self._listener.recvmsg(65535, 64)
            except OSError:
                return
            written_to = next((value for level, kind, value in ancillary if (level, kind) == (self._level, self._info)), b"")
            sock = self._towards_instance((address, written_to))
            if sock is not None:
                try:
                    sock.send(data)
                except OSError:  # it does not listen: as with any datagram
                    pass

    def _towards_instance(self, key: _Key) -> socket.socket | None:
        known = self._clients.pop(key, None)
        if known is not None:
            self._loop.cancel(known.timer)
        elif len(self._clients) >= _MOST:
            self._forget(next(iter(self._clients)))
        sock = known.sock if known is not None else self._connect(key)
        if sock is not None:
            self._clients[key] = _Client(sock, self._loop.later(_IDLE_S, self._forgetting(key)))
        return sock

    def _connect(self, key: _Key) -> socket.socket | None:
        """A socket whose datagrams go to the instance, and whose answers go to the client."""
        if not self.targets:
            return None
        address = sorted(self.targets, key=lambda x: (":" in x) != self._six)[0]
        try:
            sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        except OSError:  # no descriptors left
            return None
        sock.setblocking(False)
        try:
            sock.connect((address, self._port))
        except OSError:
            sock.close()
            return None
        self._loop.watch(sock.fileno(), POLLIN, lambda _: self._back(sock, key))
        return sock

    def _back(self, sock: socket.socket, key: _Key) -> None:
        """From the address that the client has written to, or it would not know the answer for one."""
        address, written_to = key
        source = [(self._level, self._info, written_to)] if written_to else []
        for _count in range(_DATAGRAMS):
            try:
                self._listener.sendmsg([sock.recv(65535)], source, 0, address)
            except OSError:
                return

    def _forgetting(self, key: _Key) -> Callable[[], None]:
        return lambda: self._forget(key)

    def _forget(self, key: _Key) -> None:
        known = self._clients.pop(key, None)
        if known is not None:
            self._loop.cancel(known.timer)
            self._loop.unwatch(known.sock.fileno())
            known.sock.close()

    def close(self) -> None:
        self._loop.unwatch(self._listener.fileno())
        self._listener.close()
        for client in list(self._clients):
            self._forget(client)
