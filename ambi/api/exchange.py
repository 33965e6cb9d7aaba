"""One request on its way through the API: what handlers read from and answer with.

A handler is a function from a `Call` to a `Reply`, or to None when it has answered itself with `call.stream()` or
`call.hijack()`. It raises members of the error tree, which `error_reply` turns into Docker's form:

    {"message": "..."}      with the class's HTTP status, and the hint in the header `Ambi-Hint`
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from ambi.api.http import Connection, Request, Stream, connection_options
from ambi.api.query import Query
from ambi.core.deadline import Deadline
from ambi.core.errors import AmbiError, InvalidRequest, NotModified
from ambi.core.version import VERSION

if TYPE_CHECKING:
    from ambi.engine.engine import Engine

API_VERSION = (1, 44)
MIN_API_VERSION = (1, 24)
MAX_JSON_BYTES = 4 << 20
BODY_SECONDS = 30.0  # for a JSON body to arrive

RAW_STREAM = "application/vnd.docker.raw-stream"
MULTIPLEXED_STREAM = "application/vnd.docker.multiplexed-stream"

COMMON_HEADERS: tuple[tuple[str, str], ...] = (
    ("Api-Version", "1.44"),
    ("Docker-Experimental", "true"),
    ("Ostype", "linux"),
    ("Server", f"ambi/{VERSION} (linux)"),
)
JSON_HEADERS = (*COMMON_HEADERS, ("Content-Type", "application/json"))

_encode = json.JSONEncoder(separators=(",", ":")).encode


class Reply(NamedTuple):
    """A complete answer."""

    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = COMMON_HEADERS


NO_CONTENT = Reply(204)


def to_json(value: Any) -> bytes:
    """One line, its end included, as Go's encoder writes."""
    return _encode(value).encode("ascii") + b"\n"


def json_reply(value: Any, status: int = 200) -> Reply:
    return Reply(status, to_json(value), JSON_HEADERS)


def error_reply(error: AmbiError) -> Reply:
    if isinstance(error, NotModified):
        return Reply(304)
    headers = JSON_HEADERS if error.hint is None else (*JSON_HEADERS, ("Ambi-Hint", error.hint))
    return Reply(error.http_status, to_json({"message": error.message}), headers)


class Call:
    """A routed request.

    version: the (major, minor) that the client speaks; name: the part of the path between noun and verb, decoded.
    """

    __slots__ = ("connection", "engine", "name", "query", "request", "version")

    def __init__(
        self,
        engine: Engine,
        connection: Connection,
        request: Request,
        *,
        version: tuple[int, int],
        name: str,
        query: Query,
    ) -> None:
        self.engine = engine
        self.connection = connection
        self.request = request
        self.version = version
        self.name = name
        self.query = query

    def json_body(self) -> dict[str, Any]:
        """The body as a JSON object; an empty body is an empty object. Raises InvalidRequest."""
        raw = self.request.body.read_all(MAX_JSON_BYTES, Deadline.after(BODY_SECONDS))
        if not raw.strip():
            return {}
        try:
            value = json.loads(raw, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"the request body is not JSON: {error}") from error
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise InvalidRequest("the request body is not a JSON object")
        return value

    def stream(self, content_type: str = "application/json") -> Stream:
        """Answer 200 now; the body follows piece by piece."""
        return self.connection.stream(200, (*COMMON_HEADERS, ("Content-Type", content_type)))

    @property
    def upgrades(self) -> bool:
        """The client asked to change to a raw stream: `Connection: Upgrade` and `Upgrade: tcp`."""
        headers = self.request.headers
        return "upgrade" in connection_options(headers) and "upgrade" in headers

    def hand_over(self, give: HandOver, *, framed: bool) -> None:
        """Change to a raw stream: `give(socket, bytes sent ahead, write_head)` passes the socket on and calls `write_head`
        when nothing can be refused any more. An error before that is answered as any other.

        Clients that did not ask for an upgrade are told `raw-stream` whatever follows, as Docker tells them.
        """
        if self.upgrades:
            kind = MULTIPLEXED_STREAM if framed and self.version >= (1, 42) else RAW_STREAM
            lines = ["HTTP/1.1 101 UPGRADED", f"Content-Type: {kind}", "Connection: Upgrade", "Upgrade: tcp"]
        else:
            lines = ["HTTP/1.1 200 OK", f"Content-Type: {RAW_STREAM}"]
        head = "\r\n".join((*lines, "Api-Version: 1.44", "", "")).encode()
        connection = self.connection
        give(connection.socket, connection.pending(), lambda: connection.hijack(head))


HandOver = Callable[[socket.socket, bytes, Callable[[], None]], None]
Handler = Callable[[Call], Reply | None]


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")
