"""Docker's API by hand, for what the clients cannot be made to do: a reader that stalls, half a request, exact bytes."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any


class RawClient:
    """One keep-alive connection. `call` sends a request and reads its whole answer."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))
        self.socket.settimeout(120)
        self.buffer = b""

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """(status, parsed JSON or bytes)."""
        self.send(method, path, body)
        status, headers = self.head()
        data = self.body(headers)
        if headers.get("content-type", "").startswith("application/json") and data:
            return status, json.loads(data)
        return status, data

    def send(self, method: str, path: str, body: Any = None, headers: str = "") -> None:
        data = b"" if body is None else json.dumps(body).encode()
        kind = "Content-Type: application/json\r\n" if body is not None else ""
        head = f"{method} /v1.41{path} HTTP/1.1\r\nHost: docker\r\n{kind}{headers}Content-Length: {len(data)}\r\n\r\n"
        self.socket.sendall(head.encode() + data)

    def head(self) -> tuple[int, dict[str, str]]:
        while b"\r\n\r\n" not in self.buffer:
            self._fill()
        text, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        first, *rest = text.decode().split("\r\n")
        return int(first.split()[1]), {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in rest)}

    def body(self, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding") == "chunked":
            parts = []
            while True:
                size = int(self._line(), 16)
                parts.append(self._exactly(size))
                self._line()
                if size == 0:
                    return b"".join(parts)
        return self._exactly(int(headers.get("content-length", "0")))

    def hijack(self, path: str, body: Any = None) -> socket.socket:
        """Upgrade this connection and return its socket; bytes read too early stay in `buffer`."""
        self.send("POST", path, body, "Connection: Upgrade\r\nUpgrade: tcp\r\n")
        status, _ = self.head()
        assert status == 101, status
        return self.socket

    def frames(self) -> dict[int, bytes]:
        """Read framed output to its end: stream number to bytes."""
        out: dict[int, list[bytes]] = {1: [], 2: []}
        while True:
            try:
                header = self._exactly(8)
            except EOFError:
                return {number: b"".join(parts) for number, parts in out.items()}
            out[header[0]].append(self._exactly(int.from_bytes(header[4:], "big")))

    def close(self) -> None:
        self.socket.close()

    def _line(self) -> bytes:
        while b"\r\n" not in self.buffer:
            self._fill()
        line, _, self.buffer = self.buffer.partition(b"\r\n")
        return line

    def _exactly(self, size: int) -> bytes:
        if len(self.buffer) < size:
            parts, have = [self.buffer], len(self.buffer)
            while have < size:
                data = self.socket.recv(min(1 << 20, size - have) if size - have > 65536 else 65536)
                if not data:
                    raise EOFError
                parts.append(data)
                have += len(data)
            self.buffer = b"".join(parts)
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data

    def _fill(self) -> None:
        data = self.socket.recv(65536)
        if not data:
            raise EOFError
        self.buffer += data
