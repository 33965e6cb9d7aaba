"""The mounts of config.json, masked and read-only paths: all made below the new root before anything there can run.

Every mount is made detached, gets its attributes, and is then attached to a descriptor that openat2 found below the root, so
a link in the image leads nowhere else. What may lie over /proc is a short list (CVE-2019-16884, CVE-2023-27561).

Functions here run between clone and execve: they import nothing.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Any, NamedTuple

from ambi.core.errors import InvalidRequest, NotFound, Unsupported, from_os_error
from ambi.linux import mount, paths, process
from runtime import copyup

_FLAGS = {  # option -> (attributes set, attributes cleared)
    "ro": (mount.MOUNT_ATTR_RDONLY, 0),
    "rw": (0, mount.MOUNT_ATTR_RDONLY),
    "nosuid": (mount.MOUNT_ATTR_NOSUID, 0),
    "suid": (0, mount.MOUNT_ATTR_NOSUID),
    "nodev": (mount.MOUNT_ATTR_NODEV, 0),
    "dev": (0, mount.MOUNT_ATTR_NODEV),
    "noexec": (mount.MOUNT_ATTR_NOEXEC, 0),
    "exec": (0, mount.MOUNT_ATTR_NOEXEC),
    "noatime": (mount.MOUNT_ATTR_NOATIME, 0),
    "strictatime": (mount.MOUNT_ATTR_STRICTATIME, 0),
    "relatime": (0, mount.MOUNT_ATTR__ATIME),
    "nodiratime": (mount.MOUNT_ATTR_NODIRATIME, 0),
    "diratime": (0, mount.MOUNT_ATTR_NODIRATIME),
    "nosymfollow": (mount.MOUNT_ATTR_NOSYMFOLLOW, 0),
    "symfollow": (0, mount.MOUNT_ATTR_NOSYMFOLLOW),
}
_PROPAGATION = {
    "private": mount.MS_PRIVATE,
    "shared": mount.MS_SHARED,
    "slave": mount.MS_SLAVE,
    "unbindable": mount.MS_UNBINDABLE,
}
_IGNORED = ("defaults", "async", "atime")
OF = "ambi.of="
_FILESYSTEMS = ("proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup2")
_OVER_PROC = frozenset(
    f"/proc/{name}"
    for name in (
        "cpuinfo", "diskstats", "meminfo", "stat", "swaps", "uptime", "loadavg", "slabinfo", "net/dev",
        "sys/kernel/ns_last_pid", "sys/crypto/fips_enabled",
    )
)  # fmt: skip


class Mount(NamedTuple):
    """One entry of `mounts`, read and checked.

    set, clear: MOUNT_ATTR_* of this mount; set_all, clear_all: of all mounts below a recursive bind (`rro`).
    propagation: MS_SHARED and the like, 0 to keep it; options: what the file system takes, a None value is a flag.
    copy, subpath, of: `ambi.copy`, `ambi.subpath` and `ambi.of` of ambi/core/plan.py.
    """

    destination: str
    kind: str
    source: str
    recursive: bool
    set: int
    clear: int
    set_all: int
    clear_all: int
    propagation: int
    propagation_recursive: bool
    options: tuple[tuple[str, str | None], ...]
    copy: bool = False
    subpath: str = ""
    of: str = ""

    def describe(self) -> str:
        return f"{self.kind} {self.source} at {self.destination}"


def parse(entry: dict[str, Any]) -> Mount:
    """An entry of `mounts`. InvalidRequest and Unsupported name the destination."""
    destination = "/" + "/".join(paths.parts_of(entry["destination"]))
    words = list(entry.get("options") or ())
    bind = entry.get("type") == "bind" or "bind" in words or "rbind" in words
    kind = "bind" if bind else entry.get("type") or ""
    if kind not in _FILESYSTEMS and kind not in ("bind", "cgroup"):
        raise Unsupported(f"mount at {destination}: type {kind or '(none)'} is not supported")
    if destination == "/":
        raise InvalidRequest("mount at /: the root itself cannot be covered")
    if destination.startswith("/proc/") and not (bind and destination in _OVER_PROC):
        raise InvalidRequest(f"mount at {destination}: only a few files below /proc can be covered, by binds")
    set_one = clear_one = set_all = clear_all = propagation = 0
    propagation_recursive = False
    options: list[tuple[str, str | None]] = []
    copy, subpath, of = bind and "ambi.copy" in words, "", ""
    for word in words:
        if bind and word.startswith("ambi."):
            subpath = word.removeprefix("ambi.subpath=") if word.startswith("ambi.subpath=") else subpath
            of = word.removeprefix(OF) if word.startswith(OF) else of
        elif word in _FLAGS:
            set_one, clear_one = _merge(set_one, clear_one, *_FLAGS[word])
        elif word[:1] == "r" and word[1:] in _FLAGS and bind:
            set_all, clear_all = _merge(set_all, clear_all, *_FLAGS[word[1:]])
        elif word.removeprefix("r") in _PROPAGATION:
            propagation, propagation_recursive = _PROPAGATION[word.removeprefix("r")], word[0] == "r"
        elif word in ("bind", "rbind", *_IGNORED):
            continue
        elif bind or kind == "cgroup":
            raise InvalidRequest(f"mount at {destination}: a {kind} mount has no option {word}")
        else:
            key, equals, value = word.partition("=")
            options.append((key, value if equals else None))
    return Mount(
        destination, kind, entry.get("source") or kind, "bind" not in words or "rbind" in words,
        set_one, clear_one, set_all, clear_all, propagation, propagation_recursive, tuple(options), copy, subpath, of,
    )  # fmt: skip


def _merge(set_now: int, clear_now: int, set_more: int, clear_more: int) -> tuple[int, int]:
    """Later options win over earlier ones."""
    return set_now & ~clear_more | set_more, clear_now & ~set_more | clear_more


def needs_host(mounts: list[dict[str, Any]]) -> bool:
    """Whether one of the entries of `mounts` is a bind of something of the host."""
    return any(entry.get("type") == "bind" or {"bind", "rbind"} & set(entry.get("options") or ()) for entry in mounts)


def origin_of(mounts: list[dict[str, Any]]) -> str:
    """The mount namespace of another container that an entry of `mounts` is copied from, "" when there is none."""
    words = [word for entry in mounts for word in entry.get("options") or ()]
    return next((word.removeprefix(OF) for word in words if word.startswith(OF)), "")


def attach_all(
    root: int, mounts: list[Mount], cgroup_tree: list[tuple[str, str]], host: int | None = None, other: int | None = None
) -> None:
    """Make `mounts` below `root` in order.

    cgroup_tree: what a mount of type cgroup shows on a version 1 host: (name below it, directory on the host).
    host: the host's mount namespace, where binds are copied from. The shim's own shows what was mounted when its zygote
    began, with what has come since only below shared mounts, and can share nothing with the host.
    other: the mount namespace of another container, which may be hostile, for binds of something of that.
    """
    for entry in mounts:
        try:
            if entry.kind == "bind":
                _bind(root, entry, other if entry.of else host)
            elif entry.kind == "cgroup" and cgroup_tree:
                _cgroup_v1(root, entry, cgroup_tree)
            else:
                _filesystem(root, entry)
        except OSError as error:
            raise from_os_error(f"cannot mount {entry.describe()}", error) from error


def _filesystem(root: int, entry: Mount) -> None:
    kind = "cgroup2" if entry.kind == "cgroup" else entry.kind
    target = _directory_for(root, entry)
    try:
        readonly = kind == "sysfs" and bool(entry.set & mount.MOUNT_ATTR_RDONLY)
        made = mount.new_mount(kind, entry.source, entry.options, entry.set, readonly=readonly)
        _attach(made, target, entry)
    finally:
        os.close(target)


def _directory_for(root: int, entry: Mount) -> int:
    """The directory to mount on; kernel file systems must not be behind a link, where checks by path would miss them."""
    if entry.kind in ("proc", "sysfs"):
        try:
            flags = paths.O_PATH | os.O_DIRECTORY
            return paths.open_in_root(root, entry.destination, flags, resolve=paths.RESOLVE_NO_SYMLINKS)
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise InvalidRequest(f"mount at {entry.destination}: the image has a symbolic link there") from None
            raise
    target = paths.make_directories(root, entry.destination)
    _refuse_proc(target, entry)
    return target


def _refuse_proc(target: int, entry: Mount) -> None:
    if entry.destination not in _OVER_PROC and paths.filesystem_type(target) == paths.PROC_SUPER_MAGIC:
        raise InvalidRequest(f"mount at {entry.destination}: a symbolic link of the image leads into /proc")


def _attach(made: int, target: int, entry: Mount) -> None:
    """Set what only an attached mount can have, attach `made`, and close it."""
    try:
        if entry.propagation:
            mount.mount_setattr(made, propagation=entry.propagation, recursive=entry.propagation_recursive)
        mount.move_mount(made, target)
    finally:
        os.close(made)


def _bind(root: int, entry: Mount, host: int | None) -> None:
    made = cloned(entry, host)
    try:
        if entry.copy:
            _copy_up(root, made, entry)
        if stat.S_ISDIR(os.fstat(made).st_mode):
            target = paths.make_directories(root, entry.destination)
        else:
            target = paths.make_file(root, entry.destination)
    except OSError:
        os.close(made)
        raise
    try:
        _refuse_proc(target, entry)
        set_attributes(made, entry)
        _attach(made, target, entry)
    finally:
        os.close(target)


def set_attributes(made: int, entry: Mount) -> None:
    """The flags of a bind, before it has a place."""
    if entry.set or entry.clear:
        mount.mount_setattr(made, set=entry.set, clear=entry.clear)
    if entry.set_all or entry.clear_all:
        mount.mount_setattr(made, set=entry.set_all, clear=entry.clear_all, recursive=True)


def cloned(entry: Mount, host: int | None) -> int:
    """A detached copy of what is to be bound, which tells the host nothing unless it is to share. host: see attach_all."""
    made = _cloned(entry) if host is None else _cloned_there(entry, host)
    try:
        if host is not None and entry.propagation != mount.MS_SHARED:
            mount.mount_setattr(made, propagation=mount.MS_SLAVE, recursive=True)
    except BaseException:
        os.close(made)
        raise
    return made


def _cloned(entry: Mount) -> int:
    """A detached copy of what is to be bound. A subpath is resolved inside its source, and by this descriptor alone."""
    flags = mount.OPEN_TREE_CLONE | (mount.AT_RECURSIVE if entry.recursive else 0)
    where = f"{entry.source} at {entry.destination}"
    try:
        if entry.of:  # a link of that container's leads to nothing that it does not see, but is not what was asked for
            found = paths.openat2(mount.AT_FDCWD, entry.source, paths.O_PATH | os.O_DIRECTORY, paths.RESOLVE_NO_SYMLINKS)
            return _tree_at(found, flags)
        if not entry.subpath:
            return mount.open_tree(mount.AT_FDCWD, entry.source, flags)
        source = os.open(entry.source, paths.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            beneath = paths.RESOLVE_BENEATH | paths.RESOLVE_NO_MAGICLINKS
            found = paths.openat2(source, entry.subpath, paths.O_PATH, beneath)
        finally:
            os.close(source)
    except FileNotFoundError:
        what = f"subpath {entry.subpath} of {where}" if entry.subpath else where
        raise NotFound(f"cannot bind {what}: no such file or directory") from None
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.ELOOP) and entry.subpath:
            raise InvalidRequest(f"cannot bind {where}: subpath {entry.subpath} leaves its volume") from None
        raise
    return _tree_at(found, flags)


def _tree_at(found: int, flags: int) -> int:
    """`found` is closed."""
    try:
        return mount.open_tree(found, "", flags)
    finally:
        os.close(found)


def _cloned_there(entry: Mount, host: int) -> int:
    own = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        process.setns(host, process.CLONE_NEWNS)
        try:
            return _cloned(entry)
        finally:
            process.setns(own, process.CLONE_NEWNS)
    finally:
        os.close(own)


def _copy_up(root: int, made: int, entry: Mount) -> None:
    """Fill an empty volume with what the root has there; a root that has nothing there leaves it as it is."""
    if not stat.S_ISDIR(os.fstat(made).st_mode):
        return
    try:
        source = paths.open_in_root(root, entry.destination, paths.O_PATH | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        _refuse_proc(source, entry)
        copyup.fill(source, made)
    finally:
        os.close(source)


def _cgroup_v1(root: int, entry: Mount, tree: list[tuple[str, str]]) -> None:
    """A tmpfs with one directory a hierarchy, and a link for each of several controllers in one.

    The container's own groups are bound there. With a cgroup namespace these are its roots, so it sees `/` as it would in
    a new mount of the hierarchy, which is the same file system and takes three calls more.
    """
    target = _directory_for(root, entry)
    attributes = entry.set & ~mount.MOUNT_ATTR_RDONLY
    _attach(mount.new_mount("tmpfs", "tmpfs", (("mode", "755"),), attributes), target, entry)
    os.close(target)
    base = paths.open_in_root(root, entry.destination, paths.O_PATH | os.O_DIRECTORY)
    try:
        for name, directory in tree:
            os.mkdir(name, 0o755, dir_fd=base)
            for alias in name.split(",") if "," in name else ():
                os.symlink(name, alias, dir_fd=base)
            made = mount.open_tree(mount.AT_FDCWD, directory, mount.OPEN_TREE_CLONE)
            mount.mount_setattr(made, set=entry.set)
            mount.move_mount(made, base, name)
            os.close(made)
        if entry.set & mount.MOUNT_ATTR_RDONLY:
            mount.mount_setattr(base, set=mount.MOUNT_ATTR_RDONLY)
    finally:
        os.close(base)


def bind_file(root: int, source: str, path: str) -> None:
    """Bind the host's file `source` over `path`, which is created when it is missing."""
    try:
        made = mount.open_tree(mount.AT_FDCWD, source, mount.OPEN_TREE_CLONE)
        try:
            target = paths.make_file(root, path)
            try:
                mount.move_mount(made, target)
            finally:
                os.close(target)
        finally:
            os.close(made)
    except OSError as error:
        raise from_os_error(f"cannot bind {source} at {path}", error) from error


