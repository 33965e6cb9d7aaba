"""Registries for tests: Debian's docker-registry on loopback, and one of our own that misbehaves on demand."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def docker_registry(base: Path, *, htpasswd: str = "", tls: tuple[Path, Path] | None = None) -> Iterator[str]:
    """Debian's registry with its data below `base`; gives `127.0.0.1:PORT`. htpasswd: lines of such a file."""
    port = free_port()
    auth, http = "", f"http: {{addr: 127.0.0.1:{port}}}"
    base.mkdir(parents=True, exist_ok=True)
    if htpasswd:
        (base / "htpasswd").write_text(htpasswd)
        auth = f"auth: {{htpasswd: {{realm: tests, path: {base}/htpasswd}}}}\n"
    if tls:
        http = f"http: {{addr: 127.0.0.1:{port}, tls: {{certificate: {tls[0]}, key: {tls[1]}}}}}"
    storage = f"storage: {{filesystem: {{rootdirectory: {base}/data}}}}"
    (base / "config.yml").write_text(f"version: 0.1\nlog: {{level: error}}\n{storage}\n{auth}{http}\n")
    with open(base / "registry.log", "ab") as log:
        process = subprocess.Popen(["docker-registry", "serve", base / "config.yml"], stdout=log, stderr=log)
    try:
        _wait(port, process)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert process.poll() is None, "the registry ended"
        time.sleep(0.05)
    raise AssertionError("the registry does not listen")


Answer = tuple[int, dict[str, str], bytes]


class FaultyRegistry:
    """Serves `blobs` (digest to bytes) and `manifests` (tag or digest to media type and bytes).

    fault: called with (method, path, headers) before each answer; an Answer of its own replaces the right one.
    cut: path to the number of bytes after which the connection is closed, once for each entry of the list.
    asked: every (method, path, headers) in order.
    """

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, tuple[str, bytes]] = {}
        self.fault: Callable[[str, str, dict[str, str]], Answer | None] = lambda *_: None
        self.cut: dict[str, list[int]] = {}
        self.ranges = True
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add_blob(self, data: bytes) -> dict[str, Any]:
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        self.blobs[digest] = data
        return {"digest": digest, "size": len(data)}

    def add_image(self, layers: list[tuple[bytes, str, str]], tag: str = "1", **config: Any) -> dict[str, Any]:
        """layers: blob, media type, diff ID. Returns the manifest."""
        body = {"architecture": "amd64", "os": "linux", "config": {"Cmd": ["sh"]}, **config}
        body["rootfs"] = {"type": "layers", "diff_ids": [diff_id for _, _, diff_id in layers]}
        descriptor = self.add_blob(json.dumps(body).encode())
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", **descriptor},
            "layers": [{"mediaType": kind, **self.add_blob(blob)} for blob, kind, _ in layers],
        }
        self.add_manifest(manifest, tag)
        return manifest

    def add_manifest(self, body: dict[str, Any], tag: str) -> dict[str, Any]:
        data = json.dumps(body).encode()
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        for name in (tag, digest):
            self.manifests[name] = (body["mediaType"], data)
        return {"mediaType": body["mediaType"], "digest": digest, "size": len(data)}

    def _right(self, path: str) -> Answer:
        kind, _, name = path.rpartition("/")[0].rpartition("/")[2], "", path.rpartition("/")[2]
        if path == "/v2/":
            return 200, {}, b"{}"
        if kind == "manifests" and name in self.manifests:
            media_type, data = self.manifests[name]
            return 200, {"Content-Type": media_type}, data
        if kind == "blobs" and name in self.blobs:
            return 200, {"Content-Type": "application/octet-stream"}, self.blobs[name]
        code = "MANIFEST_UNKNOWN" if kind == "manifests" else "BLOB_UNKNOWN"
        return 404, {}, json.dumps({"errors": [{"code": code, "message": "it is not here"}]}).encode()

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        registry = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                registry.asked.append(("GET", self.path, headers))
                status, fields, data = registry.fault("GET", self.path, headers) or registry._right(self.path)
                start = int(headers["range"][6:].split("-")[0]) if "range" in headers and registry.ranges else 0
                if start and status == 200:
                    status, data = 206, data[start:]
                self.send_response(status)
                for name, value in fields.items():
                    self.send_header(name, value)
                if "Content-Length" not in fields:
                    self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                cuts = registry.cut.get(self.path)
                if cuts:
                    data = data[: cuts.pop(0)]
                    self.close_connection = True
                try:
                    self.wfile.write(data)
                except OSError:
                    self.close_connection = True

        return Handler


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


USER, PASSWORD = "ann", "secret"
HTPASSWD = "ann:$2a$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n"  # the registry takes bcrypt alone
