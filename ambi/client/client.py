"""The engine, as its clients see it.

    client = Client(roots)                      connects when first asked; starts the engine when nobody listens
    client.get("/containers/json", {"all": "1"})            -> parsed JSON
    client.post("/containers/create", {"name": "a"}, body)  -> parsed JSON, or None without a body
    client.stream("POST", "/images/load", body=file)        -> Response, to be read while it arrives
    client.hijack("POST", "/containers/a/attach", {...})    -> Hijacked: the socket and what came with the head
    client.background("POST", "/containers/a/wait")         -> Pending: its head has arrived, its body has not

Errors come back as members of `ambi.core.errors`, made from the status, the message and the header `Ambi-Hint`.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple, TypeVar

from ambi.client import starter
from ambi.client.http import READ_SIZE, Connection, Lost, Response
from ambi.core import errors
from ambi.core.errors import AmbiError
from ambi.core.roots import Roots

API_VERSION = "1.44"
RETRY_SECONDS, RETRY_PAUSE_SECONDS = 5.0, 0.1
Query = Mapping[str, str] | Sequence[tuple[str, str]]  # pairs where a name comes several times
T = TypeVar("T")
Uploaded = Callable[[int], None]

_BY_STATUS: dict[int, type[AmbiError]] = {
    304: errors.NotModified,
    400: errors.InvalidRequest,
    403: errors.Forbidden,
    404: errors.NotFound,
    409: errors.Conflict,
    501: errors.Unsupported,
    503: errors.Unavailable,
    507: errors.StorageFull,
}
_NOT_FOUND_TEXTS = ("executable file not found", "no such file or directory")
_NOT_EXECUTABLE_TEXTS = ("permission denied", "is a directory")


def error_of(status: int, message: str, hint: str | None = None) -> AmbiError:
    """The error that an answer with `status` and `message` stands for."""
    return _BY_STATUS.get(status, errors.Internal)(message, hint=hint)


def command_error(error: AmbiError) -> AmbiError:
    """`error`, met while starting a program, as docker's clients read its text: 127 or 126 when the program is at fault."""
    text = error.message.lower()
    if any(part in text for part in _NOT_FOUND_TEXTS):
        return errors.CommandNotFound(error.message, hint=error.hint)
    if any(part in text for part in _NOT_EXECUTABLE_TEXTS):
        return errors.CommandNotExecutable(error.message, hint=error.hint)
    return error


def path_of(*parts: str) -> str:
    """`/containers/a%2Fb/json` of ("containers", "a/b", "json"): what a user types must not leave its place."""
    return "".join("/" + quote(part) for part in parts)


def quote(text: str, safe: str = "-._~:") -> str:
    """Percent-encoding as in RFC 3986; `urllib.parse` costs 8 ms to import."""
    out = []
    for byte in os.fsencode(text):
        char = chr(byte)
        out.append(char if (byte < 128 and char.isalnum()) or char in safe else f"%{byte:02X}")
    return "".join(out)


def query_of(query: Query | None) -> str:
    pairs = query.items() if isinstance(query, Mapping) else query or ()
    return "?" + "&".join(f"{quote(k)}={quote(v)}" for k, v in pairs) if pairs else ""


def persistently(ask: Callable[[], T]) -> T:
    """What `ask` returns, asked again while the engine is lost: one that was just killed still takes connections."""
    end = time.monotonic() + RETRY_SECONDS
    while True:
        try:
            return ask()
        except Lost:
            if time.monotonic() > end:
                raise
            time.sleep(RETRY_PAUSE_SECONDS)


class Hijacked(NamedTuple):
    """A connection that has left HTTP: the socket, and what had already been received of the stream."""

    sock: socket.socket
    received: bytes


