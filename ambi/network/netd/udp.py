"""A published UDP port for whom nft does not divert: a socket for each client, so that answers find their way back."""

from __future__ import annotations

import socket
from typing import Any

from ambi.core.loop import POLLIN, Loop, Timer

_IDLE_S = 90.0
_MOST = 1024  # clients of one port
_DATAGRAMS = 64


class UdpProxy:
    """One bound socket. targets: addresses of the instance; the one of the client's family is preferred."""

    def __init__(self, loop: Loop, listener: socket.socket, port: int, targets: tuple[str, ...]) -> None:
        self._loop, self._listener, self._port = loop, listener, port
        self.targets = targets
        self._clients: dict[Any, tuple[socket.socket, Timer]] = {}

    def ready(self, _: int) -> None:
        for _count in range(_DATAGRAMS):
            try:
                data, client = self._listener.recvfrom(65535)
            except OSError:
                return
            sock = self._towards_instance(client)
            if sock is not None:
                try:
                    sock.send(data)
                except OSError:  # it does not listen: as with any datagram
                    pass

    def _towards_instance(self, client: Any) -> socket.socket | None:
        known = self._clients.get(client)
        if known is not None:
            self._loop.cancel(known[1])
            self._clients[client] = (known[0], self._loop.later(_IDLE_S, lambda: self._forget(client)))
            return known[0]
        if len(self._clients) >= _MOST or not self.targets:
            return None
        six = self._listener.family == socket.AF_INET6
        address = sorted(self.targets, key=lambda x: (":" in x) != six)[0]
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        sock.setblocking(False)
        try:
            sock.connect((address, self._port))
        except OSError:
            sock.close()
            return None
        self._loop.watch(sock.fileno(), POLLIN, lambda _: self._back(sock, client))
        self._clients[client] = (sock, self._loop.later(_IDLE_S, lambda: self._forget(client)))
        return sock

    def _back(self, sock: socket.socket, client: Any) -> None:
        for _count in range(_DATAGRAMS):
            try:
                self._listener.sendto(sock.recv(65535), client)
            except OSError:
                return

    def _forget(self, client: Any) -> None:
        known = self._clients.pop(client, None)
        if known is not None:
            self._loop.cancel(known[1])
            self._loop.unwatch(known[0].fileno())
            known[0].close()

    def close(self) -> None:
        self._loop.unwatch(self._listener.fileno())
        self._listener.close()
        for client in list(self._clients):
            self._forget(client)
