"""Clients that wait for the end of the run: the engine answers them, and the shim does when the engine is gone.

A client's socket is shared with the engine, down to its flags: it is never made non-blocking here, and nothing is written
to it as long as the engine that handed it over may do so.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from ambi.core.loop import Loop

MOST = 256  # clients; those that come later are answered by their engine alone


class Understudies:
    """The waiting clients, each with the control connection that it came by."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._clients: dict[int, tuple[socket.socket, socket.socket, bool]] = {}

    def add(self, client: socket.socket, origin: socket.socket, *, chunked: bool) -> None:
        """Take over `client`, whose answer has got its head. chunked: whether its body is framed in chunks."""
        if len(self._clients) >= MOST:
            client.close()
            return
        fd = client.fileno()
        self._clients[fd] = client, origin, chunked
        self._loop.watch(fd, 0, lambda _: self._drop(fd))  # it has closed both directions: nobody waits

    def answer(self, code: int, served: Callable[[socket.socket], bool]) -> None:
        """Tell the exit code to those whose engine is gone, and let go of all. `served`: whether an origin still lives."""
        for fd, (client, origin, chunked) in list(self._clients.items()):
            if not served(origin):
                _send(client, code, chunked)
            self._drop(fd)

    def _drop(self, fd: int) -> None:
        self._loop.unwatch(fd)
        self._clients.pop(fd)[0].close()


def _send(client: socket.socket, code: int, chunked: bool) -> None:
    """The body of Docker's answer to a wait, its end included, as far as the client takes it at once."""
    body = b'{"StatusCode":%d}\n' % code
    try:
        client.send(
            b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if chunked else body, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
        )
        client.shutdown(socket.SHUT_RDWR)
    except OSError:  # it has gone, or does not read
        pass
