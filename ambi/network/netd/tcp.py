"""A published TCP port for whom nft does not divert: connections are joined by splice(2), so bytes stay in the kernel."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable

from ambi.core.loop import POLLIN, POLLOUT, Loop, Timer
from ambi.network.netd.loop import Acceptor

_PIPE_BYTES = 64 << 10
_CONNECT_S = 30.0
_ROUNDS = 16  # of one connection, before others have their turn
_MOST = 4096  # connections of one port
_SPLICE = os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE


class TcpProxy:
    """One listening socket. targets: addresses of the instance; the one of the client's family is preferred."""

    def __init__(self, loop: Loop, listener: socket.socket, port: int, targets: tuple[str, ...]) -> None:
        self._loop, self._port = loop, port
        self._six = listener.family == socket.AF_INET6
        self.targets = targets
        self._pairs: set[_Pair] = set()
        self._acceptor = Acceptor(loop, listener, self._taken)

    def _taken(self, client: socket.socket, _: object) -> None:
        target = self._target() if len(self._pairs) < _MOST else None
        if target is None:
            client.close()
        else:
            self._pairs.add(_Pair(self._loop, client, target, self._pairs.discard))

    def _target(self) -> socket.socket | None:
        """A socket that connects to the instance; None when there is nothing to connect to."""
        for address in sorted(self.targets, key=lambda x: (":" in x) != self._six):
            try:
                sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
            except OSError:  # no descriptors left
                return None
            sock.setblocking(False)
            if sock.connect_ex((address, self._port)) in (0, errno.EINPROGRESS):
                return sock
            sock.close()
        return None

    def close(self) -> None:
        """Stop listening, and cut what is joined: the instance has gone."""
        self._acceptor.close()
        for pair in list(self._pairs):
            pair.close()


class _Flow:
    """One direction: from a socket through a pipe to the other."""

    __slots__ = ("ended", "held", "read_end", "shut", "source", "target", "write_end")

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self.source, self.target = source, target
        self.read_end, self.write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.held = 0  # bytes in the pipe
        self.ended = False  # the source will send no more
        self.shut = False  # and the target has been told

    def move(self) -> None:
        """As much as goes now, within reason. Raises OSError when a side is gone."""
        for _round in range(_ROUNDS):
            if not self._take() + self._give():
                break
        if self.ended and not self.held and not self.shut:
            self.shut = True
            self.target.shutdown(socket.SHUT_WR)

    def _take(self) -> int:
        if self.ended or self.held >= _PIPE_BYTES:
            return 0
        try:
            count = os.splice(self.source.fileno(), self.write_end, _PIPE_BYTES - self.held, flags=_SPLICE)
        except BlockingIOError:
            return 0
        self.ended = count == 0
        self.held += count
        return count

    def _give(self) -> int:
        if not self.held:
            return 0
        try:
            count = os.splice(self.read_end, self.target.fileno(), self.held, flags=_SPLICE)
        except BlockingIOError:
            return 0
        self.held -= count
        return count

    def close(self) -> None:
        os.close(self.read_end)
        os.close(self.write_end)


class _Pair:
    """A client and the instance."""

    def __init__(self, loop: Loop, client: socket.socket, target: socket.socket, ended: Callable[[_Pair], None]) -> None:
        self._loop, self._client, self._server, self._ended = loop, client, target, ended
        self._flows: tuple[_Flow, ...] = ()
        self._timer: Timer | None = loop.later(_CONNECT_S, self.close)
        for sock in (client, target):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        loop.watch(target.fileno(), POLLOUT, self._connected)

    def _connected(self, _: int) -> None:
        if self._server.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.close()
            return
        if self._timer is not None:
            self._loop.cancel(self._timer)
            self._timer = None
        try:
            self._flows = (_Flow(self._client, self._server),)
            self._flows += (_Flow(self._server, self._client),)
        except OSError:  # no descriptors left
            self.close()
            return
        self._ready(0)

    def _ready(self, _: int) -> None:
        try:
            for flow in self._flows:
                flow.move()
        except OSError:
            self.close()
            return
        if all(flow.shut for flow in self._flows):
            self.close()
            return
        there, back = self._flows
        self._watch(self._client, there, back)
        self._watch(self._server, back, there)

    def _watch(self, sock: socket.socket, reading: _Flow, writing: _Flow) -> None:
        # What is held waits for its target. A pipe can be full with few bytes in it: more is read when it is empty.
        events = (POLLIN if not reading.ended and not reading.held else 0) | (POLLOUT if writing.held else 0)
        if events:
            self._loop.watch(sock.fileno(), events, self._ready)
        else:
            self._loop.unwatch(sock.fileno())

    def close(self) -> None:
        if self._client.fileno() < 0:
            return
        if self._timer is not None:
            self._loop.cancel(self._timer)
        for sock in (self._client, self._server):
            self._loop.unwatch(sock.fileno())
            sock.close()
        for flow in self._flows:
            flow.close()
        self._ended(self)
