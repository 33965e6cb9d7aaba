"""The engine's side of a worker: starts it, passes descriptors, reads its answers."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any

from ambi.core.errors import AmbiError, Internal, from_wire
from ambi.linux import unix
from images.layers.convert import Converted
from images.layers.nursery import NURSERY


class Worker:
    """One worker process, from `with` to its end. Jobs run one after another; after an error it is gone.

    It starts beside the caller: the first `start` need not wait for it. ahead: it decompresses in a thread of its own, which
    is worth it where no other worker runs. load: a module that is not every worker's.
    """

    def __init__(self, *, ahead: bool = False, load: str = "") -> None:
        self._ahead, self._load, self._ready = ahead, load, False

    def __enter__(self) -> Worker:
        self._sock, theirs = unix.pair()
        try:
            with theirs:
                self._pid = NURSERY.fork(theirs, ahead=self._ahead, load=self._load)
        except BaseException:
            self._sock.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._sock.close()  # the worker ends at the end of its socket, but perhaps not at once
        NURSERY.leave(self._pid, kill=error is not None)

    @property
    def pid(self) -> int:
        """Of the process that waits for the jailed one."""
        return self._pid

    def wait_ready(self) -> None:
        """Until it is jailed; raises Internal when it could not be."""
        if not self._ready:
            self._receive()
            self._ready = True

    def start(self, job: dict[str, Any], source: int, target: int) -> None:
        """Begin a job; both descriptors stay the caller's. `result` must follow."""
        unix.send(self._sock, job, (source, target))

    def result(self) -> dict[str, Any]:
        """The answer to the last job; raises the worker's error, or Internal when the worker has died."""
        self.wait_ready()
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
            status = NURSERY.status(self._pid)
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
    except OSError:  # more than pipe-max-size: one of the usual size is slower
        pass
    return read_end, write_end


def write_all(fd: int, data: memoryview | bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
