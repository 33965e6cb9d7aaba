"""Clients of a process's stdio: framing, half-close, detach keys, and nobody waits for a slow one.

What Docker does and clients rely on: a client whose stdin ends gives the process EOF when its stdin is for one client only
(`StdinOnce`, every exec) and it has no terminal; else that client is let go, with its output. Detach keys are looked for
with a terminal alone. Several clients may be attached at once, all get the output.
"""

from __future__ import annotations

import binascii
import socket
import struct
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from ambi.core.errors import InvalidRequest, StorageFull
from ambi.core.loop import POLLHUP, POLLIN, POLLOUT, Loop
from ambi.shim.backlog import Backlog
from ambi.shim.stdio import CHUNK, Input

STDOUT, STDERR = 1, 2


class Attach(NamedTuple):
    """ATTACH of PROTOCOL.md."""

    stdin: bool
    stdout: bool
    stderr: bool
    logs: bool
    stream: bool
    framed: bool
    detach_keys: bytes
    pending: bytes

    @classmethod
    def from_wire(cls, body: dict[str, Any]) -> Attach:
        """Raises InvalidRequest. Flags that are not given are false, `stream` is true."""
        try:
            flags = {name: body.get(name, name == "stream") for name in cls._fields[:6]}
            if not all(isinstance(value, bool) for value in flags.values()):
                raise ValueError("a flag is not a boolean")
            keys = bytes(body.get("detach_keys") or [])
            pending = binascii.a2b_base64(body.get("pending") or "", strict_mode=True)
        except (ValueError, TypeError, AttributeError) as error:
            raise InvalidRequest(f"attach: {error}") from error
        return cls(**flags, detach_keys=keys, pending=pending)


class DetachKeys:
    """Finds the sequence in what a client types. A part of it is held back until the next key tells."""

    def __init__(self, keys: bytes) -> None:
        self._keys = keys
        self._held = b""

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """What to pass on, and whether the sequence is complete (then nothing after it counts)."""
        if not self._keys or (not self._held and self._keys[0] not in data):
            return data, False
        passed = bytearray()
        for byte in data:
            self._held += bytes((byte,))
            while not self._keys.startswith(self._held):
                passed.append(self._held[0])
                self._held = self._held[1:]
            if self._held == self._keys:
                return bytes(passed), True
        return bytes(passed), False


