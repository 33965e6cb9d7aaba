"""The connection to the guest's agent: requests and their answers, and the streams of processes, on one socket.

The guest is hostile: a frame that is none, more output than it has credit for, or commands that it does not read end the
VM. While a request waits for its answer, everything that the agent sends is served, and nothing else of this process is:
the loop's other callbacks do not run inside a driver's call.
"""

from __future__ import annotations

import os
import select
import socket
from collections import deque
from collections.abc import Callable
from typing import Protocol

from ambi.core.deadline import Deadline
from ambi.core.errors import AmbiError, Corrupt, DeadlineExceeded, Unavailable
from ambi.core.loop import POLLIN, POLLOUT, Loop
from hyper.guest.protocol import SYNC, Decoder, Items, Message, Type, encode, encode_raw

READ_BYTES = 256 << 10
BUSY_BYTES = 512 << 10  # of unsent frames: no more stdin is read
STUCK_BYTES = 8 << 20  # of unsent frames: the guest does not read; its own messages have a limit of the same size
REQUEST_IDS = 0x8000_0000  # ids of requests that concern no process

ANSWERS = (Type.OK, Type.ERROR, Type.HELLO_OK)


class Receiver(Protocol):
    """What belongs to one id."""

    def receive(self, message: Message) -> None: ...

    def resume(self) -> None:
        """There is room for more stdin again."""


class Host(Protocol):
    """What owns the link."""

    def lost(self, reason: str) -> None:
        """The connection is of no more use; called once."""

    def log(self, text: str) -> None: ...

    def stuck(self, reason: str) -> None:
        """The agent answers no more: end the link with `reason`, but not before the guest's kernel had its chance."""


class Answer:
    """A place for the answer of one request; `message` is None until it has come, then `done` is called with it."""

    __slots__ = ("done", "message")

    def __init__(self, done: Callable[[Message], None] | None = None) -> None:
        self.message: Message | None = None
        self.done = done