def mask(root: int, masked: list[str]) -> None:
    """Hide each path: a directory behind an empty read-only tmpfs, anything else behind /dev/null; skip absent ones."""
    for path in masked:
        target = _existing(root, path)
        if target is None:
            continue
        try:
            if stat.S_ISDIR(os.fstat(target).st_mode):
                made = mount.new_mount("tmpfs", "tmpfs", (("size", "0"), ("nr_inodes", "2")), mount.MOUNT_ATTR_RDONLY)
            else:
                made = _null()
            mount.move_mount(made, target)
            os.close(made)
        except OSError as error:
            raise from_os_error(f"cannot mask {path}", error) from error
        finally:
            os.close(target)


def _null() -> int:
    """A detached mount of the host's /dev/null, proven to be it (CVE-2025-31133)."""
    made = mount.open_tree(mount.AT_FDCWD, "/dev/null", mount.OPEN_TREE_CLONE)
    status = os.fstat(made)
    if not stat.S_ISCHR(status.st_mode) or status.st_rdev != os.makedev(1, 3):
        os.close(made)
        raise OSError(errno.ENODEV, "not the null device", "/dev/null")
    return made


def make_readonly(root: int, readonly: list[str]) -> None:
    """Make each path and what is mounted below it read-only. Absent ones are skipped."""
    for path in readonly:
        target = _existing(root, path)
        if target is None:
            continue
        try:
            made = mount.open_tree(target, "", mount.OPEN_TREE_CLONE | mount.AT_RECURSIVE)
            mount.mount_setattr(made, set=mount.MOUNT_ATTR_RDONLY, recursive=True)
            mount.move_mount(made, target)
            os.close(made)
        except OSError as error:
            raise from_os_error(f"cannot make {path} read-only", error) from error
        finally:
            os.close(target)


def _existing(root: int, path: str) -> int | None:
    try:
        return paths.open_in_root(root, path)
    except (FileNotFoundError, NotADirectoryError):
        return None
