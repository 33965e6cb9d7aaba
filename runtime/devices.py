"""Device nodes and the rules on their use."""

from __future__ import annotations

import os
import stat
from typing import Any, NamedTuple

from ambi.core.errors import InvalidRequest
from ambi.linux import paths


class Node(NamedTuple):
    """A device node: `kind` is `c`, `b` or `p` (a fifo, whose numbers are 0)."""

    path: str
    kind: str
    major: int
    minor: int
    mode: int = 0o666
    uid: int = 0
    gid: int = 0


class Rule(NamedTuple):
    """One rule of the device cgroup; None is every number, kind `a` every type."""

    allow: bool
    kind: str
    major: int | None
    minor: int | None
    access: str

    def text(self) -> str:
        """As version 1's files take it."""
        if self.kind == "a":
            return "a"
        numbers = ["*" if n is None else str(n) for n in (self.major, self.minor)]
        return f"{self.kind} {numbers[0]}:{numbers[1]} {self.access}"


# What the runtime-spec lists as default devices (config-linux.md)
DEFAULT_NODES = (
    Node("/dev/null", "c", 1, 3),
    Node("/dev/zero", "c", 1, 5),
    Node("/dev/full", "c", 1, 7),
    Node("/dev/random", "c", 1, 8),
    Node("/dev/urandom", "c", 1, 9),
    Node("/dev/tty", "c", 5, 0),
)
DEFAULT_LINKS = (
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
    ("/dev/ptmx", "pts/ptmx"),
)
# mknod of anything, as every runtime allows (the node is of no use without the next rules); ptmx and the terminals
_DEFAULT_RULES = (
    Rule(True, "c", None, None, "m"),
    Rule(True, "b", None, None, "m"),
    *(Rule(True, node.kind, node.major, node.minor, "rwm") for node in DEFAULT_NODES),
    Rule(True, "c", 5, 2, "rwm"),
    Rule(True, "c", 136, None, "rwm"),
)
_KINDS = {"c": stat.S_IFCHR, "u": stat.S_IFCHR, "b": stat.S_IFBLK, "p": stat.S_IFIFO}


def rules_of(config: dict[str, Any]) -> list[Rule]:
    """The rules of `linux.resources.devices` in their order, then the default devices."""
    linux = config.get("linux") or {}
    found = []
    for entry in (linux.get("resources") or {}).get("devices") or ():
        kind = entry.get("type") or "a"
        major, minor = (None if n is None or n < 0 else n for n in (entry.get("major"), entry.get("minor")))
        access = entry.get("access") or "rwm"
        if kind not in ("a", "b", "c") or set(access) - set("rwm"):
            raise InvalidRequest(f"linux.resources.devices: {kind} {access} is no device rule")
        if kind == "a" and (major is not None or minor is not None or set(access) != set("rwm")):
            raise InvalidRequest("linux.resources.devices: a rule for all types must be for all devices and accesses")
        found.append(Rule(bool(entry.get("allow")), kind, major, minor, access))
    return [*found, *_DEFAULT_RULES]


def nodes_of(config: dict[str, Any]) -> list[Node]:
    """The default nodes and those of `linux.devices`, which replace a default of the same path."""
    found = {node.path: node for node in DEFAULT_NODES}
    for entry in (config.get("linux") or {}).get("devices") or ():
        kind, path = entry["type"], "/" + "/".join(paths.parts_of(entry["path"]))
        if kind not in _KINDS:
            raise InvalidRequest(f"linux.devices: {path}: no device type is called {kind}")
        mode = 0o666 if entry.get("fileMode") is None else entry["fileMode"] & 0o7777
        numbers = entry.get("major") or 0, entry.get("minor") or 0
        found[path] = Node(path, "c" if kind == "u" else kind, *numbers, mode, entry.get("uid") or 0, entry.get("gid") or 0)
    return list(found.values())


def make_nodes(root: int, nodes: list[Node]) -> None:
    """Create `nodes` below `root`, replacing what is there; the umask must be 0."""
    for node in nodes:
        directory, _, name = node.path.rpartition("/")
        parent = paths.make_directories(root, directory)
        try:
            _make_node(parent, name, node)
        finally:
            os.close(parent)


def _make_node(parent: int, name: str, node: Node) -> None:
    wanted = _KINDS[node.kind] | node.mode
    device = os.makedev(node.major, node.minor)
    try:
        os.mknod(name, wanted, device, dir_fd=parent)
    except FileExistsError:
        os.unlink(name, dir_fd=parent)
        os.mknod(name, wanted, device, dir_fd=parent)
    if node.uid or node.gid:
        os.chown(name, node.uid, node.gid, dir_fd=parent, follow_symlinks=False)


def make_links(root: int) -> None:
    """The symbolic links of /dev that the runtime-spec lists; one that exists stays."""
    parent = paths.make_directories(root, "/dev")
    try:
        for path, target in DEFAULT_LINKS:
            try:
                os.symlink(target, path.rpartition("/")[2], dir_fd=parent)
            except FileExistsError:
                pass
    finally:
        os.close(parent)
