"""`/containers/{}/archive`, `changes`, `export`, and `/commit`."""

from __future__ import annotations

import base64
import stat
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import BinaryIO

from ambi.api.exchange import COMMON_HEADERS, Call, Reply, json_reply, to_json
from ambi.api.http import Stream
from ambi.api.router import Route
from ambi.core.errors import InvalidRequest
from ambi.engine.commit import Wanted
from ambi.engine.trees import PathStat
from images.layers.decoder import Decoder
from images.reference import joined

_PIECE = 1 << 18
_KINDS = {"C": 0, "A": 1, "D": 2}
_TAR = ("Content-Type", "application/x-tar")
# Go's io/fs.FileMode: the type and the three special bits are elsewhere than in st_mode.
_GO_TYPES = {
    stat.S_IFDIR: 1 << 31, stat.S_IFLNK: 1 << 27, stat.S_IFBLK: 1 << 26, stat.S_IFCHR: 1 << 26 | 1 << 21,
    stat.S_IFIFO: 1 << 25, stat.S_IFSOCK: 1 << 24, stat.S_IFREG: 0,
}  # fmt: skip
_GO_BITS = ((stat.S_ISUID, 1 << 23), (stat.S_ISGID, 1 << 22), (stat.S_ISVTX, 1 << 20))


def go_mode(mode: int) -> int:
    """st_mode as Go has it."""
    special = sum(bit for ours, bit in _GO_BITS if mode & ours)
    return _GO_TYPES.get(stat.S_IFMT(mode), 1 << 19) | special | mode & 0o777


def _stat_header(about: PathStat) -> tuple[str, str]:
    seconds, ns = divmod(about.mtime_ns, 1_000_000_000)
    shown = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    fraction = f".{ns:09d}".rstrip("0") if ns else ""
    body = {
        "name": about.name,
        "size": about.size,
        "mode": go_mode(about.mode),
        "mtime": f"{shown}{fraction}Z",
        "linkTarget": about.link,
    }
    return "X-Docker-Container-Path-Stat", base64.b64encode(to_json(body).strip()).decode()


def _path(call: Call) -> str:
    path = call.query.text("path")
    if not path:
        raise InvalidRequest("bad parameter: 'path' cannot be empty")
    if "\0" in path:
        raise InvalidRequest("bad parameter: 'path' has a NUL in it")
    return path


def get_archive(call: Call) -> Reply | None:
    """GET and HEAD."""
    if call.request.method == "HEAD":
        about = call.engine.path_stat(call.name, _path(call))
        return Reply(200, b"", (*COMMON_HEADERS, _stat_header(about)))
    with call.engine.archive(call.name, _path(call)) as (about, stream):
        answer = call.connection.stream(200, (*COMMON_HEADERS, _TAR, _stat_header(about)))
        _send(answer, stream)
    answer.end()
    return None


def _send(answer: Stream, stream: BinaryIO) -> None:
    """All of `stream`. Whoever calls ends the answer once it is known that the stream did not break off."""
    while piece := stream.read1(_PIECE):  # type: ignore[attr-defined]
        answer.write(piece)


def put_archive(call: Call) -> Reply:
    query = call.query
    body = call.request.body

    def chunks() -> Iterator[bytes]:
        while piece := body.read(_PIECE):
            yield piece

    call.engine.unpack(
        call.name,
        _path(call),
        Decoder(chunks()),
        no_overwrite=query.flag("noOverwriteDirNonDir"),
        copy_ids=query.flag("copyUIDGID"),
    )
    return Reply(200)


def changes(call: Call) -> Reply:
    found = call.engine.changes(call.name)
    return json_reply([{"Path": change.path, "Kind": _KINDS[change.kind]} for change in found] or None)


def export(call: Call) -> None:
    with call.engine.export(call.name) as stream:
        answer = call.stream("application/octet-stream")
        _send(answer, stream)
    answer.end()


def commit(call: Call) -> Reply:
    query = call.query
    name = query.text("container")
    if not name:
        raise InvalidRequest("the container to commit is not named", hint="POST /commit?container=NAME")
    wanted = Wanted(
        name=joined(query.text("repo"), query.text("tag")) or "",
        config=call.json_body(),
        changes=query.all("changes"),
        author=query.text("author"),
        message=query.text("comment"),
    )
    image = call.engine.commit(name, wanted, pause=query.flag("pause", True))
    return json_reply({"Id": image}, 201)


ROUTES = (
    Route("GET", "/containers/{}/archive", get_archive),  # HEAD too
    Route("PUT", "/containers/{}/archive", put_archive),
    Route("GET", "/containers/{}/changes", changes),
    Route("GET", "/containers/{}/export", export),
    Route("POST", "/commit", commit),
)