class Pending:
    """A request whose answer comes later. `fileno` is readable when it is there, or when the engine is gone."""

    __slots__ = ("_connection", "_response")

    def __init__(self, connection: Connection, response: Response) -> None:
        self._connection = connection
        self._response = response

    def fileno(self) -> int:
        return self._connection.sock.fileno()

    def result(self, seconds: float | None = None) -> Any:
        """The parsed answer. Raises Lost when the engine went away, DeadlineExceeded after `seconds`."""
        self._connection.sock.settimeout(seconds)
        try:
            return _json(self._response.read())
        except TimeoutError:
            raise errors.DeadlineExceeded("the engine did not answer in time") from None
        finally:
            self.close()

    def close(self) -> None:
        self._connection.close()


class Client:
    """One user of an engine. Not for several threads at once, but for `background` and `hijack`, which have connections
    of their own, and for signal handlers, which must use `apart`."""

    def __init__(
        self,
        roots: Roots,
        *,
        starts: bool = True,
        report: Callable[[str], None] = lambda _: None,
        seconds: float | None = None,
    ) -> None:
        """starts: start the engine when nobody listens. report: told when that takes long.

        seconds: longest silence of the engine; past it TimeoutError, an OSError.
        """
        self.roots = roots
        self._starts = starts
        self._seconds = seconds
        self._report = report
        self._kept: Connection | None = None
        self._streams: list[Connection] = []

    def get(self, path: str, query: Query | None = None) -> Any:
        return persistently(lambda: self._call("GET", path, query))

    def post(self, path: str, query: Query | None = None, body: Any = None) -> Any:
        return self._call("POST", path, query, body)

    def delete(self, path: str, query: Query | None = None) -> Any:
        return self._call("DELETE", path, query)

    def apart(self) -> Client:
        """A client with a connection of its own that never starts an engine."""
        return Client(self.roots, starts=False)

    def close(self) -> None:
        """Close the connections that are the client's: not hijacked ones, nor those of `background`."""
        self._forget()
        while self._streams:
            self._streams.pop().close()

    def _forget(self) -> None:
        if self._kept is not None:
            self._kept.close()
            self._kept = None

    def stream(self, method: str, path: str, query: Query | None = None, **fields: str) -> Response:
        """Send a request without a body and return when the head of its answer is there; errors are raised.

        fields: more of its header, `x_registry_auth="..."`.
        """
        headers = [("Content-Length", "0")] if method == "POST" else []
        headers += _header(fields)
        connection, response = self._apart(lambda it: it.send(method, _target(path, query), headers))
        self._streams.append(connection)
        return response

    def head(self, path: str, query: Query | None = None) -> dict[str, str]:
        """The header of an answer, names in lower case; errors are raised, with what the status says alone."""
        connection = self._connect()
        try:
            connection.send("HEAD", _target(path, query), [])
            response = connection.response()
        finally:
            connection.close()
        if response.status >= 300:
            raise error_of(response.status, response.reason)
        return response.headers

    def upload(
        self,
        path: str,
        query: Query,
        source: BinaryIO,
        uploaded: Uploaded = lambda _: None,
        *,
        method: str = "POST",
        **fields: str,
    ) -> Response:
        """POST (or `method`) `source` to its end while the answer is read, so that neither side waits for the other.

        uploaded: called from another thread with the number of bytes sent so far. fields: as of `stream`.
        """
        headers = [("Content-Type", "application/x-tar"), ("Transfer-Encoding", "chunked"), *_header(fields)]

        def begin(it: Connection) -> None:
            it.send(method, _target(path, query), headers)
            threading.Thread(target=_feed, args=(it, source, uploaded), daemon=True).start()

        connection, response = self._apart(begin)
        self._streams.append(connection)
        return response

    def hijack(self, path: str, query: Query | None = None, body: Any = None) -> Hijacked:
        """POST, and take the connection over when the engine agrees. Its errors before that are raised."""
        headers = [("Connection", "Upgrade"), ("Upgrade", "tcp")]
        connection, _ = self._apart(lambda it: _send_json(it, "POST", _target(path, query), body, headers))
        return Hijacked(*connection.take())

    def background(self, path: str, query: Query | None = None) -> Pending:
        """POST on a connection of its own; returns when the head of the answer has arrived."""
        headers = [("Content-Length", "0")]
        return Pending(*self._apart(lambda it: it.send("POST", _target(path, query), headers)))

    def _apart(self, send: Callable[[Connection], None]) -> tuple[Connection, Response]:
        """A new connection on which `send` has sent a request, and the head of its answer; errors are raised."""
        connection = self._connect()
        try:
            send(connection)
            return connection, _checked(connection.response())
        except BaseException:
            connection.close()
            raise

    def _call(self, method: str, path: str, query: Query | None, body: Any = None) -> Any:
        try:
            response = self._exchange(method, _target(path, query), body)
            last = response.headers.get("connection", "").lower() == "close"
            data = _checked(response).read()
        except (Lost, errors.Internal, OSError, KeyboardInterrupt):  # whatever else comes is not an answer to the next
            self._forget()
            raise
        if last or not response.reusable:
            self._forget()
        return _json(data)

    def _exchange(self, method: str, target: str, body: Any) -> Response:
        if self._kept is not None and self._kept.ended():  # closed while it was idle
            self._forget()
        if self._kept is None:
            self._kept = self._connect()
        _send_json(self._kept, method, target, body)
        return self._kept.response()

    def _connect(self) -> Connection:
        connection = self._open()
        connection.sock.settimeout(self._seconds)
        return connection

    def _open(self) -> Connection:
        try:
            return Connection(self.roots.socket)
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError) as error:
            if not self._starts:
                hint = "ambi engine start"
                raise errors.Unavailable(f"no engine answers at {self.roots.socket}: {error.strerror}", hint=hint) from error
        except PermissionError as error:
            hint = "run as root, or as a member of the group `ambi`"
            raise errors.Forbidden(f"cannot use the engine at {self.roots.socket}: permission denied", hint=hint) from error
        except OSError as error:
            raise errors.from_os_error(f"cannot use the engine at {self.roots.socket}", error) from error
        starter.start(self.roots, self._report)
        try:
            return Connection(self.roots.socket)
        except OSError as error:
            raise errors.from_os_error(f"cannot use the engine at {self.roots.socket}", error) from error


