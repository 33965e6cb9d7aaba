"""A blocking client of a guest's agent, over a connected socket. For tests and tools; a shim has `hyper.vm.link`."""

from __future__ import annotations

import os
import socket
import time

from ambi.core.deadline import Deadline
from ambi.core.errors import DeadlineExceeded, Unavailable
from hyper.guest.protocol import (
    CREDIT_STEP,
    FLUSH,
    INIT_ID,
    STREAM_STDERR,
    STREAM_STDOUT,
    SYNC,
    VERSION,
    Decoder,
    Fields,
    HelloTag,
    Items,
    Message,
    Type,
    encode,
    encode_raw,
)

_ANSWERS = frozenset((Type.OK, Type.ERROR, Type.HELLO_OK))
_STREAMS = {Type.STDOUT: STREAM_STDOUT, Type.STDERR: STREAM_STDERR}


class Output:
    """What a process has said so far. `exit` is its code, None while it runs; `events` are the kinds in order."""

    __slots__ = ("events", "exit", "oom_kills", "stderr", "stdin_credit", "stdout")

    def __init__(self) -> None:
        self.stdout = bytearray()
        self.stderr = bytearray()
        self.exit: int | None = None
        self.oom_kills = 0
        self.stdin_credit = 256 << 10
        self.events: list[Type] = []


class GuestClient:
    """Speaks version 1 with the agent behind `connection`, which it owns. Every call takes a Deadline and raises
    DeadlineExceeded when it passes, Unavailable when the guest is gone, and what the guest answers as an error."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._decoder = Decoder()
        self._answers: list[Message] = []
        self._requests = 1 << 16  # ids of requests without a process
        self.outputs: dict[int, Output] = {}
        self.returns_credit = True

    def connect(self, by: Deadline, *, follows_another: bool = False) -> None:
        """Get in step with the agent; `follows_another` host may have left half a frame."""
        self._decoder.resync()
        self._send((FLUSH if follows_another else b"") + SYNC, by)
        while not self._decoder.synced:
            self._receive(by)

    def hello(self, by: Deadline) -> Fields:
        items = (
            (HelloTag.LOWEST, VERSION),
            (HelloTag.HIGHEST, VERSION),
            (HelloTag.CLOCK_NS, time.time_ns()),
            (HelloTag.ENTROPY, os.urandom(32)),
        )
        return self.request(Type.HELLO, items, by)

    def request(self, kind: Type, items: Items, by: Deadline, *, ident: int | None = None) -> Fields:
        """Send a message and wait for its answer; `ident` is that of the process it is about."""
        if ident is None:
            self._requests += 1
            ident = self._requests
        self._send(encode(kind, ident, items), by)
        while True:
            for message in self._answers:
                if message.ident == ident:
                    self._answers.remove(message)
                    if message.kind is Type.ERROR:
                        raise message.error()
                    return message.fields
            self._receive(by)

    def start(self, kind: Type, ident: int, process: Items, by: Deadline) -> int:
        """RUN or EXEC; the pid in the guest."""
        self.outputs[ident] = Output()
        return self.request(kind, process, by, ident=ident).number(1)

    def wait(self, by: Deadline, ident: int = INIT_ID) -> Output:
        """The output of a process that has ended."""
        while self.outputs[ident].exit is None:
            self._receive(by)
        return self.outputs[ident]

    def wait_output(self, text: bytes, by: Deadline, ident: int = INIT_ID) -> Output:
        """The output once `text` is in its stdout."""
        while text not in self.outputs[ident].stdout:
            self._receive(by)
        return self.outputs[ident]

    def write_stdin(self, data: bytes, by: Deadline, ident: int = INIT_ID) -> None:
        """All of `data`, as the guest gives credit."""
        output = self.outputs[ident]
        while data:
            if not output.stdin_credit:
                self._receive(by)
                continue
            piece, data = data[: min(output.stdin_credit, 32768)], data[min(output.stdin_credit, 32768) :]
            output.stdin_credit -= len(piece)
            self._send(encode_raw(Type.STDIN, ident, piece), by)

    def close_stdin(self, by: Deadline, ident: int = INIT_ID) -> None:
        self._send(encode(Type.CLOSE_STDIN, ident), by)

    def give_credit(self, stream: int, size_bytes: int, by: Deadline, ident: int = INIT_ID) -> None:
        self._send(encode(Type.CREDIT, ident, ((1, stream), (2, size_bytes))), by)

    def power_off(self, by: Deadline) -> None:
        """Returns when the connection has ended."""
        self._send(encode(Type.POWER_OFF, 0), by)
        try:
            while True:
                self._receive(by)
        except Unavailable as error:
            if isinstance(error, DeadlineExceeded):
                raise

    def send_bytes(self, data: bytes, by: Deadline) -> None:
        """Any bytes, for what no host should send."""
        self._send(data, by)

    def close(self) -> None:
        self._connection.close()

    def _send(self, data: bytes, by: Deadline) -> None:
        by.check("the guest taking a message")
        self._connection.settimeout(by.remaining())
        try:
            self._connection.sendall(data)
        except TimeoutError as error:
            raise DeadlineExceeded("the guest does not read") from error
        except OSError as error:
            raise Unavailable(f"the guest is gone: {error.strerror}") from error

    def _receive(self, by: Deadline) -> None:
        by.check("an answer of the guest")
        self._connection.settimeout(by.remaining())
        try:
            data = self._connection.recv(1 << 16)
        except TimeoutError as error:
            raise DeadlineExceeded("the guest does not answer") from error
        except OSError as error:
            raise Unavailable(f"the guest is gone: {error.strerror}") from error
        if not data:
            raise Unavailable("the guest is gone")
        for message in self._decoder.feed(data):
            self._take(message, by)

    def _take(self, message: Message, by: Deadline) -> None:
        if message.kind in _ANSWERS:
            self._answers.append(message)
        output = self.outputs.get(message.ident)
        if output is None or message.kind in _ANSWERS:
            return
        output.events.append(message.kind)
        if message.kind in _STREAMS:
            (output.stdout if message.kind is Type.STDOUT else output.stderr).extend(message.body)
            if self.returns_credit:
                self._return_credit(message, output, by)
        elif message.kind is Type.STDIN_CREDIT:
            output.stdin_credit += message.fields.number(1)
        elif message.kind is Type.EXITED:
            output.exit, output.oom_kills = message.fields.number(1), message.fields.number(2)

    def _return_credit(self, message: Message, output: Output, by: Deadline) -> None:
        taken = len(output.stdout if message.kind is Type.STDOUT else output.stderr)
        steps = taken // CREDIT_STEP - (taken - len(message.body)) // CREDIT_STEP
        if steps:
            self.give_credit(_STREAMS[message.kind], steps * CREDIT_STEP, by, message.ident)
