"""The engine's side of PROTOCOL.md: ask the zygote for shims, and talk to them from any thread.

    zygote = ZygoteClient(run_root)
    shim = zygote.spawn(id, "container", data_dir, run_dir, on_event=..., on_close=...)
    shim.call("attach", fds=[client.fileno()], stdout=True, framed=True)
    shim.call("start", by=Deadline.after(30))

or, with a plan in hand and nothing else, `launch(plan, run_root)`. One thread of the process reads all connections, another
runs the callbacks in order: a callback may block or `call`, and delays only other callbacks.
"""

from __future__ import annotations

import os
import queue
import select
import socket
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ambi.core.deadline import Deadline
from ambi.core.errors import AmbiError, DeadlineExceeded, Unavailable, Unsupported, from_os_error, from_wire
from ambi.core.plan import LAUNCH_FILE, LaunchPlan
from ambi.linux import unix
from ambi.shim import record
from ambi.shim.launch import connect as connect_zygote
from ambi.shim.launch import ensure

Event = dict[str, Any]
SEND_SECONDS = 30.0  # how long a peer may leave its connection full


class ShimConnection:
    """A control connection. Closing it leaves the shim running."""

    def __init__(
        self,
        instance_id: str,
        sock: socket.socket,
        *,
        pid: int = 0,
        on_event: Callable[[Event], None] | None = None,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        self.instance_id = instance_id
        self.pid = pid
        self._sock = sock
        self._on_event = on_event
        self._on_close = on_close
        self._lock = threading.Lock()
        self._seq = 0
        self._waiting: dict[int, _Slot] = {}
        self._closed = False
        sock.settimeout(SEND_SECONDS)
        _reader().add(self)

    @property
    def closed(self) -> bool:
        """Whether the connection has ended: by `close`, or because the shim is gone."""
        return self._closed

    def fileno(self) -> int:
        return self._sock.fileno()

    def call(self, op: str, *, fds: Iterable[int] = (), by: Deadline | None = None, **fields: Any) -> dict[str, Any]:
        """Do `op` and return its result. `fds` stay the caller's; `by` also goes along as `by_s`.

        Raises what the shim raised; DeadlineExceeded when it has not answered by `by` (it may do so later); Unavailable when
        the connection has ended, but for `delete`, which is then done.
        """
        message = self._exchange(op, fds, by, fields)
        if message is None:
            return self._gone(op)
        message.close()
        return self._result(message)

    def descriptor(self, op: str, *, by: Deadline | None = None, **fields: Any) -> int:
        """The descriptor that comes with the answer to `op`: the caller's. Raises as `call`, and Unavailable without one."""
        message = self._exchange(op, (), by, fields)
        if message is None:
            raise self._ended_before(op)
        try:
            self._result(message)
            if len(message.fds) != 1:
                raise Unavailable(f"the shim of {self.instance_id[:12]} answered '{op}' without a descriptor")
            return message.fds.pop()
        finally:
            message.close()

    def _exchange(self, op: str, fds: Iterable[int], by: Deadline | None, fields: dict[str, Any]) -> unix.Message | None:
        """The answer to a request, which the caller closes; None when the connection has ended."""
        remaining = by.remaining() if by is not None else None
        if remaining is not None:
            fields.setdefault("by_s", remaining)
        slot = _Slot()
        with self._lock:
            if self._closed:
                return None
            self._seq += 1
            seq = self._seq
            self._waiting[seq] = slot
        try:
            unix.send(self._sock, {"op": op, "seq": seq, **fields}, fds)
        except OSError as error:
            self._waiting.pop(seq, None)
            if isinstance(error, TimeoutError):
                raise Unavailable(f"the shim of {self.instance_id[:12]} does not read its requests") from error
            return None
        except AmbiError:
            self._waiting.pop(seq, None)
            raise
        if not slot.done.wait(None if remaining is None else remaining + 1.0):  # its own answer about the time comes first
            self._waiting.pop(seq, None)
            raise DeadlineExceeded(f"the shim of {self.instance_id[:12]} did not answer '{op}' in time")
        return slot.answer

    @staticmethod
    def _result(message: unix.Message) -> dict[str, Any]:
        if "error" in message.body:
            raise from_wire(message.body["error"])
        result: dict[str, Any] = message.body.get("ok") or {}
        return result

    def tell(self, op: str, *, fds: Iterable[int] = (), **fields: Any) -> None:
        """Ask for `op` without an answer. A shim that has ended is no error."""
        try:
            unix.send(self._sock, {"op": op, **fields}, fds)
        except OSError:  # it has ended, and the end of its connection tells that
            pass

    def close(self) -> None:
        """End the connection; `on_close` is called, and waiting calls raise Unavailable."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:  # the shim was faster
            pass

    def _gone(self, op: str) -> dict[str, Any]:
        if op == "delete":
            return {}
        raise self._ended_before(op)

    def _ended_before(self, op: str) -> Unavailable:
        return Unavailable(f"the shim of {self.instance_id[:12]} has ended, so '{op}' cannot be done")

    def _receive(self) -> bool:
        """Take one message, in the reader's thread; False at the end of the connection."""
        try:
            message = unix.receive(self._sock)
        except (AmbiError, OSError):
            message = None
        if message is None:
            return False
        seq = message.body.get("seq")
        slot = self._waiting.pop(seq, None) if isinstance(seq, int) else None
        if slot is not None:
            slot.answer = message
            slot.done.set()
            return True
        message.close()
        if not isinstance(seq, int) and self._on_event is not None:
            _callbacks().put((self._on_event, message.body))
        return True

    def _ended(self) -> None:
        """In the reader's thread, after the last message."""
        with self._lock:
            self._closed = True
            waiting = list(self._waiting.values())
            self._waiting.clear()
        self._sock.close()
        for slot in waiting:
            slot.done.set()
        if self._on_close is not None:
            _callbacks().put((self._on_close,))


class _Slot:
    __slots__ = ("answer", "done")

    def __init__(self) -> None:
        self.done = threading.Event()
        self.answer: unix.Message | None = None


class _Reader:
    """One thread that reads all connections."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._connections: dict[int, ShimConnection] = {}
        threading.Thread(target=self._run, name="shim-reader", daemon=True).start()

    def add(self, connection: ShimConnection) -> None:
        fd = connection.fileno()
        self._connections[fd] = connection
        self._epoll.register(fd, select.EPOLLIN)

    def _run(self) -> None:
        while True:
            for fd, _ in self._epoll.poll():
                connection = self._connections[fd]
                if not connection._receive():
                    self._epoll.unregister(fd)
                    del self._connections[fd]
                    connection._ended()


_start_lock = threading.Lock()
_the_reader: _Reader | None = None
_the_callbacks: queue.SimpleQueue[tuple[Any, ...]] | None = None


def _reader() -> _Reader:
    global _the_reader
    with _start_lock:
        if _the_reader is None:
            _the_reader = _Reader()
        return _the_reader


def _callbacks() -> queue.SimpleQueue[tuple[Any, ...]]:
    global _the_callbacks
    with _start_lock:
        if _the_callbacks is None:
            _the_callbacks = queue.SimpleQueue()
            threading.Thread(target=_run_callbacks, args=(_the_callbacks,), name="shim-events", daemon=True).start()
        return _the_callbacks


def _run_callbacks(waiting: queue.SimpleQueue[tuple[Any, ...]]) -> None:
    while True:
        callback, *arguments = waiting.get()
        try:
            callback(*arguments)
        except Exception as error:  # one instance's failure must not silence the others'
            threading.excepthook(threading.ExceptHookArgs((type(error), error, error.__traceback__, None)))


class ZygoteClient:
    """Talks to the zygote of `run_root`, which is started when it does not answer. Thread-safe."""

    def __init__(self, run_root: Path) -> None:
        self.run_root = run_root
        self._lock = threading.Lock()
        self._sock: socket.socket | None = None
        self._seq = 0

    def ping(self) -> dict[str, Any]:
        """`pid` and `version` of the zygote."""
        return self._call({"op": "ping"})

    def spawn(
        self,
        instance_id: str,
        isolation: str,
        data_dir: Path,
        run_dir: Path,
        *,
        starts: bool = True,
        on_event: Callable[[Event], None] | None = None,
        on_close: Callable[[], None] | None = None,
    ) -> ShimConnection:
        """A new shim. It ends by itself when its connections end before anything was attached or started.

        starts: whether it will start the instance; the one that is parked for a start is left to others else.
        """
        ours, theirs = unix.pair()
        try:
            request = {
                "op": "spawn",
                "id": instance_id,
                "isolation": isolation,
                "data_dir": str(data_dir),
                "run_dir": str(run_dir),
                "run_root": str(self.run_root),
                "starts": starts,
            }
            pid = self._call(request, [theirs.fileno()])["pid"]
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return ShimConnection(instance_id, ours, pid=pid, on_event=on_event, on_close=on_close)

    def forget(self, layers: Iterable[str]) -> list[str]:
        """Unmount layers that no instance uses; those that are not mounted any more."""
        dropped: list[str] = self._call({"op": "forget", "layers": list(layers)})["dropped"]
        return dropped

    def stop(self) -> None:
        """End the zygote, if there is one, and what it has prepared; returns when it has. Shims live on."""
        with self._lock:
            try:
                self._exchange({"op": "stop"}, [])
                assert self._sock is not None
                while unix.receive(self._sock) is not None:  # its process ends last
                    pass
            except (AmbiError, OSError):
                pass
            self._disconnect()

    def close(self) -> None:
        with self._lock:
            self._disconnect()

    def _call(self, request: dict[str, Any], fds: Iterable[int] = ()) -> dict[str, Any]:
        with self._lock:
            try:
                answer = self._exchange(request, fds)
            except OSError:  # it was killed, or has never been there
                self._disconnect()
                ensure(self.run_root)
                try:
                    answer = self._exchange(request, fds)
                except OSError as error:
                    self._disconnect()
                    raise from_os_error(f"the zygote of {self.run_root} does not answer", error) from error
        if "error" in answer:
            raise from_wire(answer["error"])
        result: dict[str, Any] = answer["ok"]
        return result

    def _exchange(self, request: dict[str, Any], fds: Iterable[int]) -> dict[str, Any]:
        """One request and its answer; OSError when there is no zygote or it ends meanwhile."""
        if self._sock is None:
            self._sock = connect_zygote(self.run_root)
            self._sock.settimeout(SEND_SECONDS)
        self._seq += 1
        unix.send(self._sock, {**request, "seq": self._seq}, fds)
        message = unix.receive(self._sock)
        if message is None:
            raise ConnectionResetError("the zygote has closed the connection")
        message.close()
        return message.body

    def _disconnect(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None


def connect(
    instance_id: str,
    run_dir: Path,
    *,
    on_event: Callable[[Event], None] | None = None,
    on_close: Callable[[], None] | None = None,
) -> ShimConnection | None:
    """A connection to the shim that supervises `run_dir`, None when there is none. Ask for its `state` next.

    Raises Unsupported when it speaks another version of the protocol: it is to be left alone.
    """
    found = record.read(run_dir)
    if found is None or not found.alive():
        return None
    if found.version != record.VERSION:
        raise Unsupported(
            f"the shim of {instance_id[:12]} speaks version {found.version} of its protocol, this engine {record.VERSION}",
            hint=f"stop the instance with the version that started it, or end process {found.pid}",
        )
    try:
        sock = unix.connect(os.path.join(run_dir, record.SOCKET), SEND_SECONDS)
    except OSError:
        return None
    return ShimConnection(instance_id, sock, pid=found.pid, on_event=on_event, on_close=on_close)


_zygotes: dict[Path, ZygoteClient] = {}


def launch(
    plan: LaunchPlan,
    run_root: Path,
    *,
    on_event: Callable[[Event], None] | None = None,
    on_close: Callable[[], None] | None = None,
) -> ShimConnection:
    """Write `plan` where its shim looks for it and spawn that shim; nothing has been created or started yet.

    Makes the directories that are missing. The zygote is that of `run_root`, started when it is not there.
    """
    for directory in (run_root, plan.data_dir, plan.run_dir):
        directory.mkdir(parents=True, exist_ok=True, mode=0o711 if directory == run_root else 0o700)
    record.write_whole(str(plan.data_dir / LAUNCH_FILE), plan.to_json().encode())
    with _start_lock:
        zygote = _zygotes.setdefault(run_root, ZygoteClient(run_root))
    return zygote.spawn(plan.id, plan.isolation.value, plan.data_dir, plan.run_dir, on_event=on_event, on_close=on_close)
