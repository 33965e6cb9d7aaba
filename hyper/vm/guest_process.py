"""A process in the guest, as the shim sees it: descriptors for its stdio, signals, its exit.

The agent's stream messages become bytes of pipes (or of one socket pair, for a terminal) and the other way round. Nothing
is buffered without bound: the guest may send what it has credit for, which it gets back as the reader takes it; stdin is
read within the guest's credit.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable

from ambi.core.driver import Streams
from ambi.core.errors import Corrupt, InvalidRequest
from ambi.core.loop import POLLIN, POLLOUT, Loop
from ambi.core.model import ExitStatus
from hyper.guest.protocol import CREDIT_STEP, INIT_ID, INITIAL_CREDIT, STREAM_STDERR, STREAM_STDOUT, Message, Type
from hyper.vm.link import Link, open_pipe

CHUNK = 32 << 10  # of stdin, a frame
SIGKILL = 9
KILL_GRACE_S = 10.0  # from SIGKILL to init until a guest that does nothing about it loses its VMM


class Outlet:
    """Output of the process on its way into `fd`, which it owns."""

    __slots__ = (
        "_allowed",
        "_ended",
        "_fd",
        "_foreign",
        "_held",
        "_ident",
        "_link",
        "_loop",
        "_pending",
        "_returned",
        "_stream",
        "_terminal",
        "_watched",
        "on_broken",
    )

    def __init__(self, loop: Loop, link: Link, ident: int, stream: int, fd: int, *, terminal: bool) -> None:
        self._loop = loop
        self._link = link
        self._ident = ident
        self._stream = stream
        self._fd = fd
        self._terminal = terminal
        self._pending = bytearray()
        self._allowed = INITIAL_CREDIT
        self._returned = 0
        self._held = False  # the credit is another host's: none is given
        self._foreign = 0  # bytes in hand that count against that credit
        self._ended = False
        self._watched = False
        self.on_broken: Callable[[], None] | None = None  # called once when nobody reads any more

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def push(self, data: bytes) -> None:
        """Raises Corrupt when the guest sent more than it may."""
        self._allowed -= len(data)
        if self._allowed < 0:
            raise Corrupt("the guest sent more output than it may")
        self._pending += data
        self._flush()

    def end(self) -> None:
        """No more will come: close once everything is written."""
        self._ended = True
        self._flush()

    def _ready(self, _: int) -> None:
        self._flush()

    def _flush(self) -> None:
        taken = 0
        try:
            while self._pending and self._fd >= 0:
                count = os.write(self._fd, self._pending)
                del self._pending[:count]
                taken += count
        except BlockingIOError:
            pass
        except OSError:  # nobody reads any more: the process goes on, and what it says is dropped
            taken += len(self._pending)
            self._pending.clear()
            broken, self.on_broken = self.on_broken, None
            if broken is not None:
                broken()
        if self._fd < 0:
            taken += len(self._pending)
            self._pending.clear()
        self._credit(taken)
        if self._ended and not self._pending:
            self.close()
        elif bool(self._pending) != self._watched:
            self._watched = not self._watched
            if self._watched:
                self._loop.watch(self._fd, POLLOUT, self._ready)
            else:
                self._loop.unwatch(self._fd)

    def hold(self) -> None:
        """Until `renew` what comes has the credit that another host gave."""
        self._held = True

    def renew(self) -> None:
        """The guest counts anew from here on."""
        self._held = False
        self._foreign = len(self._pending)
        self._allowed, self._returned = INITIAL_CREDIT, 0

    def _credit(self, taken: int) -> None:
        if self._held:
            return
        foreign = min(taken, self._foreign)
        self._foreign -= foreign
        self._returned += taken - foreign
        if self._returned >= CREDIT_STEP and not self._ended:
            self._allowed += self._returned
            self._link.tell(Type.CREDIT, self._ident, ((1, self._stream), (2, self._returned)))
            self._returned = 0

    def close(self) -> None:
        if self._fd >= 0:
            self._loop.unwatch(self._fd)
            if self._terminal:
                _hang_up(self._fd)
            os.close(self._fd)
            self._fd = -1


def _hang_up(fd: int) -> None:
    """End a terminal's socket pair. Input that nobody took is dropped first: it would make EOF an error."""
    end = socket.socket(fileno=fd)
    try:
        end.shutdown(socket.SHUT_RDWR)
        while end.recv(65536):
            pass
    except OSError:
        pass
    finally:
        end.detach()


class Inlet:
    """Input for the process, read from `fd`, which it owns."""

    __slots__ = ("_credit", "_fd", "_ident", "_link", "_loop", "_watched")

    def __init__(self, loop: Loop, link: Link, ident: int, fd: int) -> None:
        self._loop = loop
        self._link = link
        self._ident = ident
        self._fd = fd
        self._credit = INITIAL_CREDIT
        self._watched = False

    def begin(self) -> None:
        """The process runs: its input may flow."""
        self._update()

    def allow(self, count: int) -> None:
        self._credit += count
        self._update()

    def _update(self) -> None:
        want = self._fd >= 0 and self._credit > 0 and not self._link.busy
        if want != self._watched:
            self._watched = want
            if want:
                self._loop.watch(self._fd, POLLIN, self._ready)
            else:
                self._loop.unwatch(self._fd)

    def _ready(self, _: int) -> None:
        try:
            data = os.read(self._fd, min(self._credit, CHUNK))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._credit -= len(data)
            self._link.stdin(self._ident, data)
            self._update()
        else:
            self._link.tell(Type.CLOSE_STDIN, self._ident)
            self.close()

    def resume(self) -> None:
        self._update()

    def close(self) -> None:
        if self._fd >= 0:
            self._loop.unwatch(self._fd)
            os.close(self._fd)
            self._fd = -1
            self._watched = False


