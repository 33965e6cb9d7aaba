"""A small client of QEMU's machine protocol (docs/interop/qmp-spec in QEMU's sources), over a connected socket.

The VMM is not trusted either: lines are bounded, and what is not JSON of the expected shape is Unavailable.
"""

from __future__ import annotations

import json
import socket
from typing import Any

from ambi.core.deadline import Deadline
from ambi.core.errors import DeadlineExceeded, Internal, Unavailable

MAX_LINE = 1 << 20


class Qmp:
    """Commands in, answers out, one at a time; events are kept (the last 64). Owns the socket.

    Starting a VM does not wait for the greeting: negotiation is asked for at once and read with the first answer.
    """

    __slots__ = ("_buffer", "_negotiated", "_socket", "events")

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._buffer = bytearray()
        self._negotiated = False
        self.events: list[dict[str, Any]] = []
        sock.sendall(b'{"execute": "qmp_capabilities"}\n')

    def execute(self, command: str, by: Deadline, **arguments: Any) -> Any:
        """The `return` of `command`. Raises Unavailable (QEMU is gone), DeadlineExceeded, Internal (QEMU refused)."""
        if not self._negotiated:
            self._greet(by)
        return self._call(command, arguments, by)

    def send_fd(self, name: str, fd: int, by: Deadline) -> None:
        """Have QEMU keep a copy of `fd` under `name`. Raises as `execute`."""
        if not self._negotiated:
            self._greet(by)
        self._call("getfd", {"fdname": name}, by, (fd,))

    def wait_for(self, event: str, by: Deadline) -> None:
        """Wait until `event` has come, be it before this call. Raises Unavailable, DeadlineExceeded."""
        while all(found.get("event") != event for found in self.events):
            by.check(f"QEMU's event {event}")
            self._take(self._object(by))

    def _greet(self, by: Deadline) -> None:
        if "QMP" not in self._message(by):
            raise Unavailable("QEMU's monitor does not greet")
        if "return" not in self._message(by):
            raise Unavailable("QEMU's monitor does not negotiate")
        self._negotiated = True

    def why_shut_down(self) -> str:
        """Of a VMM that has ended: the reason in its SHUTDOWN event (`guest-reset`, `guest-panic`, ...), else ""."""
        try:
            while True:
                self._take(json.loads(self._line(Deadline.after(0))))
        except (Unavailable, ValueError):
            pass
        for event in reversed(self.events):
            data = event.get("data")
            if event.get("event") == "SHUTDOWN" and isinstance(data, dict):
                return "".join(c for c in str(data.get("reason", "")) if c.isalnum() or c == "-")[:40]
        return ""

    def _call(self, command: str, arguments: dict[str, Any], by: Deadline, fds: tuple[int, ...] = ()) -> Any:
        request = {"execute": command, "arguments": arguments} if arguments else {"execute": command}
        try:
            self._socket.settimeout(by.timeout())
            data = json.dumps(request).encode() + b"\n"
            if fds:
                socket.send_fds(self._socket, [data], fds)
            else:
                self._socket.sendall(data)
        except TimeoutError as error:
            raise DeadlineExceeded(f"QEMU did not take {command} in time") from error
        except OSError as error:
            raise Unavailable(f"QEMU is gone: {error.strerror}") from error
        while True:
            answer = self._message(by)
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise Internal(f"QEMU refused {command}: {_text(answer['error'])}")

    def _message(self, by: Deadline) -> dict[str, Any]:
        """The next message that is no event."""
        while True:
            body = self._object(by)
            if not self._take(body):
                return body

    def _object(self, by: Deadline) -> dict[str, Any]:
        try:
            body = json.loads(self._line(by))
        except ValueError as error:
            raise Unavailable("QEMU's monitor does not speak JSON") from error
        if not isinstance(body, dict):
            raise Unavailable("QEMU's monitor does not speak QMP")
        return body

    def _take(self, body: Any) -> bool:
        """Keep `body` if it is an event."""
        if not isinstance(body, dict) or "event" not in body:
            return False
        self.events = [*self.events[-63:], body]
        return True

    def _line(self, by: Deadline) -> bytes:
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > MAX_LINE:
                raise Unavailable("QEMU's monitor sends a line without end")
            try:
                self._socket.settimeout(by.timeout())
                data = self._socket.recv(65536)
            except TimeoutError as error:
                raise DeadlineExceeded("QEMU's monitor did not answer in time") from error
            except OSError as error:
                raise Unavailable(f"QEMU is gone: {error.strerror}") from error
            if not data:
                raise Unavailable("QEMU is gone")
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    def close(self) -> None:
        self._socket.close()


def _text(error: Any) -> str:
    text = error.get("desc") if isinstance(error, dict) else None
    return str(text or error)[:300]
