"""Where workers come from: a small process that has loaded everything, and forks one in two milliseconds.

    engine ── nursery (root, one thread, reads nothing but the engine's requests) ── waiter ── worker (jailed)

To start Python and to load the parsers takes fifty milliseconds, as long as the conversion of a small layer. The nursery
starts with the first worker. It ends with the engine, when its socket closes, and after a minute without a worker; in a
process that has no open store it ends with the last worker.

Requests of the engine, one at a time:

    {"do": "fork", "ahead": bool, "load": module or ""}, with the worker's end of a socket
        -> {"pid": of the waiter} or {"error": text}
    {"do": "end", "pid": of a waiter, "kill": bool}
        -> {"status": of its exit, 128 + N for signal N}, once it is gone
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, NoReturn

from ambi.core.errors import AmbiError, Internal
from ambi.linux import unix

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

IDLE_S = 60.0
_REMEMBERED = 64  # ended workers whose status may still be asked for


class Nursery:
    """The engine's side. Safe to use from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._users = self._keepers = 0
        self._used = 0.0
        self._sock: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def keep(self) -> None:
        """From here on it outlives its workers, until `release`."""
        with self._changed:
            self._keepers += 1

    def release(self) -> None:
        with self._changed:
            self._keepers -= 1
            self._settle()

    def warm(self) -> None:
        """Begin to start it, when it is not there: a worker will be wanted soon."""
        with self._changed:
            if self._sock is None:
                self._used = time.monotonic()
                self._start()

    def fork(self, theirs: socket.socket, *, ahead: bool, load: str = "") -> int:
        """A worker with `theirs`, which stays the caller's to close; the pid of its waiter. `leave` must follow.

        load: a module that only this worker needs, loaded before it is jailed.
        """
        request = {"do": "fork", "ahead": ahead, "load": load}
        with self._changed:
            self._users += 1
            try:
                answer = self._ask(request, theirs)
                if "error" in answer:
                    raise Internal(f"cannot start the image worker: {answer['error']}")
                return int(answer["pid"])
            except BaseException:
                self._users -= 1
                self._settle()
                raise

    def leave(self, pid: int, *, kill: bool) -> int | None:
        """The worker at `pid` is no longer wanted. kill: it ends now, and its status is returned."""
        with self._changed:
            self._users -= 1
            try:
                return self._end(pid, kill=True) if kill else None
            finally:
                self._settle()

    def status(self, pid: int) -> int:
        """Of the worker at `pid`, whose socket has closed."""
        with self._changed:
            return self._end(pid, kill=False)

    def _end(self, pid: int, *, kill: bool) -> int:
        if self._sock is None:
            return 128 + signal.SIGKILL  # the nursery was killed, and all that it had forked with it
        try:
            return int(self._exchange({"do": "end", "pid": pid, "kill": kill})["status"])
        except (AmbiError, OSError):
            self._stop()
            return 128 + signal.SIGKILL

    def _ask(self, request: dict[str, Any], sock: socket.socket) -> dict[str, Any]:
        """The answer of the nursery, of a new one where the old one was killed."""
        if self._sock is not None:
            try:
                return self._exchange(request, sock)
            except (AmbiError, OSError):
                self._stop()
        self._start()
        try:
            return self._exchange(request, sock)
        except (AmbiError, OSError) as error:
            self._stop()
            raise Internal(f"cannot start the image worker: {error}", hint="look at the engine's log") from error

    def _exchange(self, request: dict[str, Any], sock: socket.socket | None = None) -> dict[str, Any]:
        assert self._sock is not None
        unix.send(self._sock, request, () if sock is None else (sock.fileno(),))
        answer = unix.receive(self._sock)
        if answer is None:
            raise Internal("the process that forks image workers died")
        answer.close()
        return answer.body

    def _start(self) -> None:
        import subprocess

        ours, theirs = unix.pair()
        with theirs:
            environment = {name: value for name, value in os.environ.items() if name.startswith("AMBI_")}
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-m", "images.layers.nursery", str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env=environment,
                    cwd="/",
                )
            except OSError as error:
                ours.close()
                raise Internal(f"cannot start the image worker: {error}") from error
        self._sock = ours
        threading.Thread(target=self._watch, args=(ours,), name="nursery", daemon=True).start()

    def _watch(self, sock: socket.socket) -> None:
        """End it once it has been idle for long."""
        with self._changed:
            while self._sock is sock:
                self._changed.wait(None if self._users else max(0.1, self._used + IDLE_S - time.monotonic()))
                if self._sock is sock and not self._users and time.monotonic() >= self._used + IDLE_S:
                    self._stop()

    def _settle(self) -> None:
        self._used = time.monotonic()
        if not self._users and not self._keepers:
            self._stop()
        self._changed.notify_all()

    def _stop(self) -> None:
        sock, process, self._sock, self._process = self._sock, self._process, None, None
        if sock is not None:
            sock.close()
        if process is not None:
            process.wait()
        self._changed.notify_all()


NURSERY = Nursery()


def main() -> None:
    import gc

    from images.layers import decoder, worker

    sock = socket.socket(fileno=int(sys.argv[1]))
    decoder.preload()
    gc.freeze()  # what is loaded stays shared with the children
    try:
        _serve(sock, worker.serve)
    except (BrokenPipeError, ConnectionResetError):  # the engine is gone
        pass


class _Children:
    """Those that run, by descriptors that become readable at their end, and how those of late have ended."""

    def __init__(self, poll: select.poll) -> None:
        self._poll = poll
        self._running: dict[int, int] = {}  # pidfd to pid
        self._ended: dict[int, int] = {}

    def add(self, pid: int) -> None:
        fd = os.pidfd_open(pid)
        self._running[fd] = pid
        self._poll.register(fd, select.POLLIN)

    def reap(self, fd: int) -> None:
        """Wait for the child of the descriptor `fd`."""
        pid = self._running.pop(fd)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self._poll.unregister(fd)
        os.close(fd)
        self._ended[pid] = status if status >= 0 else 128 - status
        while len(self._ended) > _REMEMBERED:
            del self._ended[next(iter(self._ended))]

    def end(self, pid: int, *, kill: bool) -> int:
        """Its status, once it is gone."""
        fd = next((fd for fd, running in self._running.items() if running == pid), -1)
        if fd >= 0:
            if kill:
                signal.pidfd_send_signal(fd, signal.SIGKILL)
            self.reap(fd)
        return self._ended.get(pid, 0)


def _serve(sock: socket.socket, work: Callable[..., NoReturn]) -> None:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    children = _Children(poll)
    while True:
        for fd, _ in poll.poll():
            if fd != sock.fileno():
                children.reap(fd)
                break  # the list is of the time before
            message = unix.receive(sock)
            if message is None:
                return
            unix.send(sock, _answer(message, children, work))
            message.close()
            break


def _answer(message: unix.Message, children: _Children, work: Callable[..., NoReturn]) -> dict[str, Any]:
    request = message.body
    if request["do"] == "end":
        return {"status": children.end(request["pid"], kill=request["kill"])}
    try:
        pid = os.fork()
    except OSError as error:  # too many processes; those that are there go on
        return {"error": error.strerror}
    if pid == 0:
        work(message.fds[0], ahead=request["ahead"], load=request["load"])
    children.add(pid)
    return {"pid": pid}


if __name__ == "__main__":
    main()
