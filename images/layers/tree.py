"""What a layer's archive means: one tree of nodes, whatever the order, duplicates and links of its entries.

Rules, in Docker's sense where it has one:

- a leading `/` and `.` count for nothing, `..` is refused;
- of two entries with one name the last wins; a directory over a directory keeps what is in it; anything else replaces;
- missing parents are made, 0755 and root's. A parent that is a symbolic link of the same layer is followed below the root
  of the layer; one of a lower layer is not seen, and a real directory hides it, as with Docker's overlay2;
- a hard link's target is an earlier entry of the same layer and no directory;
- `.wh.NAME` hides NAME of lower layers and nothing of its own, wherever it stands; together with a directory NAME it makes
  that opaque. `.wh..wh..opq` makes its directory opaque. Other `.wh..wh.` names are leftovers of AUFS and are skipped.
"""

from __future__ import annotations

from ambi.core.errors import Corrupt
from images.layers.limits import MAX_DEPTH, MAX_ENTRIES, MAX_LINKS, MAX_NAME, MAX_PATH
from images.layers.tar import Entry

_WHITEOUT, _META, _OPAQUE = b".wh.", b".wh..wh.", b".wh..wh..opq"
_DOT = 0x2E
OPAQUE_XATTR = (b"trusted.overlay.opaque", b"y")

_NO_XATTRS: dict[bytes, bytes] = {}

Body = int | bytes | None  # of a file: where the sink has put it, itself when small, None when empty


class Node:
    """An inode. `children`: of a directory, by name. `body`, `size`: of a file."""

    __slots__ = (
        "body", "children", "depth", "device", "gid", "kind", "link", "mode", "mtime_ns", "opaque", "size", "uid",
        "whiteouts", "xattrs",
    )  # fmt: skip

    def __init__(self, kind: str, mode: int, depth: int) -> None:
        self.kind = kind
        self.mode = mode
        self.depth = depth
        self.uid = 0
        self.gid = 0
        self.mtime_ns = 0
        self.xattrs = _NO_XATTRS
        self.size = 0
        self.body: Body = None
        self.link = b""
        self.device = (0, 0)
        self.children: dict[bytes, Node] | None = {} if kind == "d" else None
        self.whiteouts: set[bytes] | None = None
        self.opaque = False

    @property
    def entries(self) -> dict[bytes, Node]:
        """The children of a directory."""
        assert self.children is not None
        return self.children


def whiteout() -> Node:
    """What overlayfs takes for a deleted name: the character device 0:0."""
    return Node("c", 0, 0)


