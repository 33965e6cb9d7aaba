"""Control connections of a shim: requests come in, answers and events go out, and none can hold the shim up."""

from __future__ import annotations

import os
import select
import socket
from collections import deque
from collections.abc import Iterable
from typing import Any

from ambi.core.errors import AmbiError
from ambi.core.loop import POLLIN, Loop
from ambi.linux import unix

MAX_CONNECTIONS = 16


class Request:
    """One request, to be answered once. `message.fds` that the handler leaves are closed with the answer."""

    __slots__ = ("_control", "_sock", "message")

    def __init__(self, control: Control, sock: socket.socket, message: unix.Message) -> None:
        self._control = control
        self._sock = sock
        self.message = message

    @property
    def body(self) -> dict[str, Any]:
        return self.message.body

    @property
    def origin(self) -> socket.socket:
        """The connection that it came by."""
        return self._sock

    def answer(self, result: dict[str, Any], fds: Iterable[int] = ()) -> None:
        """`fds` stay the caller's."""
        self._send({"seq": self.body.get("seq"), "ok": result}, fds)

    def fail(self, error: AmbiError) -> None:
        self._send({"seq": self.body.get("seq"), "error": error.to_wire()})

    def _send(self, body: dict[str, Any], fds: Iterable[int] = ()) -> None:
        self.message.close()
        if body["seq"] is None:  # nobody asked for an answer
            return
        if not _deliver(self._sock, body, fds):
            self._control.drop(self._sock)  # whoever waits for this answer must not wait for ever


class Control:
    """Collects requests in `requests`; the shim takes them between two turns of the loop, never inside a driver's call."""

    def __init__(self, loop: Loop, path: str) -> None:
        self.requests: deque[Request] = deque()
        self._loop = loop
        self._path = path
        self._connections: list[socket.socket] = []
        self._listener = unix.listen(path)
        self._listener.setblocking(False)
        self._bound = os.stat(path).st_ino
        loop.watch(self._listener.fileno(), POLLIN, self._accept)

    @property
    def connected(self) -> bool:
        return bool(self._connections)

    def serves(self, sock: socket.socket) -> bool:
        """Whether somebody is still at the other end of `sock`, as the kernel has it now."""
        if sock not in self._connections:
            return False
        poll = select.poll()
        poll.register(sock, 0)  # POLLHUP is always reported
        return not poll.poll(0)

    def add(self, sock: socket.socket) -> None:
        """Serve a connection that is already there."""
        sock.setblocking(False)
        self._connections.append(sock)
        self._loop.watch(sock.fileno(), POLLIN, lambda _: self._receive(sock))

    def event(self, body: dict[str, Any]) -> bool:
        """Send an event to all; whether anybody got it. Who does not read its connection loses it."""
        for sock in list(self._connections):
            if not _deliver(sock, body):
                self.drop(sock)
        return bool(self._connections)

    def close(self) -> None:
        """Take the socket away, then end all connections: who sees the end may have the next shim bind there."""
        try:
            if os.stat(self._path).st_ino == self._bound:
                os.unlink(self._path)
        except OSError:  # it is gone, or the directory with it
            pass
        self._loop.unwatch(self._listener.fileno())
        self._listener.close()
        for sock in list(self._connections):
            self.drop(sock)

    def _accept(self, _revents: int) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        if len(self._connections) >= MAX_CONNECTIONS or unix.peer(sock).uid != os.geteuid():
            sock.close()
            return
        self.add(sock)

    def _receive(self, sock: socket.socket) -> None:
        try:
            message = unix.receive(sock)
        except BlockingIOError:
            return
        except (AmbiError, OSError):
            message = None
        if message is None:
            self.drop(sock)
            return
        self.requests.append(Request(self, sock, message))

    def drop(self, sock: socket.socket) -> None:
        """End one connection; one that has ended already is ignored."""
        if sock in self._connections:
            self._connections.remove(sock)
            self._loop.unwatch(sock.fileno())
            sock.close()


def _deliver(sock: socket.socket, body: dict[str, Any], fds: Iterable[int] = ()) -> bool:
    if sock.fileno() < 0:
        return False
    try:
        unix.send(sock, body, fds)
    except (AmbiError, OSError):
        return False
    return True
