"""A running monitor of ours, as the driver sees it. Implements hyper.vm.monitor.Monitor."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any

from ambi.core import errors
from ambi.core.deadline import Deadline
from ambi.core.errors import AmbiError, DeadlineExceeded, Unavailable
from hyper.vm.jail import Child
from hyper.vm.monitor import BOOT, number
from hyper.vmm.control import MAX_MESSAGE

GONE = "the monitor is gone"
STRANGE = "the monitor's answer is damaged"


class VmmMonitor:
    """Owns the control socket and the child. One request at a time."""

    __slots__ = ("_cause", "_error", "_last", "_socket", "child", "hotplug_bytes", "origin")

    def __init__(self, child: Child, sock: socket.socket, *, origin: str = BOOT, hotplug_bytes: int = 0) -> None:
        self.child = child
        self._socket = sock
        self._last = 0
        self._cause = ""
        self._error: AmbiError | None = None
        self.origin = origin
        self.hotplug_bytes = hotplug_bytes

    def block_bytes(self, by: Deadline) -> tuple[int, int]:
        figures = self.call("figures", by)
        return number(figures.get("read_bytes")), number(figures.get("written_bytes"))

    def inspect(self, by: Deadline) -> dict[str, Any]:
        figures = self.call("figures", by)
        return {"vmm": "ambi", "accelerator": "kvm", "started": self.origin, **figures}

    def resize_memory(self, more_bytes: int, by: Deadline) -> int:
        return number(self.call("memory", by, bytes=more_bytes).get("plugged"))

    def memory_plugged(self, by: Deadline) -> int:
        return number(self.call("memory", by).get("plugged"))

    def resize_disk(self, serial: str, size_bytes: int, by: Deadline) -> None:
        if number(self.call("resize", by, serial=serial).get("bytes")) < size_bytes:
            raise Unavailable(STRANGE)

    def sysrq(self, key: str, write: Callable[[bytes], None], by: Deadline) -> None:
        self.call("sysrq", by, key=key)

    def plug_disk(self, serial: str, fd: int, by: Deadline, *, readonly: bool) -> int:
        return number(self.call("plug", by, (fd,), kind="disk", serial=serial, readonly=readonly).get("slot"))

    def plug_share(self, tag: str, fd: int, by: Deadline) -> int:
        return number(self.call("plug", by, (fd,), kind="share", tag=tag).get("slot"))

    def unplug(self, slot: int, by: Deadline) -> None:
        self.call("unplug", by, slot=slot)

    def call(self, op: str, by: Deadline, fds: tuple[int, ...] = (), **fields: Any) -> dict[str, Any]:
        """The answer to `op`. Raises Unavailable (it is gone), DeadlineExceeded, or what it answers."""
        self._last += 1
        request = json.dumps({"id": self._last, "op": op, **fields}, separators=(",", ":")).encode()
        try:
            self._socket.settimeout(by.timeout())
            socket.send_fds(self._socket, [request], list(fds))
        except TimeoutError as error:
            raise DeadlineExceeded(f"the monitor did not take {op} in time") from error
        except OSError as error:
            raise Unavailable(GONE) from error
        while True:
            answer = self._receive(by)
            if answer.get("id") == self._last:  # an earlier one came too late for its caller
                return _outcome(answer)

    def _receive(self, by: Deadline) -> dict[str, Any]:
        """The next message that is no event."""
        while True:
            try:
                self._socket.settimeout(by.timeout())
                data = self._socket.recv(MAX_MESSAGE)
            except TimeoutError as error:
                raise DeadlineExceeded("the monitor did not answer in time") from error
            except OSError as error:
                raise Unavailable(GONE) from error
            if not data:
                raise Unavailable(GONE)
            message = _object(data)
            if "event" not in message:
                return message
            self._keep(message)

    def _keep(self, event: dict[str, Any]) -> None:
        if event.get("event") == "end":
            cause = "".join(c for c in str(event.get("cause", "")) if c.isalnum() or c == "-")[:40]
            detail = "".join(c if c.isprintable() else " " for c in str(event.get("detail", "")))[:300].strip()
            self._cause = f"{cause}: {detail}" if detail else cause
            if event.get("kind"):
                self._error = errors.from_wire({"kind": str(event["kind"]), "message": detail or cause})

    def why(self) -> str:
        try:
            while not self._cause:
                self._receive(Deadline.after(0))
        except AmbiError:  # there is nothing more to be read
            pass
        return self._cause

    def error(self) -> AmbiError | None:
        """Of a monitor that has ended because something was wrong with what it was given: what."""
        self.why()
        return self._error

    def close(self) -> None:
        self._socket.close()


def _object(data: bytes) -> dict[str, Any]:
    try:
        message = json.loads(data)
    except ValueError as error:
        raise Unavailable(STRANGE) from error
    if not isinstance(message, dict):
        raise Unavailable(STRANGE)
    return message


def _outcome(answer: dict[str, Any]) -> dict[str, Any]:
    error = answer.get("error")
    if isinstance(error, dict):
        raise errors.from_wire({**error, "message": str(error.get("message"))[:300]})
    found = answer.get("ok")
    if not isinstance(found, dict):
        raise Unavailable(STRANGE)
    return found
