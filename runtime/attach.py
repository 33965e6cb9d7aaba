"""Mounts that a container gets and loses while it runs. They go with the run.

Each is the work of a child, which makes the mount where the host's paths are, enters the container's mount namespace, and
puts it on a descriptor that openat2 found below the root: whoever swaps links meanwhile moves it nowhere else
(CVE-2021-30465, CVE-2025-52565). It loads nothing there, is not dumpable, and runs no program of the container's.

What is taken away is known by the kernel's number of the mount, not by its path, which may lead elsewhere by then.
"""

from __future__ import annotations

import errno
import os
import signal
import stat
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from ambi.core.deadline import Deadline
from ambi.core.errors import Conflict, InvalidRequest, NotFound, Unsupported, from_os_error
from ambi.linux import mount, paths, process
from runtime import mounts, spawn

_ESCAPES = (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\"))  # of proc(5), mountinfo
_ELSEWHERE = "attach it at another path"


class Line(NamedTuple):
    """A line of mountinfo: the numbers of a mount and of the one that it is on, and its place below the root."""

    number: int
    parent: int
    place: str


class Attachments:
    """Those of one container. host_mounts: where the sources are found, see ambi.core.driver.Propagating."""

    def __init__(self, init_pidfd: int, host_mounts: int | None) -> None:
        self._init, self._host = init_pidfd, host_mounts
        self._numbers: dict[str, int] = {}

    def attach(self, entry: dict[str, Any], by: Deadline) -> None:
        """See ambi.core.driver.Mountable."""
        wanted = mounts.parse(entry)
        if wanted.kind != "bind":
            raise Unsupported(
                f"cannot attach {wanted.describe()} to a container", hint="attach a path or a volume that is a directory"
            )
        if wanted.destination in self._numbers:
            raise Conflict(f"something is attached at {wanted.destination} already")
        self._numbers[wanted.destination] = self._done(
            f"attach {wanted.describe()}", lambda: _attach(wanted, self._init, self._host), by
        )

    def detach(self, destination: str, by: Deadline, *, force: bool) -> None:
        """See ambi.core.driver.Mountable."""
        number = self._numbers.get(destination)
        if number is None:
            raise NotFound(f"nothing is attached at {destination}")
        self._done(f"detach {destination}", lambda: _detach(number, self._init, force=force), by)
        del self._numbers[destination]

    def _done(self, what: str, work: Callable[[], int], by: Deadline) -> int:
        """What `work` returns in a child. Raises what it raises there."""
        ours, theirs = spawn.Channel.pair()
        child = spawn.clone(0, lambda: _live(theirs, what, work))
        theirs.close()
        try:
            message, _ = spawn.expect(ours, "done", by, f"cannot {what}")
            return int(message[1])
        finally:
            ours.close()
            signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)  # by now it ends by itself, or nobody waits any more
            os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED)
            os.close(child.pidfd)


def _live(channel: spawn.Channel, what: str, work: Callable[[], int]) -> NoReturn:
    def body(doing: list[str]) -> None:
        doing.append(what)
        channel.send("done", work())

    spawn.guarded(channel, body)


def _enter(init: int) -> int:
    """An O_PATH descriptor of the container's root, with its mount namespace entered."""
    spawn.forbid_imports()
    process.setns(init, process.CLONE_NEWNS)
    return os.open("/", paths.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def _attach(entry: mounts.Mount, init: int, host: int | None) -> int:
    proc = paths.open_procfs()
    made = mounts.cloned(entry, host)
    mount.mount_setattr(made, propagation=entry.propagation or mount.MS_PRIVATE, recursive=True)
    target = _target(_enter(init), made, entry)
    mounts.set_attributes(made, entry)
    mount.move_mount(made, target)
    return _number_of(proc, made)


def _target(root: int, made: int, entry: mounts.Mount) -> int:
    """What to mount on, made where it is missing."""
    directory, what = stat.S_ISDIR(os.fstat(made).st_mode), f"cannot attach {entry.describe()}"
    try:
        target = (paths.make_directories if directory else paths.make_file)(root, entry.destination)
    except OSError as error:
        if error.errno == errno.EROFS:
            raise InvalidRequest(f"{what}: it is not there, and the root is read-only", hint=_ELSEWHERE) from error
        raise from_os_error(what, error) from error
    if stat.S_ISDIR(os.fstat(target).st_mode) != directory:
        kinds = ("a directory", "a file") if directory else ("a file", "a directory")
        raise InvalidRequest(f"{what}: the source is {kinds[0]}, and what is there {kinds[1]}", hint=_ELSEWHERE)
    if paths.filesystem_type(target) in (paths.PROC_SUPER_MAGIC, paths.SYSFS_MAGIC, paths.CGROUP2_SUPER_MAGIC):
        raise InvalidRequest(f"{what}: that is a file system of the kernel", hint=_ELSEWHERE)
    return target


def _number_of(proc: int, fd: int) -> int:
    """The kernel's number of the mount that `fd` is on, in whatever mount namespace this process is."""
    text = paths.read_in_root(proc, f"{paths.own_directory(proc)}/fdinfo/{fd}").decode()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("mnt_id:"))


def _detach(number: int, init: int, *, force: bool) -> int:
    proc = paths.open_procfs()
    root = _enter(init)
    table = paths.read_in_root(proc, f"{paths.own_directory(proc)}/mountinfo", 16 << 20).decode("utf-8", "surrogateescape")
    _unmount(proc, root, below(table, number)[::-1], mount.MNT_DETACH if force else 0)
    return 0


def below(table: str, number: int) -> list[Line]:
    """The mount `number` in the text of mountinfo and those below it, each behind what it is on; [] when it is gone."""
    found: list[Line] = []
    numbers: set[int] = set()
    for text in table.splitlines():
        words = text.split(" ")
        line = Line(int(words[0]), int(words[1]), _unescaped(words[4]))
        if line.number == number or line.parent in numbers:
            numbers.add(line.number)
            found.append(line)
    return found


def _unescaped(place: str) -> str:
    for escaped, meant in _ESCAPES:
        place = place.replace(escaped, meant)
    return place


def _unmount(proc: int, root: int, lines: list[Line], flags: int) -> None:
    """By parent and name, so that no link is followed, and nothing but these is unmounted."""
    for line in lines:
        above, _, name = line.place.rpartition("/")
        parent = paths.open_in_root(root, above or "/", paths.O_PATH | os.O_DIRECTORY, resolve=paths.RESOLVE_NO_SYMLINKS)
        there = os.open(name, paths.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        if _number_of(proc, there) != line.number:
            raise Conflict(f"something else is mounted over {line.place}")
        os.close(there)
        os.fchdir(parent)
        try:
            mount.umount(name, flags | mount.UMOUNT_NOFOLLOW)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise Conflict(f"{line.place} is in use") from error
            raise
        os.close(parent)
