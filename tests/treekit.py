"""Requests of `tree` to a driver, and archives as values that can be compared."""

from __future__ import annotations

import io
import os
import tarfile
import threading
from typing import Any, NamedTuple

from ambi.core.deadline import Deadline
from ambi.core.errors import AmbiError
from ambi.core.loop import Loop


class Looked(NamedTuple):
    """The answer of a request and what came by its stream."""

    answer: dict[str, Any]
    stream: bytes


def look(browsable: Any, loop: Loop, verb: str, path: str = "/", *, send: bytes | None = None, **fields: Any) -> Looked:
    """Do one request to its end; raises what it answers as an error."""
    answers: list[dict[str, Any] | AmbiError] = []
    received = bytearray()
    request = {"verb": verb, "path": path, **fields}
    threads: list[threading.Thread] = []
    fd = None
    if verb == "put":
        fd, writer = os.pipe()
        threads.append(threading.Thread(target=_send, args=(writer, send or b"")))
    elif verb != "stat":
        reader, fd = os.pipe()
        threads.append(threading.Thread(target=_receive, args=(reader, received)))
    browsable.tree(request, fd, answers.append)
    for thread in threads:  # not before: a driver clones without regard for threads
        thread.start()
    assert loop.run(lambda: bool(answers), Deadline.after(60)), f"tree {request} is not answered"
    by = Deadline.after(30)
    while any(thread.is_alive() for thread in threads):  # what is still in hand is written by the loop
        assert not by.expired(), f"the stream of {request} does not end"
        loop.run(lambda: False, Deadline.after(0.01))
    if isinstance(answers[0], AmbiError):
        raise answers[0]
    return Looked(answers[0], bytes(received))


def _send(fd: int, data: bytes) -> None:
    with open(fd, "wb") as file:
        try:
            file.write(data)
        except BrokenPipeError:
            pass


def _receive(fd: int, into: bytearray) -> None:
    with open(fd, "rb") as file:
        while piece := file.read1(1 << 16):
            into += piece


def changes(stream: bytes) -> list[str]:
    """What `diff` sent, as `KIND PATH` in the order of paths."""
    records = [record.decode() for record in stream.split(b"\0") if record]
    return [f"{record[0]} {record[1:]}" for record in sorted(records, key=lambda record: record[1:])]


def entries(archive: bytes) -> list[tuple[Any, ...]]:
    """Each member as (name, type, mode, uid, gid, size, mtime in ns as text, link, device, xattrs, content)."""
    found = []
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isreg() else None
            xattrs = {k: v for k, v in member.pax_headers.items() if k.startswith("SCHILY.xattr.")}
            mtime = member.pax_headers.get("mtime", str(int(member.mtime)))
            device = (member.devmajor, member.devminor) if member.isdev() else (0, 0)
            found.append(
                (member.name, member.type, member.mode, member.uid, member.gid, member.size, mtime, member.linkname, device,
                 tuple(sorted(xattrs.items())), file.read() if file else b"")
            )  # fmt: skip
    return found


def archive(*members: tuple[str, bytes | None], **changes: Any) -> bytes:
    """An archive of files, and of directories where the content is None; `changes` are attributes of every member."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            member.mode = 0o755 if content is None else 0o644
            member.size = len(content or b"")
            for key, value in changes.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(content) if content else None)
    return target.getvalue()
