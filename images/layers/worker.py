"""The unprivileged worker: forked by the nursery, with one descriptor, a SEQPACKET socket to the engine.

Requests, each with two descriptors (source to read, target to write), one after another:

    {"do": "erofs", "limit": bytes}     -> {"ok": Converted}       target: an empty file
    {"do": "tree", "limit": bytes}      -> {"ok": Converted}       target: a pipe to `apply.apply`, operations as frames
    {"do": "split"}                     -> {"ok": {}}              target: a pipe; members of an archive as frames
    {"do": "pick", "pattern", "limit"}  -> {"ok": {}}              target: a pipe; of a layer the small files whose path
                                                                  matches, and what hides files of lower layers
    {"do": "rpm", "limit": bytes}       -> {"ok": {}}              of a database of rpm's a frame for each package;
                                                                  only by a worker that loaded `images.sbom.rpm`

or `{"error": an error of the tree}`, after which the worker ends. A frame is four bytes of length, so much JSON, and as many
bytes as the JSON's `data` says. Names travel as latin-1 text, which keeps any bytes.
"""

from __future__ import annotations

import gc
import importlib
import os
import re
import socket
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

from ambi.core.errors import AmbiError, Corrupt, Internal, Unsupported, from_os_error
from ambi.linux import unix
from images.layers import decoder, jail
from images.layers.ahead import Ahead
from images.layers.convert import convert
from images.layers.erofs import ErofsWriter
from images.layers.frames import FrameWriter
from images.layers.operations import OperationsSink
from images.layers.tar import Entry, TarReader

READ_BYTES = 256 << 10


def serve(fd: int, *, ahead: bool, load: str) -> NoReturn:
    """Jail this process, a child of the nursery, and do what is asked of it at `fd`. ahead: see `ahead`; load: a module."""
    status = 1
    gc.disable()  # to look for cycles takes a tenth of the time, while nothing but the tree grows; see _serve
    try:
        if load:
            importlib.import_module(load)
        thread = Ahead() if ahead else None
        sock = socket.socket(fileno=fd)
        jail.enter(fd, thread.start if thread else None)
        _serve(sock, thread)
        status = 0
    except (BrokenPipeError, ConnectionResetError):  # the engine wants no worker any more
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _serve(sock: socket.socket, thread: Ahead | None) -> None:
    unix.send(sock, {"ready": True})
    while (message := unix.receive(sock)) is not None:
        answer = _answer(message, thread)
        message.close()
        try:
            unix.send(sock, answer)
        except OSError:  # the engine is gone
            break
        if "error" in answer:
            break
        gc.collect()  # the root of a layer's inodes is its own parent


def _answer(message: unix.Message, thread: Ahead | None) -> dict[str, Any]:
    try:
        return {"ok": _do(message.body, message.fds, thread)}
    except AmbiError as error:
        found = error
    except MemoryError:
        found = Unsupported("archive needs more memory than a worker may have")
    except BrokenPipeError:
        found = Internal("the receiver of the worker's output has gone")
    except OSError as error:
        found = from_os_error("cannot write the layer", error)
    except RecursionError:
        found = Corrupt("archive is nested too deeply")
    except Exception as error:
        found = Internal(f"the image worker failed: {type(error).__name__}: {error}")
    return {"error": found.to_wire()}


def _do(job: dict[str, Any], fds: list[int], thread: Ahead | None) -> dict[str, Any]:
    source, target = fds
    kind = job["do"]
    if kind == "split":
        _split(source, FrameWriter(target))
        return {}
    if kind == "pick":
        _pick(source, FrameWriter(target), re.compile(job["pattern"].encode()), job["limit"])
        return {}
    if kind == "rpm":
        _rpm(source, FrameWriter(target), job["limit"])
        return {}
    sink = ErofsWriter(target) if kind == "erofs" else OperationsSink(FrameWriter(target))
    return convert(_chunks(source), sink, job["limit"], thread.run if thread else iter)._asdict()


def _chunks(fd: int) -> Iterator[bytes]:
    while chunk := os.read(fd, READ_BYTES):
        yield chunk


def _split(source: int, out: FrameWriter) -> None:
    """Each regular file, link and directory of an archive, in its order; the first frame tells the compression."""
    plain = decoder.Decoder(_chunks(source))
    reader = TarReader(iter(plain))
    for entry in reader:
        name, link = entry.path.decode("latin-1"), entry.link.decode("latin-1")
        if entry.extents is not None:
            raise Corrupt(f"archive has the sparse file {name}")
        out.frame({"name": name, "kind": entry.kind, "link": link, "data": entry.size})
        for piece in reader.pieces():
            out.data(piece)
    reader.drain()
    out.frame({"end": True, "data": 0})


def _pick(source: int, out: FrameWriter, pattern: re.Pattern[bytes], limit: int) -> None:
    """Frames of three kinds: `f`, a file with its bytes; `hidden`, a path that the layer takes away or that is no
    directory in it; `opaque`, a directory that shows nothing of lower layers."""
    reader = TarReader(iter(decoder.Decoder(_chunks(source))))
    for entry in reader:
        folder, _, base = entry.path.rpartition(b"/")
        name, kind = entry.path, "hidden"
        if base == b".wh..wh..opq":
            name, kind = folder, "opaque"
        elif base.startswith(b".wh."):
            name = (folder + b"/" if folder else b"") + base[4:]
        elif entry.kind == "f" and pattern.fullmatch(entry.path.removeprefix(b"./").lstrip(b"/")):
            _picked(entry, reader, out, limit)
            continue
        elif entry.kind != "l":
            continue
        out.frame({"name": name.decode("latin-1"), "kind": kind, "data": 0})
    reader.drain()
    out.frame({"end": True, "data": 0})


def _rpm(source: int, out: FrameWriter, limit: int) -> None:
    from images.sbom import rpm

    database = bytearray()
    for chunk in _chunks(source):
        database += chunk
        if len(database) > limit:
            raise Unsupported(f"the database of rpm has more than {limit >> 20} MiB")
    for fields in rpm.packages(database):
        out.frame({**fields, "data": 0})
    out.frame({"end": True, "data": 0})


def _picked(entry: Entry, reader: TarReader, out: FrameWriter, limit: int) -> None:
    name = entry.path.decode("latin-1")
    if entry.size > limit or entry.extents is not None:
        raise Unsupported(f"{name} has {entry.size} bytes or is sparse: it is no package database")
    out.frame({"name": name, "kind": "f", "data": entry.size})
    for piece in reader.pieces():
        out.data(piece)
