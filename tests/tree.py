"""Trees as values, to be compared entry by entry, and an independent merge of layers to compare with.

`scan` reads a directory. `merge` makes the tree that an image means without any code of ours: GNU tar extracts each layer on
its own, and whiteouts are applied here, over values. `lines` renders a tree as `tests/probe/tree.c` prints it from inside an
instance.
"""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_KINDS = {
    stat.S_IFREG: "-", stat.S_IFDIR: "d", stat.S_IFLNK: "l", stat.S_IFCHR: "c", stat.S_IFBLK: "b", stat.S_IFIFO: "p",
    stat.S_IFSOCK: "s",
}  # fmt: skip
_OVERLAY = (b"trusted.overlay.", b"user.overlay.")


class Record(NamedTuple):
    """One entry. kind: as in `ls -l`. links: names of its inode, 0 of directories. group: the same for all names of an inode
    in this tree, "" for one with a single name.

    size: 0 of directories. device: of device nodes. xattrs: without overlayfs's own. sha256, crc32: of a file's content.
    """

    kind: str
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    device: tuple[int, int]
    links: int
    group: str
    target: bytes
    xattrs: tuple[tuple[bytes, bytes], ...]
    sha256: str
    crc32: int


Tree = dict[bytes, Record]  # by path without leading slash; the root itself is b""


def scan(root: Path | bytes) -> Tree:
    """Every entry below `root`, and the root; another file system mounted below is not entered."""
    top = os.fsencode(root)
    found: Tree = {b"": _record(top, "")}
    device = os.lstat(top).st_dev
    names: dict[tuple[int, int], str] = {}
    stack = [b""]
    while stack:
        here = stack.pop()
        for name in sorted(os.listdir(os.path.join(top, here))):
            path = os.path.join(here, name)
            full = os.path.join(top, path)
            state = os.lstat(full)
            group = ""
            if not stat.S_ISDIR(state.st_mode) and state.st_nlink > 1:
                group = names.setdefault((state.st_dev, state.st_ino), os.fsdecode(path))
            found[path] = _record(full, group)
            if stat.S_ISDIR(state.st_mode) and state.st_dev == device:
                stack.append(path)
    return found


def _record(path: bytes, group: str) -> Record:
    state = os.lstat(path)
    kind = _KINDS[stat.S_IFMT(state.st_mode)]
    digest, crc = "", 0
    if kind == "-":
        whole = hashlib.sha256()
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                whole.update(chunk)
                crc = zlib.crc32(chunk, crc)
        digest = whole.hexdigest()
    xattrs = []
    for name in sorted(map(os.fsencode, os.listxattr(path, follow_symlinks=False))):
        if not name.startswith(_OVERLAY):
            xattrs.append((name, os.getxattr(path, name, follow_symlinks=False)))
    return Record(
        kind,
        stat.S_IMODE(state.st_mode),
        state.st_uid,
        state.st_gid,
        0 if kind == "d" else state.st_size,
        state.st_mtime_ns,
        (os.major(state.st_rdev), os.minor(state.st_rdev)) if kind in "cb" else (0, 0),
        0 if kind == "d" else state.st_nlink,
        group,
        os.readlink(path) if kind == "l" else b"",
        tuple(xattrs),
        digest,
        crc,
    )


def extract(archive: Path, target: Path) -> None:
    """Unpack with GNU tar, as root, everything kept."""
    target.mkdir()
    command = ["tar", "--extract", "--preserve-permissions", "--numeric-owner", "--xattrs", "--xattrs-include=*", "--acls"]
    done = subprocess.run([*command, "--file", archive, "--directory", target], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def merge(archives: Iterable[Path], work: Path) -> Tree:
    """The tree of an image whose layers are `archives`, the lowest first. `work` is a directory for the extractions."""
    merged: Tree = {}
    for number, archive in enumerate(archives):
        target = work / f"layer{number}"
        extract(archive, target)
        _lay(merged, scan(target), number)
    return merged


def _lay(merged: Tree, layer: Tree, number: int) -> None:
    """Put one layer over `merged`: first what it hides, then what it brings."""
    for path in layer:
        directory, name = os.path.split(path)
        if name == b".wh..wh..opq":
            _drop_below(merged, directory)
        elif name.startswith(b".wh."):
            hidden = os.path.join(directory, name[4:])
            merged.pop(hidden, None)
            _drop_below(merged, hidden)
    for path, record in layer.items():
        if os.path.basename(path).startswith(b".wh."):
            continue
        if record.kind != "d":
            _drop_below(merged, path)
        merged[path] = record._replace(group=f"{number}:{record.group}" if record.group else "")


def _drop_below(tree: Tree, directory: bytes) -> None:
    prefix = directory + b"/" if directory else b""
    for path in [x for x in tree if x.startswith(prefix) and x]:
        del tree[path]


def differences(found: Tree, wanted: Tree, *, ignore: frozenset[str] = frozenset()) -> list[str]:
    """One line for each path that is missing, too much, or other; fields in `ignore` do not count."""
    lines = [f"missing: {path!r}" for path in sorted(wanted.keys() - found.keys())]
    lines += [f"too much: {path!r}" for path in sorted(found.keys() - wanted.keys())]
    found_groups, wanted_groups = _first_of_groups(found), _first_of_groups(wanted)
    for path in sorted(found.keys() & wanted.keys()):
        have_record = found[path]._replace(group=found_groups[path])
        want_record = wanted[path]._replace(group=wanted_groups[path])
        for field, have, want in zip(Record._fields, have_record, want_record, strict=True):
            if have != want and field not in ignore:
                lines.append(f"{path!r}: {field} is {have!r}, not {want!r}")
    return lines


def lines(tree: Tree) -> list[str]:
    """As the probe prints it, sorted. Paths start with `./`; the root is left out, as there."""
    groups = _first_of_groups(tree)
    return sorted(_line(path, record, groups[path]) for path, record in tree.items() if path)


def _first_of_groups(tree: Tree) -> dict[bytes, str]:
    """For each path the first one of its inode, or "-" when that has no other name in the tree."""
    members: dict[str, list[bytes]] = {}
    for path in sorted(tree, key=_walk_order):
        if tree[path].group:
            members.setdefault(tree[path].group, []).append(path)
    first = dict.fromkeys(tree, "-")
    for paths in members.values():
        if len(paths) > 1:
            first.update(dict.fromkeys(paths, _escape(b"./" + paths[0])))
    return first


def _walk_order(path: bytes) -> list[bytes]:
    return path.split(b"/")


def _line(path: bytes, record: Record, link: str) -> str:
    seconds, nanoseconds = divmod(record.mtime_ns, 1_000_000_000)
    xattrs = ",".join(f"{os.fsdecode(name)}={zlib.crc32(value):08x}" for name, value in record.xattrs) or "-"
    target = _escape(record.target) if record.kind == "l" else "-"
    return (
        f"{_escape(b'./' + path)} {record.kind} {record.mode:04o} {record.uid} {record.gid} {record.size} "
        f"{seconds}.{nanoseconds:09d} {record.device[0]}:{record.device[1]} {link} {target} {xattrs} {record.crc32:08x}"
    )


def _escape(text: bytes) -> str:
    return "".join(chr(x) if 32 < x < 127 and x != 0x5C else f"\\x{x:02x}" for x in text)