class Link:
    """Owns `sock` and watches it in `loop`. `hangup` is a descriptor that is readable once the VMM is gone."""

    def __init__(self, loop: Loop, sock: socket.socket, hangup: int, host: Host) -> None:
        sock.setblocking(False)
        self._loop = loop
        self._socket = sock
        self._hangup = hangup
        self._host = host
        self._decoder = Decoder()
        self._out = bytearray()
        self._answers: dict[int, deque[Answer]] = {}
        self._receivers: dict[int, Receiver] = {}
        self._last_id = REQUEST_IDS
        self._paused = False
        self.stale = 0  # ids below were given by another host: answers to them are nobody's
        self.ended: str | None = None  # why the link is of no use
        loop.watch(sock.fileno(), POLLIN, self._ready)

    # sending

    def sync(self, by: Deadline) -> None:
        """Meet the agent; it may take until its kernel has booted."""
        self._write(SYNC)
        self._wait(lambda: self._decoder.synced, by, "the guest's agent")

    def request(
        self, kind: Type, items: Items = (), *, ident: int | None = None, done: Callable[[Message], None] | None = None
    ) -> Answer:
        """Send a message that will be answered."""
        if ident is None:
            self._last_id = ident = max(REQUEST_IDS, (self._last_id + 1) & 0xFFFF_FFFF)
        answer = Answer(done)
        self._answers.setdefault(ident, deque()).append(answer)
        self._write(encode(kind, ident, items))
        return answer

    def wait(self, answer: Answer, by: Deadline, what: str) -> Message:
        """The answer. Raises what an ERROR carries, DeadlineExceeded, Unavailable when the VM is gone."""
        self._wait(lambda: answer.message is not None, by, what)
        assert answer.message is not None
        if answer.message.kind is Type.ERROR:
            raise answer.message.error()
        return answer.message

    def tell(self, kind: Type, ident: int, items: Items = ()) -> None:
        """Send a message that has no answer."""
        self._write(encode(kind, ident, items))

    def stdin(self, ident: int, data: bytes) -> None:
        self._write(encode_raw(Type.STDIN, ident, data))

    @property
    def busy(self) -> bool:
        """Whether the guest is behind: senders of stdin wait for `resume`."""
        if len(self._out) > BUSY_BYTES:
            self._paused = True
        return self._paused

    # receivers

    def attach(self, ident: int, receiver: Receiver) -> None:
        self._receivers[ident] = receiver

    def detach(self, ident: int) -> None:
        self._receivers.pop(ident, None)

    # the socket

    def _write(self, data: bytes) -> None:
        if self.ended:
            return
        self._out += data
        if len(self._out) > STUCK_BYTES:
            self.fail("the guest does not read what it is sent")
            return
        self._flush()

    def _flush(self) -> None:
        try:
            while self._out:
                sent = self._socket.send(memoryview(self._out)[: 1 << 20])
                del self._out[:sent]
        except BlockingIOError:
            pass
        except OSError as error:
            self.fail(f"the connection to the guest broke: {error.strerror}")
            return
        self._loop.watch(self._socket.fileno(), POLLIN | (POLLOUT if self._out else 0), self._ready)
        if self._paused and len(self._out) < BUSY_BYTES // 2:
            self._paused = False
            for receiver in tuple(self._receivers.values()):
                receiver.resume()

    def _ready(self, revents: int) -> None:
        if self.ended:
            return
        if revents & POLLOUT:
            self._flush()
        if revents & ~POLLOUT and not self.ended:
            self._read()

    def _read(self) -> bool:
        """Read once and serve it; False when there was nothing."""
        try:
            data = self._socket.recv(READ_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self.fail("the VMM closed the connection to the guest")
            return False
        try:
            for message in self._decoder.feed(data):
                self._dispatch(message)
        except AmbiError as error:
            self.fail(error.message)
        return not self.ended

    def _dispatch(self, message: Message) -> None:
        if message.kind in ANSWERS:
            queue = self._answers.get(message.ident)
            if not queue and message.ident < self.stale:
                return
            if not queue:
                raise Corrupt("the guest answered what it was not asked")
            answer = queue.popleft()
            answer.message = message
            if not queue:
                del self._answers[message.ident]
            if answer.done is not None:
                answer.done(message)
        elif message.kind is Type.LOG:
            self._host.log(message.fields.text(1))
        elif message.kind not in (Type.SYNCED, Type.READY):
            receiver = self._receivers.get(message.ident)
            if receiver is not None:
                receiver.receive(message)

    def drain(self) -> None:
        """Serve what the agent sent before its VMM ended."""
        while not self.ended and self._read():
            pass

    def fail(self, reason: str) -> None:
        """End the link; everything that waits fails. Later calls do nothing."""
        if self.ended:
            return
        self.ended = reason
        self._loop.unwatch(self._socket.fileno())
        self._host.lost(reason)

    def stuck(self, reason: str) -> None:
        """End a link whose agent does not answer, soon."""
        if not self.ended:
            self._host.stuck(reason)

    def close(self) -> None:
        self.ended = self.ended or "the VM was removed"
        self._loop.unwatch(self._socket.fileno())
        self._socket.close()

    def wait_for_end(self, by: Deadline) -> None:
        """Serve the agent until the VMM is gone. Raises DeadlineExceeded."""
        self._wait(lambda: self.ended is not None, by, "the guest")

    def _wait(self, done: Callable[[], bool], by: Deadline, what: str) -> None:
        poll = select.poll()
        poll.register(self._hangup, select.POLLIN)
        while not done():
            if self.ended:
                raise Unavailable(f"{what} does not answer: {self.ended}")
            if by.expired():
                raise DeadlineExceeded(f"{what} did not answer in time")
            poll.register(self._socket.fileno(), POLLIN | (POLLOUT if self._out else 0))
            for fd, revents in poll.poll(by.milliseconds()):
                if fd == self._hangup:
                    self.drain()
                    if not done():
                        self.fail("the VMM ended")
                else:
                    self._ready(revents)


def open_pipe() -> tuple[int, int]:
    """A pipe whose both ends are CLOEXEC and non-blocking."""
    return os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
