"""One process of the workload with its stdio: init, or an exec."""

from __future__ import annotations

import os
from collections.abc import Callable

from ambi.core.driver import Process, Streams
from ambi.core.loop import Loop
from ambi.core.model import ExitStatus
from ambi.shim.attach import STDERR, STDOUT, Hub
from ambi.shim.log import LogWriter
from ambi.shim.stdio import Input, Output

DRAIN_SECONDS = 2.0  # how long output may stay open after the exit: a stray child may hold the pipe for ever


class Session:
    """Pumps `process` until it has ended and its output is read to the end; then calls `ended(session)`, once."""

    def __init__(self, loop: Loop, hub: Hub, log: LogWriter | None, ended: Callable[[Session], None]) -> None:
        self.hub = hub
        self.exit: ExitStatus | None = None
        self.finished = False
        self.process: Process | None = None
        self._loop = loop
        self._log = log
        self._ended = ended
        self._outputs: list[Output] = []
        self._input: Input | None = None
        self.on_end: Callable[[ExitStatus], object] = lambda _: None  # before clients see the end, once

    def run(self, process: Process) -> None:
        """Take over the streams of `process`."""
        self.process = process
        streams = process.streams
        if streams.stdin is not None:
            self._input = Input(self._loop, _own_stdin(streams))
        self._outputs = [self._pump(STDOUT, streams.stdout)]
        if streams.stderr is not None:
            self._outputs.append(self._pump(STDERR, streams.stderr))
        self.hub.open(self._input)
        if process.exit is not None:
            self._on_exit(process.exit)
        else:
            process.on_exit = self._on_exit

    def end(self, status: ExitStatus) -> None:
        """Give up on a process that does not report its end."""
        if self.exit is None:
            self.exit = status
        self._finish_output()

    def abandon(self) -> None:
        """The process never ran: free its streams and let the clients go."""
        for output in self._outputs:
            output.close()
        if self._input is not None:
            self._input.close()
        self.hub.end()

    def _pump(self, stream: int, fd: int) -> Output:
        log, hub = self._log, self.hub

        def sink(data: bytes) -> None:
            if log is not None:
                log.write(stream, data)
            if hub.clients:
                hub.output(stream, data)

        def ended() -> None:
            if log is not None:
                log.finish(stream)
            self._check()

        return Output(self._loop, fd, sink, ended)

    def _on_exit(self, status: ExitStatus) -> None:
        self.exit = status
        if any(output.open for output in self._outputs):
            self._loop.later(DRAIN_SECONDS, self._finish_output)
        self._check()

    def _finish_output(self) -> None:
        for output in self._outputs:
            output.finish()
        self._check()

    def _check(self) -> None:
        if self.exit is None or any(output.open for output in self._outputs):
            return
        if self._input is not None:
            self._input.close()
        if not self.finished:
            self.on_end(self.exit)
        self.hub.end()
        if not self.finished:
            self.finished = True
            self._ended(self)


def _own_stdin(streams: Streams) -> int:
    """A terminal has one descriptor for both ways, and each pump needs its own to watch."""
    assert streams.stdin is not None
    if streams.stdin in (streams.stdout, streams.stderr):
        fd = os.dup(streams.stdin)
        os.set_inheritable(fd, False)
        return fd
    return streams.stdin