class GuestProcess:
    """Implements ambi.core.driver.Process. `ident` is its id in the guest protocol."""

    def __init__(self, loop: Loop, link: Link, ident: int, *, terminal: bool, stdin: bool) -> None:
        self.pid = 0
        self.exit: ExitStatus | None = None
        self.on_exit: Callable[[ExitStatus], None] | None = None
        self.ident = ident
        self._loop = loop
        self._link = link
        self._terminal = terminal
        self._inlet: Inlet | None = None
        self._outlets: dict[int, Outlet] = {}
        self.streams = self._open_terminal() if terminal else self._open_pipes(stdin)
        link.attach(ident, self)

    def _open_terminal(self) -> Streams:
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(False)
        fd = ours.detach()
        self._inlet = Inlet(self._loop, self._link, self.ident, os.dup(fd))
        self._outlets[STREAM_STDOUT] = Outlet(self._loop, self._link, self.ident, STREAM_STDOUT, fd, terminal=True)
        shared = theirs.detach()
        return Streams(shared, shared, None)

    def _open_pipes(self, stdin: bool) -> Streams:
        theirs: list[int] = []
        for stream in (STREAM_STDOUT, STREAM_STDERR):
            reader, writer = open_pipe()
            self._outlets[stream] = Outlet(self._loop, self._link, self.ident, stream, writer, terminal=False)
            theirs.append(reader)
        if not stdin:
            return Streams(None, *theirs)
        reader, writer = open_pipe()
        self._inlet = Inlet(self._loop, self._link, self.ident, reader)
        return Streams(writer, *theirs)

    def hold(self) -> None:
        """It runs already, for another host: see Outlet."""
        for outlet in self._outlets.values():
            outlet.hold()

    def renew(self) -> None:
        """The guest's answer to RESUME has come."""
        for outlet in self._outlets.values():
            outlet.renew()

    def started(self, pid: int) -> None:
        """The program runs, as `pid` in the guest."""
        self.pid = pid
        if self._inlet and self.exit is None:
            self._inlet.begin()

    def signal(self, number: int) -> None:
        if self.exit is None:
            self._link.request(Type.SIGNAL, ((1, number),), ident=self.ident)
            if number == SIGKILL and self.ident == INIT_ID:
                self._loop.later(KILL_GRACE_S, self._insist)

    def _insist(self) -> None:
        if self.exit is None:
            self._link.stuck("the guest did not end its workload after SIGKILL")

    def resize(self, rows: int, columns: int) -> None:
        if not self._terminal:
            raise InvalidRequest("the process has no terminal to resize")
        if self.exit is None and self.pid:
            self._link.request(Type.RESIZE, ((1, rows), (2, columns)), ident=self.ident)

    def receive(self, message: Message) -> None:
        """A message of the agent for this process. Raises Corrupt."""
        kind = message.kind
        if kind is Type.STDOUT:
            self._outlet(STREAM_STDOUT).push(message.body)
        elif kind is Type.STDERR:
            self._outlet(STREAM_STDERR).push(message.body)
        elif kind is Type.STDOUT_END:
            self._end(STREAM_STDOUT)
        elif kind is Type.STDERR_END:
            self._end(STREAM_STDERR)
        elif kind is Type.STDIN_CREDIT:
            if self._inlet:
                self._inlet.allow(message.fields.number(1))
        elif kind is Type.EXITED:
            fields = message.fields
            self.finish(fields.number(1) & 0xFF, oom_killed=fields.number(2) > 0)

    def _outlet(self, stream: int) -> Outlet:
        if stream not in self._outlets:
            raise Corrupt("the guest sent output of a process that has none")
        return self._outlets[stream]

    def _end(self, stream: int) -> None:
        """A process that has exited and has no more output has no more messages either."""
        outlet = self._outlets.pop(stream, None)
        if outlet:
            outlet.end()
        if self.exit is not None and not self._outlets:
            self._link.detach(self.ident)

    def resume(self) -> None:
        if self._inlet:
            self._inlet.resume()

    def finish(self, code: int, reason: str = "", *, oom_killed: bool = False) -> None:
        """Record the exit, once, and have the loop tell it."""
        if self.exit is not None:
            return
        self.exit = status = ExitStatus(code, reason, oom_killed, time.time_ns())
        if self._inlet:
            self._inlet.close()
        if not self._outlets:
            self._link.detach(self.ident)
        self._loop.later(0, lambda: self._tell(status))

    def _tell(self, status: ExitStatus) -> None:
        if self.on_exit:
            self.on_exit(status)

    def lost(self, code: int, reason: str) -> None:
        """The VM is gone: end the output behind what has come, and the process with it."""
        for stream in tuple(self._outlets):
            self._end(stream)
        self.finish(code, reason)

    def abandon(self) -> None:
        """It never ran: close both ends of its streams."""
        self.close()
        for fd in {fd for fd in self.streams if fd is not None}:
            os.close(fd)

    def close(self) -> None:
        """Let go of our ends of the streams; output that nobody has read is dropped."""
        self._link.detach(self.ident)
        if self._inlet:
            self._inlet.close()
        for outlet in self._outlets.values():
            outlet.close()
        self._outlets.clear()
