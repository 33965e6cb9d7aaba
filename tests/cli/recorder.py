"""A server that answers as an engine would and keeps what it was asked: to compare what two command lines send."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ID = "a" * 64
Answer = tuple[int, Any]


class Request(NamedTuple):
    method: str
    target: str
    body: bytes

    @property
    def path(self) -> str:
        """Without version and query."""
        path = self.target.partition("?")[0]
        return "/" + path.split("/", 2)[2] if path.startswith("/v1.") else path

    def json(self) -> Any:
        return json.loads(self.body)


class Recorder:
    """Listens on `path`; `answers` maps (method, path) to (status, JSON value), the rest is answered as created or empty."""

    def __init__(self, path: Path, answers: dict[tuple[str, str], Answer] | None = None) -> None:
        self.path = path
        self.requests: list[Request] = []
        self.answers = answers or {}
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(16)
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def asked(self, method: str, path: str) -> list[Request]:
        return [r for r in self.requests if r.method == method and r.path == path]

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(peer,), daemon=True).start()

    def _serve(self, peer: socket.socket) -> None:
        with peer, peer.makefile("rb") as stream:
            while line := stream.readline():
                method, target, _ = line.decode().split()
                headers = {}
                while header := stream.readline().strip():
                    name, _, value = header.decode().partition(":")
                    headers[name.lower()] = value.strip()
                request = Request(method, target, stream.read(int(headers.get("content-length", 0))))
                self.requests.append(request)
                status, value = self._answer(request)
                with contextlib.suppress(OSError):
                    peer.sendall(_encode(method, status, value))

    def _answer(self, request: Request) -> Answer:
        known = self.answers.get((request.method, request.path))
        if known is not None:
            return known
        if request.path.endswith("/create"):
            return 201, {"Id": ID, "Warnings": []}
        if request.path.endswith("/exec"):
            return 201, {"Id": ID}
        return (200, {}) if request.method in ("GET", "HEAD") else (204, None)


def _encode(method: str, status: int, value: Any) -> bytes:
    data = b"" if value is None else json.dumps(value).encode()
    head = f"HTTP/1.1 {status} X\r\nApi-Version: 1.44\r\nOstype: linux\r\nContent-Type: application/json\r\n"
    length = "" if status == 204 else f"Content-Length: {len(data)}\r\n"
    return f"{head}{length}\r\n".encode() + (b"" if method == "HEAD" else data)


@contextlib.contextmanager
def recording(path: Path, answers: dict[tuple[str, str], Answer] | None = None) -> Iterator[Recorder]:
    recorder = Recorder(path, answers)
    try:
        yield recorder
    finally:
        recorder.close()