def _header(fields: dict[str, str]) -> list[tuple[str, str]]:
    return [(name.replace("_", "-"), value) for name, value in fields.items()]


def _target(path: str, query: Query | None) -> str:
    version = "" if path.startswith("/ambi/") or path == "/_ping" else f"/v{API_VERSION}"
    return version + path + query_of(query)


def _send_json(
    connection: Connection, method: str, target: str, body: Any, headers: list[tuple[str, str]] | None = None
) -> None:
    data = b"" if body is None else json.dumps(body, separators=(",", ":")).encode()
    fields = list(headers or ())
    if data or method == "POST":
        fields += [("Content-Type", "application/json"), ("Content-Length", str(len(data)))]
    connection.send(method, target, fields, data)


def _json(data: bytes) -> Any:
    if not data.strip():
        return None
    try:
        return json.loads(data)
    except ValueError:
        raise errors.Internal(f"the engine's answer is no JSON: {data[:80]!r}") from None


def _checked(response: Response) -> Response:
    if response.status < 300:
        return response
    data = response.read()
    hint = response.headers.get("ambi-hint")
    try:
        message = json.loads(data)["message"] if data else response.reason
    except (ValueError, KeyError, TypeError):
        message = data.decode(errors="replace").strip() or response.reason
    raise error_of(response.status, str(message), hint)


def _feed(connection: Connection, source: BinaryIO, uploaded: Uploaded) -> None:
    """Send `source` in chunks. An engine that answers before it has read everything is heard by the reader."""
    sent = 0
    try:
        while data := source.read(READ_SIZE * 4):
            connection.send_bytes(b"%x\r\n%b\r\n" % (len(data), data))
            sent += len(data)
            uploaded(sent)
        connection.send_bytes(b"0\r\n\r\n")
    except (Lost, OSError, ValueError):  # ValueError: the answer has come, and our caller has closed `source`
        try:
            connection.sock.shutdown(socket.SHUT_WR)  # a source that fails must not look like one that ended
        except OSError:  # the engine has ended the connection: it knows
            pass
