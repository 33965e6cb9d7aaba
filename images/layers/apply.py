"""The privileged half of the `dir` form: a closed set of operations, each on one name in one directory that we have made.

The worker has parsed the archive and resolved its links and duplicates (`operations`); here nothing is followed and nothing
is replaced. A name is one component. Whatever is wrong is Corrupt, and the caller removes the half-made tree.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from pathlib import Path
from typing import Any

from ambi.core.errors import AmbiError, Corrupt, from_os_error
from images.layers.frames import FrameReader

_NODES = {"c": stat.S_IFCHR, "b": stat.S_IFBLK, "p": stat.S_IFIFO}
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def apply(source: int, target: Path) -> int:
    """Make the new directory `target` from the operations that come out of `source`; the bytes of its files.

    Bodies wait in `target.bodies`. Both are the caller's to remove after an error.
    """
    try:
        return _Applier(FrameReader(source), target).run()
    except AmbiError:
        raise
    except OSError as error:
        raise from_os_error("cannot unpack the layer", error) from error
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise Corrupt(f"the image worker sent an operation of another form: {error}") from error


class _Applier:
    """Directory descriptors: `_here` is where names go; going up is `..`, as the tree is ours alone."""

    def __init__(self, reader: FrameReader, target: Path) -> None:
        self._reader = reader
        self._target = target
        self._staging = target.with_name(target.name + ".bodies")
        self._bodies = 0
        self._body = -1
        self._here = -1
        self._pending: list[dict[str, Any]] = []  # directories that are open; their attributes come last
        self._size = 0

    def run(self) -> int:
        os.mkdir(self._staging, 0o700)
        os.mkdir(self._target, 0o700)
        self._stage = os.open(self._staging, _DIRECTORY)
        try:
            while True:
                operation = self._reader.frame()
                if operation is None:
                    raise Corrupt("the image worker's operations are cut short")
                if operation["op"] == "end":
                    break
                _OPERATIONS[operation["op"]](self, operation)
        finally:
            for fd in (self._stage, self._here, self._body):
                if fd >= 0:
                    os.close(fd)
        if self._pending:
            raise Corrupt("the image worker left directories open")
        shutil.rmtree(self._staging)
        return self._size

    def begin(self, _: dict[str, Any]) -> None:
        if self._body >= 0:
            raise Corrupt("the image worker began a file inside another")
        self._body = os.open(
            str(self._bodies), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=self._stage
        )

    def data(self, operation: dict[str, Any]) -> None:
        body = self._body
        self._reader.copy(operation["data"], lambda piece: _write(body, piece))
        self._size += operation["data"]

    def hole(self, operation: dict[str, Any]) -> None:
        os.lseek(self._body, operation["size"], os.SEEK_CUR)

    def close(self, operation: dict[str, Any]) -> None:
        os.ftruncate(self._body, operation["size"])
        os.close(self._body)
        self._body = -1
        self._bodies += 1

    def directory(self, operation: dict[str, Any]) -> None:
        if not self._pending and self._here < 0:
            self._here = os.open(self._target, _DIRECTORY)
        else:
            name = self._name(operation)
            os.mkdir(name, 0o700, dir_fd=self._here)
            self._move(name)
        self._pending.append(operation)

    def up(self, _: dict[str, Any]) -> None:
        if not self._pending:
            raise Corrupt("the image worker left a directory that it had not entered")
        operation = self._pending.pop()
        self._attributes(self._here, operation)
        if self._pending:
            self._move("..")

    def file(self, operation: dict[str, Any]) -> None:
        name = self._name(operation)
        if operation["body"] is None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            fd = os.open(name, flags, 0o600, dir_fd=self._here)
        else:
            body = str(int(operation["body"]))
            fd = os.open(body, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._stage)
        try:
            if operation["body"] is not None:
                os.link(body, name, src_dir_fd=self._stage, dst_dir_fd=self._here)  # link: a name is never replaced
                os.unlink(body, dir_fd=self._stage)
            self._attributes(fd, operation)
        finally:
            os.close(fd)
        self._share(name, operation)

    def symlink(self, operation: dict[str, Any]) -> None:
        name = self._name(operation)
        os.symlink(operation["link"].encode("latin-1"), name, dir_fd=self._here)
        os.chown(name, operation["uid"], operation["gid"], dir_fd=self._here, follow_symlinks=False)
        self._xattrs(self._path(name), operation, follow=False)
        self._times(name, operation)
        self._share(name, operation)

    def node(self, operation: dict[str, Any]) -> None:
        name = self._name(operation)
        major, minor = operation["device"]
        os.mknod(name, _NODES[operation["kind"]] | 0o600, os.makedev(major, minor), dir_fd=self._here)
        os.chown(name, operation["uid"], operation["gid"], dir_fd=self._here, follow_symlinks=False)
        os.chmod(name, operation["mode"] & 0o7777, dir_fd=self._here)
        self._xattrs(self._path(name), operation, follow=False)
        self._times(name, operation)
        self._share(name, operation)

    def again(self, operation: dict[str, Any]) -> None:
        shared = f"s{int(operation['shared'])}"
        os.link(shared, self._name(operation), src_dir_fd=self._stage, dst_dir_fd=self._here, follow_symlinks=False)

    def _share(self, name: bytes, operation: dict[str, Any]) -> None:
        """Keep a second name in the staging directory for later ones."""
        if operation["shared"] is not None:
            shared = f"s{int(operation['shared'])}"
            os.link(name, shared, src_dir_fd=self._here, dst_dir_fd=self._stage, follow_symlinks=False)

    def _name(self, operation: dict[str, Any]) -> bytes:
        name: bytes = operation["name"].encode("latin-1")
        if not name or b"/" in name or b"\0" in name or name in (b".", b"..") or not self._pending:
            raise Corrupt(f"the image worker sent the impossible name {name!r}")
        return name

    def _path(self, name: bytes) -> bytes:
        return b"/proc/self/fd/%d/%s" % (self._here, name)

    def _move(self, name: bytes | str) -> None:
        below = os.open(name, _DIRECTORY, dir_fd=self._here)
        os.close(self._here)
        self._here = below

    def _attributes(self, fd: int, operation: dict[str, Any]) -> None:
        """The owner comes first: changing it takes set-id bits and file capabilities away."""
        os.fchown(fd, operation["uid"], operation["gid"])
        os.fchmod(fd, operation["mode"] & 0o7777)
        self._xattrs(fd, operation)
        os.utime(fd, ns=(operation["mtime_ns"], operation["mtime_ns"]))

    def _times(self, name: bytes, operation: dict[str, Any]) -> None:
        times = (operation["mtime_ns"], operation["mtime_ns"])
        os.utime(name, ns=times, dir_fd=self._here, follow_symlinks=False)

    def _xattrs(self, where: int | bytes, operation: dict[str, Any], *, follow: bool = True) -> None:
        for key, value in operation["xattrs"].items():
            try:
                os.setxattr(where, key.encode("latin-1"), value.encode("latin-1"), follow_symlinks=follow)
            except OSError as error:
                # The kernel keeps `user.` from links and devices, and a file system may not know a prefix at all.
                if error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
                    raise


def _write(fd: int, piece: memoryview) -> None:
    while piece:
        piece = piece[os.write(fd, piece) :]


_OPERATIONS = {
    "body": _Applier.begin, "bytes": _Applier.data, "hole": _Applier.hole, "close": _Applier.close,
    "directory": _Applier.directory, "up": _Applier.up, "file": _Applier.file, "symlink": _Applier.symlink,
    "node": _Applier.node, "again": _Applier.again,
}  # fmt: skip
