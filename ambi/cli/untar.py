"""Archives of an instance on this machine. What an instance sends is hostile: no entry and no link leads out of the target.

Every directory on the way is opened by its own name, without following links; so what the archive itself has put there
cannot be written through. Devices and sockets are left out: this machine must not get those that somebody inside has made.
"""

from __future__ import annotations

import io
import os
import stat
import tarfile
from collections.abc import Callable, Iterator
from typing import IO, BinaryIO

from ambi.core.errors import Corrupt, InvalidRequest

_PIECE = 1 << 18
_INTO = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Pieces(io.RawIOBase):
    """Pieces of bytes as a file to read; `told` hears how many have gone."""

    def __init__(self, pieces: Iterator[bytes], told: Callable[[int], None] = lambda _: None) -> None:
        self._pieces, self._told, self._left, self._done = pieces, told, memoryview(b""), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._left:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._left = memoryview(piece)
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        self._done += count
        self._told(self._done)
        return count


class Untar:
    """Unpacks into `directory`, which exists. own: owners come from the archive."""

    def __init__(self, directory: str, *, own: bool) -> None:
        self._directory, self._own = directory, own
        self._late: list[tuple[list[str], tarfile.TarInfo]] = []
        self._bytes = 0

    def unpack(self, stream: io.RawIOBase, base: str, name: str | None) -> int:
        """All of the archive in `stream`; what is called `base` at its top becomes `name`. Returns the bytes of files.

        Raises Corrupt (no archive, or cut short), InvalidRequest (a name that leads out, a directory that is in the way).
        """
        root = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with tarfile.open(fileobj=io.BufferedReader(stream, _PIECE), mode="r|") as archive:
                for member in archive:
                    self._one(root, archive, member, _parts(member.name, base, name), base, name)
            for parts, member in reversed(self._late):
                parent = self._parent(root, parts[:-1])
                try:
                    self._metadata(parent, parts[-1], member)
                finally:
                    os.close(parent)
        except (tarfile.TarError, EOFError) as error:
            raise Corrupt(f"the archive of the instance is damaged: {error}", hint="try again, or ambi logs") from error
        finally:
            os.close(root)
        return self._bytes

    def _parent(self, root: int, parts: list[str]) -> int:
        here = os.dup(root)
        for part in parts:
            try:
                try:
                    below = os.open(part, _INTO, dir_fd=here)
                except FileNotFoundError:
                    os.mkdir(part, 0o755, dir_fd=here)
                    below = os.open(part, _INTO, dir_fd=here)
            finally:
                os.close(here)
            here = below
        return here

    def _one(
        self, root: int, archive: tarfile.TarFile, member: tarfile.TarInfo, parts: list[str], base: str, name: str | None
    ) -> None:
        if not parts:
            return
        parent = self._parent(root, parts[:-1])
        try:
            last = parts[-1]
            stays = self._make_way(parent, last, member)
            if member.isdir():
                if not stays:
                    os.mkdir(last, 0o700, dir_fd=parent)
                self._late.append((parts, member))
                return
            if member.issym():
                os.symlink(member.linkname, last, dir_fd=parent)
            elif member.islnk():
                self._link(root, _parts(member.linkname, base, name), parent, last)
                return
            elif member.isreg():
                self._file(parent, last, archive.extractfile(member))
            elif member.isfifo():
                os.mkfifo(last, 0o600, dir_fd=parent)
            else:
                return
            self._metadata(parent, last, member)
        finally:
            os.close(parent)

    def _make_way(self, parent: int, name: str, member: tarfile.TarInfo) -> bool:
        """Whether a directory is there already, for a directory; anything else that is not one is replaced."""
        try:
            there = os.stat(name, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            return False
        if stat.S_ISDIR(there.st_mode) != member.isdir():
            kind = "a directory" if stat.S_ISDIR(there.st_mode) else "no directory"
            raise InvalidRequest(f"cannot copy over {name}: it is {kind} here", hint=f"move {name} away first")
        if member.isdir():
            return True
        os.unlink(name, dir_fd=parent)
        return False

    def _file(self, parent: int, name: str, source: IO[bytes] | None) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name, flags, 0o600, dir_fd=parent)
        assert source is not None  # of a regular file
        with open(fd, "wb", buffering=0) as target:
            while piece := source.read(_PIECE):
                target.write(piece)
                self._bytes += len(piece)

    def _link(self, root: int, parts: list[str], parent: int, name: str) -> None:
        if not parts:
            raise InvalidRequest(
                "the archive has a hard link to its own directory", hint="report this with the image's name"
            )
        directory = self._parent(root, parts[:-1])
        try:
            os.link(parts[-1], name, src_dir_fd=directory, dst_dir_fd=parent, follow_symlinks=False)
        finally:
            os.close(directory)

    def _metadata(self, parent: int, name: str, member: tarfile.TarInfo) -> None:
        if self._own:
            os.chown(name, member.uid, member.gid, dir_fd=parent, follow_symlinks=False)
        if not member.issym():
            kept = 0o7777 if self._own else 0o1777  # rights of another owner are none of this one's
            fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
            try:
                os.chmod(f"/proc/self/fd/{fd}", member.mode & kept)
            finally:
                os.close(fd)
        when = _time_ns(member)
        os.utime(name, ns=(when, when), dir_fd=parent, follow_symlinks=False)


def _time_ns(member: tarfile.TarInfo) -> int:
    """To the nanosecond, which a float cannot hold."""
    text = member.pax_headers.get("mtime", "")
    whole, _, digits = text.partition(".")
    if not whole.isdecimal() or (digits and not digits.isdecimal()):
        return int(member.mtime) * 1_000_000_000
    return int(whole) * 1_000_000_000 + int(digits[:9].ljust(9, "0") or 0)


def _parts(path: str, base: str, name: str | None) -> list[str]:
    """The components of an entry's path, with `name` instead of `base` as the first. Raises InvalidRequest."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise InvalidRequest(
            f"the archive has a name that leads out of it: {path}", hint="report this with the image's name"
        )
    if name is None:
        return parts
    return [name, *(parts[1:] if base not in (".", "/") else parts)]


def write_archive(target: BinaryIO, source: str, top: str) -> None:
    """An archive of the file or directory `source`, called `top`; links below it stay links."""
    with tarfile.open(fileobj=target, mode="w|", format=tarfile.PAX_FORMAT, bufsize=_PIECE) as archive:
        archive.add(source, arcname=top, recursive=True, filter=_plain)


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Numbers are what counts inside; names of this machine's users are not sent."""
    member.uname = member.gname = ""
    return member
