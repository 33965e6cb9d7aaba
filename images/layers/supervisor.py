"""The engine's side of a worker: starts it, passes descriptors, reads its answers."""

from __future__ import annotations

import os
import socket
import sys
from types import TracebackType
from typing import Any

from ambi.core.errors import AmbiError, Internal, from_wire
from ambi.linux import unix
from images.layers.convert import Converted


class Worker:
    """One worker process, from `with` to its end. Jobs run one after another; after an error it is gone.

    Use it from one thread: the worker ends with the thread that started it.
    """

    def __enter__(self) -> Worker:
        import subprocess

        ours, theirs = unix.pair()
        with theirs:
            environment = {name: value for name, value in os.environ.items() if name.startswith("AMBI_")}
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-m", "images.layers.worker", str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env=environment,
                    cwd="/",
                )
            except OSError as error:
                ours.close()
                raise Internal(f"cannot start the image worker: {error}") from error
        self._sock: socket.socket = ours
        try:
            self._receive()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self._process.kill()
        self._end()

    def _end(self) -> None:
        self._sock.close()  # the worker ends at the end of its socket
        self._process.wait()

    @property
    def pid(self) -> int:
        """Of the process that waits for the jailed one."""
        return self._process.pid

    def start(self, job: dict[str, Any], source: int, target: int) -> None:
        """Begin a job; both descriptors stay the caller's. `result` must follow."""
        unix.send(self._sock, job, (source, target))

    def result(self) -> dict[str, Any]:
        """The answer to the last job; raises the worker's error, or Internal when the worker has died."""
        answer = self._receive()
        if "error" in answer:
            raise from_wire(answer["error"])
        return dict(answer["ok"])

    def converted(self) -> Converted:
        return Converted(**self.result())

    def _receive(self) -> dict[str, Any]:
        try:
            message = unix.receive(self._sock)
        except ConnectionResetError:  # it died with a request of ours unread
            message = None
        except (AmbiError, OSError) as error:
            raise Internal(f"the image worker does not answer: {error}") from error
        if message is None:
            status = self._process.wait()
            raise Internal(
                f"the image worker died with status {status} while it read an archive", hint="look at the engine's log"
            )
        message.close()
        return message.body


def pipe() -> tuple[int, int]:
    """A pipe of one mebibyte where the host allows it."""
    import fcntl

    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    try:
        fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 1 << 20)
    except OSError:
        pass
    return read_end, write_end


def write_all(fd: int, data: memoryview | bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
