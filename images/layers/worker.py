"""The unprivileged worker: `python -I -m images.layers.worker FD`, a SEQPACKET socket to the engine.

Requests, each with two descriptors (source to read, target to write), one after another:

    {"do": "erofs", "limit": bytes}     -> {"ok": Converted}       target: an empty file
    {"do": "tree", "limit": bytes}      -> {"ok": Converted}       target: a pipe to `apply.apply`, operations as frames
    {"do": "split"}                     -> {"ok": {}}              target: a pipe; members of an archive as frames

or `{"error": an error of the tree}`, after which the worker ends. A frame is four bytes of length, so much JSON, and as many
bytes as the JSON's `data` says. Names travel as latin-1 text, which keeps any bytes.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from typing import Any

from ambi.core.errors import AmbiError, Corrupt, Internal, Unsupported, from_os_error
from ambi.linux import unix
from images.layers import decoder, jail
from images.layers.convert import convert
from images.layers.erofs import ErofsWriter
from images.layers.frames import FrameWriter
from images.layers.operations import OperationsSink
from images.layers.tar import TarReader

READ_BYTES = 256 << 10


def main() -> None:
    sock = socket.socket(fileno=int(sys.argv[1]))
    decoder.preload()
    jail.enter(sock.fileno())
    unix.send(sock, {"ready": True})
    while (message := unix.receive(sock)) is not None:
        answer = _answer(message)
        message.close()
        try:
            unix.send(sock, answer)
        except OSError:  # the engine is gone
            break
        if "error" in answer:
            break


def _answer(message: unix.Message) -> dict[str, Any]:
    try:
        return {"ok": _do(message.body, *message.fds)}
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


def _do(job: dict[str, Any], source: int, target: int) -> dict[str, Any]:
    kind = job["do"]
    if kind == "split":
        _split(source, FrameWriter(target))
        return {}
    sink = ErofsWriter(target) if kind == "erofs" else OperationsSink(FrameWriter(target))
    return convert(_chunks(source), sink, job["limit"])._asdict()


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


if __name__ == "__main__":
    main()