class LayerTree:
    """The tree so far. `content_bytes` is the sum of all files' stored data."""

    def __init__(self) -> None:
        self.root = Node("d", 0o755, 0)
        self.count = 1
        self._parents: dict[bytes, Node] = {b"": self.root}  # by path, as written or cleaned; forgotten when one goes

    def add(self, entry: Entry) -> Node | None:
        """Put `entry` in its place. A file's node is returned so that its body can be set; None has no body."""
        folder, _, name = entry.path.rpartition(b"/")
        known = self._parents.get(folder)
        if known is not None and name and name[0] != _DOT and len(name) <= MAX_NAME and len(entry.path) <= MAX_PATH:
            return self._add(entry, known, name)  # almost every one
        parts = self._parts(entry.path)
        if _META in entry.path and any(part.startswith(_META) for part in parts):
            self._meta(parts)
            return None
        if not parts:
            if entry.kind != "d":
                raise Corrupt(f"tar entry {entry.path!r} replaces the root by something that is no directory")
            self._attributes(self.root, entry)
            return None
        name = parts.pop()
        parent = self._parent(parts, entry.path)
        if name.startswith(_WHITEOUT):
            self._whiteout(parent, name[len(_WHITEOUT) :], entry.path)
            return None
        if entry.path.endswith(name):
            self._parents[folder] = parent
        return self._add(entry, parent, name)

    def _add(self, entry: Entry, parent: Node, name: bytes) -> Node | None:
        if entry.kind == "h":
            self._put(parent, name, self._target(entry))
            return None
        old = parent.entries.get(name)
        if entry.kind == "d" and old is not None and old.kind == "d":
            self._attributes(old, entry)
            return None
        node = self._new(entry.kind, parent)
        self._attributes(node, entry)
        self._put(parent, name, node)
        return node if entry.kind == "f" else None

    def finish(self) -> Node:
        """The root of the tree, with whiteouts as nodes and opaque directories marked."""
        stack = [self.root]
        while stack:
            node = stack.pop()
            for name in node.whiteouts or ():
                child = node.entries.get(name)
                if child is None:
                    node.entries[name] = whiteout()
                elif child.kind == "d":
                    child.opaque = True
            stack.extend(child for child in node.entries.values() if child.kind == "d")
            if node.opaque:
                node.xattrs = {**node.xattrs, OPAQUE_XATTR[0]: OPAQUE_XATTR[1]}
        return self.root

    def _parts(self, path: bytes) -> list[bytes]:
        if len(path) > MAX_PATH:
            raise Corrupt(f"tar entry {path[:60]!r}... has a name of {len(path)} bytes, more than {MAX_PATH}")
        parts = [part for part in path.split(b"/") if part and part != b"."]
        if not path:
            raise Corrupt("tar entry has no name")
        if len(path) <= MAX_NAME and b".." not in path:  # almost every one
            return parts
        for part in parts:
            if part == b"..":
                raise Corrupt(f"tar entry {path!r} points out of the layer with `..`")
            if len(part) > MAX_NAME:
                raise Corrupt(f"tar entry {part[:60]!r}... has a name of {len(part)} bytes, more than {MAX_NAME}")
        return parts

    def _new(self, kind: str, parent: Node, mode: int = 0o755) -> Node:
        self.count += 1
        if self.count > MAX_ENTRIES:
            raise Corrupt(f"layer has more than {MAX_ENTRIES} entries")
        if parent.depth >= MAX_DEPTH:
            raise Corrupt(f"layer has directories more than {MAX_DEPTH} deep")
        return Node(kind, mode, parent.depth + 1)

    def _attributes(self, node: Node, entry: Entry) -> None:
        node.mode, node.uid, node.gid, node.mtime_ns = entry.mode, entry.uid, entry.gid, entry.mtime_ns
        node.xattrs, node.size, node.device = entry.xattrs, entry.size, entry.device
        if entry.kind in "cb":
            major, minor = entry.device
            if not (0 <= major < 1 << 12 and 0 <= minor < 1 << 20):
                raise Corrupt(f"tar entry {entry.path!r} has an impossible device number {major}:{minor}")
        if entry.kind == "l":
            if not 0 < len(entry.link) <= MAX_PATH:
                raise Corrupt(f"symbolic link {entry.path!r} has a target of {len(entry.link)} bytes")
            node.link = entry.link
            node.mode = 0o777

    def _put(self, parent: Node, name: bytes, node: Node) -> None:
        old = parent.entries.get(name)
        parent.entries[name] = node
        if old is not None and old.kind in "dl":  # paths through it mean something else now
            self._parents = {b"": self.root}

    def _parent(self, parts: list[bytes], path: bytes) -> Node:
        key = b"/".join(parts)
        node = self._parents.get(key)
        if node is None:
            found = self._walk(parts, path, create=True)
            assert found is not None
            node = self._parents[key] = found
        return node

    def _walk(self, parts: list[bytes], path: bytes, *, create: bool) -> Node | None:
        """The directory at `parts`, symbolic links followed with the layer's root as `/`; missing ones made or None."""
        stack, todo, links = [self.root], parts[::-1], 0
        while todo:
            part = todo.pop()
            if part == b"..":
                if len(stack) > 1:
                    stack.pop()
                continue
            node = stack[-1].entries.get(part)
            if node is None:
                if not create:
                    return None
                if part.startswith(_WHITEOUT):
                    raise Corrupt(f"tar entry {path!r} lies below the whiteout {part!r}")
                node = stack[-1].entries[part] = self._new("d", stack[-1])
            if node.kind == "l":
                links += 1
                if links > MAX_LINKS:
                    raise Corrupt(f"tar entry {path!r} has more than {MAX_LINKS} symbolic links in its path")
                if node.link.startswith(b"/"):
                    del stack[1:]
                todo.extend(x for x in node.link.split(b"/")[::-1] if x and x != b".")
            elif node.kind != "d":
                raise Corrupt(f"tar entry {path!r} lies below {part!r}, which is no directory")
            else:
                stack.append(node)
        return stack[-1]

    def _target(self, entry: Entry) -> Node:
        parts = self._parts(entry.link)
        parent = self._walk(parts[:-1], entry.path, create=False) if parts else None
        node = parent.entries.get(parts[-1]) if parent is not None else None
        if node is None:
            raise Corrupt(f"hard link {entry.path!r} points to {entry.link!r}, which is not an earlier entry of the layer")
        if node.kind == "d":
            raise Corrupt(f"hard link {entry.path!r} points to {entry.link!r}, which is a directory")
        return node

    def _whiteout(self, parent: Node, name: bytes, path: bytes) -> None:
        if name in (b"", b".", b".."):
            raise Corrupt(f"tar entry {path!r} is a whiteout of an impossible name")
        self.count += 1
        if self.count > MAX_ENTRIES:
            raise Corrupt(f"layer has more than {MAX_ENTRIES} entries")
        if parent.whiteouts is None:
            parent.whiteouts = set()
        parent.whiteouts.add(name)

    def _meta(self, parts: list[bytes]) -> None:
        """`.wh..wh..opq` counts, other names of AUFS's own and what is below them do not."""
        if parts[-1] == _OPAQUE:
            self._parent(parts[:-1], b"/".join(parts)).opaque = True
