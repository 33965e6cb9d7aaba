"""A layer as one EROFS file, written in one pass over the archive.

Layout, in blocks of 4 KiB: the superblock's; bodies of files larger than 2 KiB as they come; full blocks of directories and
long symbolic links; metadata. Inodes are extended ones (an mtime and 32-bit ids of their own). Bodies up to 2 KiB, short
links and the last piece of a directory lie behind their inode; larger files stay whole blocks, which a guest can map
directly. Metadata comes last because `meta_blkaddr` may point anywhere, so nothing is seeked but the superblock.
Holes of sparse files are holes of the layer file. The file ends with a hole up to 2 MiB, the alignment of a guest's huge
pages.

Sources: fs/erofs/erofs_fs.h and Documentation/filesystems/erofs.rst of Linux 6.1.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

from ambi.core.errors import Corrupt, Unsupported
from images.layers.limits import INLINE_BUDGET, MAX_APPARENT
from images.layers.tree import Body, Node

BLOCK = 4096
ALIGN = 2 << 20
INLINE = 2048  # bodies up to here are kept behind their inode

_ZEROS = bytes(BLOCK)
_SLOT = 32
_INODE = struct.Struct("<HHHHQIIIIqII16x")  # struct erofs_inode_extended
_DIRENT = struct.Struct("<QHBx")  # struct erofs_dirent
_SUPER = struct.Struct("<IIIBBHQQIIII16s16sI44x")  # struct erofs_super_block
_MAGIC = 0xE0F5E1E2
_COMPAT = 3  # check sum, mtime
_PLAIN, _TAIL = 1, 5  # i_format: extended, FLAT_PLAIN or FLAT_INLINE
_FORMAT_BITS = {"f": 0o100000, "d": 0o040000, "l": 0o120000, "c": 0o020000, "b": 0o060000, "p": 0o010000}
_FILE_TYPES = {"f": 1, "d": 2, "c": 3, "b": 4, "p": 5, "l": 7}
_XATTR_PREFIXES = (
    (b"user.", 1), (b"system.posix_acl_access", 2), (b"system.posix_acl_default", 3), (b"trusted.", 4), (b"security.", 6),
)  # fmt: skip
_IOV_MAX = 1024


class ErofsWriter:
    """The sink of one layer: `begin`, `write` and `skip` for each body, `end`, and once `finish`.

    fd: an empty file, open for writing; it stays the caller's. Raises OSError of the writes.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._queue: list[bytes | memoryview] = [_ZEROS]
        self._block = 1
        self._size = 0
        self._done = 0
        self._small: list[memoryview] | None = None
        self._inline_left = INLINE_BUDGET

    def begin(self, size: int, *, sparse: bool) -> None:
        """A body of `size` bytes follows."""
        if (self._block * BLOCK) + size > MAX_APPARENT:
            raise Corrupt(f"layer has more than {MAX_APPARENT >> 30} GiB of files")
        self._size, self._done = size, 0
        if size <= INLINE and not sparse and size <= self._inline_left:
            self._small = []
            self._inline_left -= size
        else:
            self._small = None

    def write(self, piece: memoryview) -> None:
        self._done += len(piece)
        if self._small is not None:
            self._small.append(piece)
        else:
            self._queue.append(piece)
            if len(self._queue) >= _IOV_MAX - 1:
                self.flush()

    def skip(self, size: int) -> None:
        """A hole of `size` bytes."""
        if size:
            self.flush()
            os.lseek(self._fd, size, os.SEEK_CUR)
            self._done += size

    def end(self) -> Body:
        assert self._done == self._size
        if self._small is not None:
            return b"".join(self._small) or None
        start = self._block
        self._block += -(-self._size // BLOCK)
        self._queue.append(_ZEROS[: -self._size % BLOCK])
        return start if self._size else None

    def flush(self) -> None:
        """Write what is queued. Slices keep their chunk alive, so this is called once a chunk."""
        queue = self._queue
        while queue:
            part = queue[:_IOV_MAX]
            written = os.writev(self._fd, part)
            while part and written >= len(part[0]):
                written -= len(part.pop(0))
            if written:
                part[0] = memoryview(part[0])[written:]
            queue[: min(len(queue), _IOV_MAX)] = part
        self._queue = []

    def finish(self, root: Node, uuid: bytes) -> int:
        """Write directories, metadata and superblock; the size of the file. `uuid`: 16 bytes that name the content."""
        self.flush()
        layout = _Layout(root, self._block)
        for piece in layout.blocks():
            self._queue.append(piece)
            if len(self._queue) >= 256:
                self.flush()
        meta_block = layout.next_block
        for piece in layout.metadata():
            self._queue.append(piece)
            if len(self._queue) >= 256:
                self.flush()
        self.flush()
        blocks = meta_block + -(-layout.metadata_bytes // BLOCK)
        size = -(-blocks * BLOCK // ALIGN) * ALIGN
        os.ftruncate(self._fd, size)
        _write_at(self._fd, _superblock(layout, meta_block, blocks, uuid), 1024)
        return size


def _write_at(fd: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


class _Inode:
    """What the layout knows of a node. block: of its data or of a directory's full blocks; tail: what lies behind it."""

    __slots__ = (
        "block",
        "format",
        "links",
        "names",
        "nid",
        "node",
        "number",
        "parent",
        "position",
        "size",
        "tail",
        "xattrs",
    )

    def __init__(self, node: Node, parent: _Inode | None, number: int) -> None:
        self.node = node
        self.parent = parent or self
        self.number = number
        self.links = 0
        self.format = _PLAIN
        self.position = 0
        self.nid = 0
        self.size = node.size
        self.block = 0
        self.tail: bytes | int = b""  # of a directory: its length only, until all nids are known
        self.names: list[tuple[bytes, _Inode]] = []
        self.xattrs = _xattr_body(node.xattrs) if node.xattrs else b""


class _Layout:
    """Places every inode, then gives out the bytes. Inodes lie in the order of a walk, a directory's children together."""

    def __init__(self, root: Node, first_block: int) -> None:
        self.next_block = first_block
        self.inodes = self._collect(root)
        self.mtime_ns = root.mtime_ns
        position = _SLOT  # nid 0 is never used
        for inode in self.inodes:
            position = self._place(inode, position)
        self.metadata_bytes = position
        self.root = self.inodes[0]

    def _collect(self, root: Node) -> list[_Inode]:
        top = _Inode(root, None, 1)
        found, by_node, queue = [top], {id(root): top}, [top]
        top.links = 2
        while queue:
            directory = queue.pop()
            names = [(b".", directory), (b"..", directory.parent)]
            for name, child in directory.node.entries.items():
                inode = by_node.get(id(child))
                if inode is None:
                    inode = by_node[id(child)] = _Inode(child, directory, len(found) + 1)
                    found.append(inode)
                if child.kind == "d":
                    inode.links = 2
                    directory.links += 1
                    queue.append(inode)
                else:
                    inode.links += 1
                names.append((name, inode))
            names.sort(key=_first)
            directory.names = names
        return found

    def _place(self, inode: _Inode, position: int) -> int:
        """Decide the format, the blocks and the position of one inode; the end of what it takes."""
        node, head = inode.node, _INODE.size + len(inode.xattrs)
        tail = 0
        if node.kind == "f":
            if isinstance(node.body, bytes):
                inode.tail, tail = node.body, len(node.body)
            elif node.body is not None:
                inode.block = node.body
        elif node.kind == "l":
            inode.size = tail = len(node.link)
            inode.tail = node.link
        elif node.kind == "d":
            inode.size = _directory_size(inode.names)
            inode.tail = tail = inode.size % BLOCK
            inode.block = self.next_block
            self.next_block += inode.size // BLOCK
        position = -(-position // _SLOT) * _SLOT
        start = position + head
        if tail and start // BLOCK != (start + tail - 1) // BLOCK:
            position = -(-position // BLOCK) * BLOCK  # the tail must not cross a block
            start = position + head
            if start // BLOCK != (start + tail - 1) // BLOCK:
                return self._place_without_tail(inode, position, head)
        inode.format = _TAIL if tail else _PLAIN
        inode.position, inode.nid = position, position // _SLOT
        return start + tail

    def _place_without_tail(self, inode: _Inode, position: int, head: int) -> int:
        """What does not fit behind its inode gets a block of its own."""
        if inode.node.kind == "d":
            self.next_block += 1
        else:
            inode.block = self.next_block
            self.next_block += 1
        inode.format = _PLAIN
        inode.position, inode.nid = position, position // _SLOT
        return position + head

    def blocks(self) -> Iterator[bytes]:
        """Full blocks, in the order in which `_place` counted them."""
        for inode in self.inodes:
            if inode.node.kind == "d":
                content = _directory_blocks(inode.names)
                if inode.format == _TAIL:
                    inode.tail = content.pop()
                for block in content:
                    yield block.ljust(BLOCK, b"\0")
            elif inode.tail and inode.format == _PLAIN:
                assert isinstance(inode.tail, bytes)
                yield inode.tail.ljust(BLOCK, b"\0")

    def metadata(self) -> Iterator[bytes]:
        """Inodes with their attributes and tails; whole blocks in the end."""
        end = 0
        for inode in self.inodes:
            if inode.position > end:
                yield bytes(inode.position - end)
            packed = _pack(inode)
            end = inode.position + len(packed)
            yield packed
        yield bytes(-end % BLOCK)


def _first(pair: tuple[bytes, _Inode]) -> bytes:
    return pair[0]


def _pack(inode: _Inode) -> bytes:
    node = inode.node
    seconds, nanoseconds = divmod(node.mtime_ns, 1_000_000_000)
    where = inode.block
    if node.kind in "cb":
        major, minor = node.device
        where = (minor & 0xFF) | major << 8 | (minor & ~0xFF) << 12  # new_encode_dev, linux/kdev_t.h
    count = (len(inode.xattrs) - 12) // 4 + 1 if inode.xattrs else 0
    head = _INODE.pack(
        inode.format, count, _FORMAT_BITS[node.kind] | node.mode, 0, inode.size, where, inode.number,
        node.uid, node.gid, seconds, nanoseconds, inode.links,
    )  # fmt: skip
    if inode.format == _TAIL:
        assert isinstance(inode.tail, bytes)
        return head + inode.xattrs + inode.tail
    return head + inode.xattrs


def _xattr_body(xattrs: dict[bytes, bytes]) -> bytes:
    """struct erofs_xattr_ibody_header and its entries; names with a prefix that EROFS has no number for are left out."""
    parts = []
    for name, value in sorted(xattrs.items()):
        for prefix, index in _XATTR_PREFIXES:
            if name.startswith(prefix):
                suffix = name[len(prefix) :]
                entry = struct.pack("<BBH", len(suffix), index, len(value)) + suffix + value
                parts.append(entry + bytes(-len(entry) % 4))
                break
    return bytes(12) + b"".join(parts) if parts else b""


def _directory_size(names: list[tuple[bytes, _Inode]]) -> int:
    full, used = 0, 0
    for name, _ in names:
        if used + _DIRENT.size + len(name) > BLOCK:
            full, used = full + 1, 0
        used += _DIRENT.size + len(name)
    return full * BLOCK + used


def _directory_blocks(names: list[tuple[bytes, _Inode]]) -> list[bytes]:
    """The content of a directory in blocks that each stand alone; the last is not padded."""
    blocks, start, used = [], 0, 0
    for index, (name, _) in enumerate(names):
        if used + _DIRENT.size + len(name) > BLOCK:
            blocks.append(_directory_block(names[start:index]))
            start, used = index, 0
        used += _DIRENT.size + len(name)
    blocks.append(_directory_block(names[start:]))
    return blocks


def _directory_block(names: list[tuple[bytes, _Inode]]) -> bytes:
    offset = _DIRENT.size * len(names)
    heads = []
    for name, inode in names:
        heads.append(_DIRENT.pack(inode.nid, offset, _FILE_TYPES[inode.node.kind]))
        offset += len(name)
    return b"".join(heads) + b"".join(name for name, _ in names)


def _superblock(layout: _Layout, meta_block: int, blocks: int, uuid: bytes) -> bytes:
    """The rest of the first block, from byte 1024 on."""
    if blocks >= 1 << 32:
        raise Unsupported(f"layer of {blocks} blocks is too large for EROFS")
    seconds, nanoseconds = divmod(max(layout.mtime_ns, 0), 1_000_000_000)

    def pack(checksum: int) -> bytes:
        fields = _SUPER.pack(
            _MAGIC, checksum, _COMPAT, 12, 0, layout.root.nid, len(layout.inodes), seconds, nanoseconds, blocks,
            meta_block, 0, uuid, b"", 0,
        )  # fmt: skip
        return fields.ljust(BLOCK - 1024, b"\0")

    return pack(_crc32c(pack(0)))


def _crc32c(data: bytes) -> int:
    """CRC-32C without the final inversion, as EROFS wants it."""
    table = []
    for index in range(256):
        value = index
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
    return crc
