"""A layer as operations for `apply`: first every body, then the finished tree, parents before what is in them.

    {"op": "body", "data": 0}  {"op": "bytes", "data": n} + n bytes  {"op": "hole", "size": n}  {"op": "close", "size": n}
    {"op": "directory", "name", attributes} ... {"op": "up"}
    {"op": "file", "name", "body": number or null, "shared": number or null, attributes}
    {"op": "symlink", "name", "link", ...}  {"op": "node", "name", "kind", "device", ...}
    {"op": "again", "name", "shared"}       another name of what was marked with that number
    {"op": "end"}                           always last

attributes: mode, uid, gid, mtime_ns, xattrs (name to value in latin-1). Every frame has `data`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from images.layers.frames import FrameWriter
from images.layers.tree import Body, Node


class OperationsSink:
    """See `convert.Sink`. A body is the number of the `body` operation, from 0."""

    def __init__(self, out: FrameWriter) -> None:
        self._out = out
        self._bodies = 0

    def _send(self, op: str, **fields: Any) -> None:
        self._out.frame({"op": op, "data": 0, **fields})

    def begin(self, size: int, *, sparse: bool) -> None:
        self._size = size
        if size:
            self._send("body")

    def write(self, piece: memoryview) -> None:
        self._out.frame({"op": "bytes", "data": len(piece)})
        self._out.data(piece)

    def skip(self, size: int) -> None:
        if size:
            self._send("hole", size=size)

    def end(self) -> Body:
        if not self._size:
            return None
        self._send("close", size=self._size)
        self._bodies += 1
        return self._bodies - 1

    def flush(self) -> None:
        """Nothing is held back."""

    def finish(self, root: Node, uuid: bytes) -> int:
        links = _links(root)
        shared: dict[int, int] = {}
        self._send("directory", name="", **_attributes(root))
        stack: list[Iterator[tuple[bytes, Node]]] = [iter(sorted(root.entries.items()))]
        while stack:
            step = next(stack[-1], None)
            if step is None:
                stack.pop()
                self._send("up")
                continue
            name, node = step[0].decode("latin-1"), step[1]
            if node.kind == "d":
                self._send("directory", name=name, **_attributes(node))
                stack.append(iter(sorted(node.entries.items())))
            elif id(node) in shared:
                self._send("again", name=name, shared=shared[id(node)])
            else:
                number = None
                if links[id(node)] > 1:
                    number = shared[id(node)] = len(shared)
                self._leaf(name, node, number)
        self._send("end", end=True)
        return 0

    def _leaf(self, name: str, node: Node, shared: int | None) -> None:
        attributes = _attributes(node)
        if node.kind == "f":
            self._send("file", name=name, body=node.body, shared=shared, **attributes)
        elif node.kind == "l":
            self._send("symlink", name=name, link=node.link.decode("latin-1"), shared=shared, **attributes)
        else:
            self._send("node", name=name, kind=node.kind, device=node.device, shared=shared, **attributes)


def _links(root: Node) -> dict[int, int]:
    """How many names each inode has."""
    counts: dict[int, int] = {}
    stack = [root]
    while stack:
        for child in stack.pop().entries.values():
            counts[id(child)] = counts.get(id(child), 0) + 1
            if child.kind == "d":
                stack.append(child)
    return counts


def _attributes(node: Node) -> dict[str, Any]:
    xattrs = {name.decode("latin-1"): value.decode("latin-1") for name, value in node.xattrs.items()}
    return {"mode": node.mode, "uid": node.uid, "gid": node.gid, "mtime_ns": node.mtime_ns, "xattrs": xattrs}
