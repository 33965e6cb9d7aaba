"""A published TCP port for whom nft does not divert: connections are joined by splice(2), so bytes stay in the kernel."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Callable

from ambi.core.loop import POLLIN, POLLOUT, Loop, Timer
from ambi.network.netd.loop import Acceptor

_PIPE_BYTES, _SPARE_PIPES = 512 << 10, 32
_MUCH = 16 << 10  # bytes after which there is probably more
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


class _Pipes:
    """Pipes that hold nothing, for whoever moves bytes: a connection has one only while its target takes nothing."""

    def __init__(self) -> None:
        self._free: list[tuple[int, int]] = []

    def take(self) -> tuple[int, int]:
        """Read and write end. Raises OSError without descriptors left."""
        if self._free:
            return self._free.pop()
        pipe = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        except OSError:  # past what a user may have, pipe(7): it stays as it is
            pass
        return pipe

    def put(self, pipe: tuple[int, int]) -> None:
        """Take back an empty one."""
        if len(self._free) < _SPARE_PIPES:
            self._free.append(pipe)
        else:
            drop(pipe)


def drop(pipe: tuple[int, int]) -> None:
    os.close(pipe[0])
    os.close(pipe[1])


_pipes = _Pipes()


class _Flow:
    """One direction: from a socket through a pipe to the other."""

    __slots__ = ("ended", "held", "pipe", "shut", "source", "target")

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self.source, self.target = source, target
        self.pipe: tuple[int, int] | None = None  # while it holds something
        self.held = 0  # bytes in it
        self.ended = False  # the source will send no more
        self.shut = False  # and the target has been told

    def move(self) -> None:
        """As much as goes now, within reason. Raises OSError when a side is gone."""
        for _round in range(_ROUNDS):
            taken = 0 if self.held else self._take()
            self._give()
            if self.held or taken < _MUCH:  # what little has come meanwhile is told by the next poll
                break
        if self.ended and not self.held and not self.shut:
            self.shut = True
            self.target.shutdown(socket.SHUT_WR)

    def _take(self) -> int:
        if self.ended:
            return 0
        pipe = _pipes.take()
        try:
            count = os.splice(self.source.fileno(), pipe[1], _PIPE_BYTES, flags=_SPLICE)
        except BlockingIOError:
            _pipes.put(pipe)
            return 0
        except BaseException:
            drop(pipe)
            raise
        if count:
            self.pipe, self.held = pipe, count
        else:
            self.ended = True
            _pipes.put(pipe)
        return count

    def _give(self) -> None:
        while self.held and self.pipe is not None:
            try:
                self.held -= os.splice(self.pipe[0], self.target.fileno(), self.held, flags=_SPLICE)
            except BlockingIOError:
                return
            if not self.held:
                _pipes.put(self.pipe)
                self.pipe = None

    def close(self) -> None:
        if self.pipe is not None:
            drop(self.pipe)
            self.pipe = None


class _Pair:
    """A client and the instance."""

    def __init__(self, loop: Loop, client: socket.socket, target: socket.socket, ended: Callable[[_Pair], None]) -> None:
        self._loop, self._client, self._server, self._ended = loop, client, target, ended
        self._flows: tuple[_Flow, ...] = ()
        self._events: dict[socket.socket, int] = {}  # what each is watched for
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
        there, back = _Flow(self._client, self._server), _Flow(self._server, self._client)
        self._flows = (there, back)
        self._move(there, back)

    def _move(self, *flows: _Flow) -> None:
        calm = True  # whether what is watched for stays as it is: nothing is held, nobody has ended
        try:
            for flow in flows:
                calm = calm and not flow.held and not flow.ended
                flow.move()
                calm = calm and not flow.held and not flow.ended
        except OSError:
            self.close()
            return
        if calm and self._events:
            return
        there, back = self._flows
        if there.shut and back.shut:
            self.close()
            return
        self._watch(self._client, there, back)
        self._watch(self._server, back, there)

    def _watch(self, sock: socket.socket, reading: _Flow, writing: _Flow) -> None:
        # What is held waits for its target. A pipe can be full with few bytes in it: more is read when it is empty.
        events = (POLLIN if not reading.ended and not reading.held else 0) | (POLLOUT if writing.held else 0)
        if events == self._events.get(sock):
            return
        self._events[sock] = events
        if not events:
            self._loop.unwatch(sock.fileno())
            return

        def ready(happened: int) -> None:
            if not happened & ~POLLIN:
                self._move(reading)
            else:
                self._move(reading, writing)

        self._loop.watch(sock.fileno(), events, ready)

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
