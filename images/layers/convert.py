"""One layer through parser, tree and sink."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

from ambi.core.errors import StorageFull
from images.layers.decoder import Decoder
from images.layers.tar import TarReader
from images.layers.tree import Body, LayerTree, Node


class Sink(Protocol):
    """Takes the bodies of files as they come, and the whole tree in the end. See `erofs.ErofsWriter`."""

    def begin(self, size: int, *, sparse: bool) -> None: ...
    def write(self, piece: memoryview) -> None: ...
    def skip(self, size: int) -> None: ...
    def end(self) -> Body: ...
    def flush(self) -> None: ...
    def finish(self, root: Node, uuid: bytes) -> int: ...


class Converted(NamedTuple):
    """diff_id: of the plain archive. content_bytes: of all files. size_bytes: of what the sink has written."""

    diff_id: str
    tar_bytes: int
    content_bytes: int
    entries: int
    size_bytes: int
    compression: str


Reading = Callable[[Iterable[bytes]], Iterator[bytes]]


def convert(chunks: Iterable[bytes], sink: Sink, limit_bytes: int, reading: Reading = iter) -> Converted:
    """Read one archive, compressed or not, into `sink`; `limit_bytes` bounds the data of its files.

    reading: how the plain bytes are come by: `iter`, or `Ahead.run` for decompressing and hashing in another thread.

    Raises Corrupt, StorageFull, Unsupported, OSError.
    """
    decoder = Decoder(chunks)
    digest = hashlib.sha256()

    def hashed() -> Iterator[bytes]:
        for chunk in decoder:
            digest.update(chunk)
            yield chunk

    def written() -> Iterator[bytes]:
        for chunk in reading(hashed()):
            sink.flush()
            yield chunk

    reader, tree = TarReader(written()), LayerTree()
    content = 0
    for entry in reader:
        node = tree.add(entry)
        if node is None:
            continue
        content += entry.size if entry.extents is None else sum(length for _, length in entry.extents)
        if content > limit_bytes:
            raise StorageFull(
                f"layer needs more than the {limit_bytes >> 20} MiB that are free",
                hint="free space: `ambi image rm` removes images",
            )
        if entry.extents is None:
            sink.begin(entry.size, sparse=False)
            if (body := reader.whole()) is not None:
                if body:
                    sink.write(body)
            else:
                for piece in reader.pieces():
                    sink.write(piece)
        else:
            sink.begin(entry.size, sparse=True)
            _sparse(reader, entry.extents, entry.size, sink)
        node.body = sink.end()
    reader.drain()
    sink.flush()
    size = sink.finish(tree.finish(), digest.digest()[:16])
    diff_id = f"sha256:{digest.hexdigest()}"
    return Converted(diff_id, decoder.produced, content, tree.count, size, decoder.compression)


def _sparse(reader: TarReader, extents: tuple[tuple[int, int], ...], size: int, sink: Sink) -> None:
    """Spread the stored bytes over `extents`, with holes between them."""
    position = 0
    pieces = reader.pieces()
    piece = memoryview(b"")
    for offset, length in extents:
        sink.skip(offset - position)
        position = offset + length
        left = length
        while left:
            if not piece:
                piece = next(pieces)
            part = piece[:left]
            sink.write(part)
            piece, left = piece[len(part) :], left - len(part)
    for _ in pieces:
        pass
    sink.skip(size - position)