class Client:
    """One client socket. Owns it; leaves `hub.clients` when it is closed."""

    def __init__(self, loop: Loop, hub: Hub, sock: socket.socket, options: Attach, spool_dir: str) -> None:
        self._loop = loop
        self._hub = hub
        self._sock = sock
        self._backlog = Backlog(spool_dir)
        self._keys = DetachKeys(options.detach_keys)
        self.options = options
        self._typing = True  # its side may still send
        self._gone = False  # it cannot receive any more
        self._ending = False  # closed as soon as the backlog is out
        self.closed = False
        sock.setblocking(False)
        self._watch()

    @property
    def left(self) -> int:
        """Bytes that it has still to get."""
        return len(self._backlog)

    def descriptors(self) -> list[int]:
        """What this client needs open."""
        return [self._sock.fileno(), *self._backlog.descriptors()]

    def send(self, data: bytes) -> None:
        """Give the client `data`, framed already where that is due. Never blocks; too slow a client is cut off."""
        if self._gone or self._ending or self.closed:
            return
        rest = memoryview(data)
        if not self._backlog:
            rest = rest[self._push(rest) :]
            if not rest or self._gone:
                return
        try:
            self._backlog.push(rest)
        except StorageFull:
            self.close()
            return
        self._watch()

    def end(self) -> None:
        """No more output: close once the client has what is there."""
        self._ending = True
        if self._backlog and not self._gone:
            self._watch()
        else:
            self.close()

    def flush(self) -> None:
        """Send as much of the backlog as the socket takes now."""
        while self._backlog and not self._gone:
            data = self._backlog.peek()
            sent = self._push(data)
            if self._gone:
                break
            self._backlog.consume(sent)
            if sent < len(data):
                return
        if self._ending:
            self.close()

    def resume(self) -> None:
        """The process's stdin has room, or has just been opened."""
        if not self.closed:
            self._watch()

    def move(self, loop: Loop) -> None:
        """Go on in another loop, that of a forked process."""
        self._loop = loop
        self._watch()

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self._loop.unwatch(self._sock.fileno())
        self._backlog.close()
        try:
            # A unix socket that is closed with unread bytes resets its peer, which then misses the orderly end.
            self._sock.shutdown(socket.SHUT_RDWR)
            while self._sock.recv(CHUNK):
                pass
        except OSError:  # nothing unread is left, or the client has gone
            pass
        self._sock.close()
        self._hub.clients.remove(self)

    def _push(self, data: bytes | memoryview) -> int:
        try:
            return self._sock.send(data, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0
        except OSError:
            self._lost()
            return len(data)

    def _may_read(self) -> bool:
        return self._typing and (not self._wants_stdin() or self._hub.takes_input())

    def _wants_stdin(self) -> bool:
        return self.options.stdin and not self._ending

    def _watch(self) -> None:
        if self.closed:
            return
        reading = self._may_read()
        if self._gone and not reading:  # POLLHUP would be reported for ever
            self._loop.unwatch(self._sock.fileno())
            return
        events = (POLLIN if reading else 0) | (POLLOUT if self._backlog and not self._gone else 0)
        self._loop.watch(self._sock.fileno(), events, self._ready)

    def _ready(self, revents: int) -> None:
        if revents & POLLOUT and not self._gone:
            self.flush()
        if not self.closed and revents & (POLLIN | POLLHUP) and self._may_read():
            self._read()
        if not self.closed and revents & POLLHUP and not revents & POLLIN:
            self._lost()
        self._watch()

    def _read(self) -> None:
        try:
            data = self._sock.recv(CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self.typed(data)
            return
        self._typing = False
        if self._wants_stdin():
            self._hub.input_ended(self)
        if self._gone:
            self.close()

    def typed(self, data: bytes) -> None:
        """The client sent `data`."""
        if not self._wants_stdin():
            return
        if not self._hub.terminal:
            self._hub.feed(data)
            return
        passed, detach = self._keys.feed(data)
        self._hub.feed(passed)
        if detach:
            self._hub.detached(self)

    def _lost(self) -> None:
        """The client is gone; what it has sent still counts when it is for the process's stdin."""
        self._gone = True
        self._backlog.close()
        if not self._typing or not self._wants_stdin():
            self.close()


class Hub:
    """The clients of one process.

    stdin_once: the first client that ends its side ends the process's stdin. on_detach: a client typed the detach keys.
    """

    def __init__(self, loop: Loop, spool_dir: str, *, terminal: bool, stdin_once: bool) -> None:
        self.clients: list[Client] = []
        self.terminal = terminal
        self.stdin_once = stdin_once
        self.on_detach: Callable[[], object] = lambda: None
        self._loop = loop
        self._spool_dir = spool_dir
        self._input: Input | None = None
        self._opened = False
        self._ended = False

    def attach(self, sock: socket.socket, options: Attach, past: Iterable[tuple[int, bytes]] = ()) -> None:
        """Serve one more client, from `past` (stream, bytes) on. Output after its end is the past alone."""
        client = Client(self._loop, self, sock, options, self._spool_dir)
        self.clients.append(client)
        for stream, data in past:
            self._give(client, stream, data, {})
        if options.pending and self._opened:
            client.typed(options.pending)
        if self._ended or not options.stream:
            client.end()

    def open(self, stdin: Input | None) -> None:
        """The process is there; `stdin` is None when it has none, and what clients type is then dropped."""
        self._input = stdin
        self._opened = True
        if stdin is not None:
            stdin.on_room = self._resume
        for client in list(self.clients):
            if client.options.pending:
                client.typed(client.options.pending)
        self._resume()

    def output(self, stream: int, data: bytes) -> None:
        """Pass on what the process printed on stream 1 or 2."""
        frames: dict[bool, bytes] = {}
        for client in list(self.clients):
            self._give(client, stream, data, frames)

    def end(self) -> None:
        """The process has no more output."""
        self._ended = True
        for client in list(self.clients):
            client.end()

    def takes_input(self) -> bool:
        return self._opened and (self._input is None or not self._input.full)

    def feed(self, data: bytes) -> None:
        if self._input is not None:
            self._input.write(data)

    def input_ended(self, client: Client) -> None:
        if self._input is None:
            return
        if self.stdin_once and not self.terminal:
            self._input.end()
        else:
            client.end()

    def detached(self, client: Client) -> None:
        client.end()
        self.on_detach()

    def _resume(self) -> None:
        for client in list(self.clients):
            client.resume()

    @staticmethod
    def _give(client: Client, stream: int, data: bytes, frames: dict[bool, bytes]) -> None:
        """`frames` keeps the framed form for the next client of the same output."""
        if not (client.options.stdout if stream == STDOUT else client.options.stderr):
            return
        if client.options.framed:
            if True not in frames:
                frames[True] = struct.pack(">BxxxI", stream, len(data)) + data
            client.send(frames[True])
        else:
            client.send(data)
