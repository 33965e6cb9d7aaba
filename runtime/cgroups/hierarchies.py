"""Which cgroup hierarchies are mounted where, taken from mountinfo(5) and not from names."""

from __future__ import annotations

import os
from typing import NamedTuple

_V1_FLAGS = frozenset(("rw", "ro", "noprefix", "clone_children", "xattr", "cpuset_v2_mode", "favordynmods"))


class Hierarchy(NamedTuple):
    """One version 1 hierarchy: where it is mounted and what it controls (`("cpu", "cpuacct")`, `("name=systemd",)`)."""

    mount: str
    controllers: tuple[str, ...]


class Hierarchies(NamedTuple):
    """All of them. `v1` is empty on a pure version 2 host, `v2` is "" where no unified tree is mounted."""

    v1: tuple[Hierarchy, ...]
    v2: str

    def of(self, controller: str) -> str | None:
        """Where the version 1 hierarchy of `controller` is mounted."""
        for hierarchy in self.v1:
            if controller in hierarchy.controllers:
                return hierarchy.mount
        return None

    @property
    def mode(self) -> str:
        """`v1`, `v2`, `hybrid` (controllers in version 1, an empty unified tree beside) or `none`."""
        if self.v1:
            return "hybrid" if self.v2 else "v1"
        return "v2" if self.v2 else "none"


def read_mounts(mountinfo: str) -> Hierarchies:
    """From the text of /proc/self/mountinfo; the first mount of a hierarchy counts."""
    v1: dict[tuple[str, ...], str] = {}
    v2 = ""
    for line in mountinfo.splitlines():
        fields, _, tail = line.partition(" - ")
        kind, _, options = (tail.split(" ") + ["", ""])[:3]
        if kind == "cgroup2" and not v2:
            v2 = fields.split(" ")[4]
        elif kind == "cgroup":
            named = [o for o in options.split(",") if o not in _V1_FLAGS and not o.startswith("release_agent")]
            v1.setdefault(tuple(named), fields.split(" ")[4])
    return Hierarchies(tuple(Hierarchy(mount, names) for names, mount in v1.items()), v2)


def write(directory: str, name: str, value: str) -> None:
    """Write a control file; the OSError names it."""
    path = f"{directory}/{name}"
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} (writing {value!r})", path) from None
    finally:
        os.close(fd)


def read(directory: str, name: str) -> str:
    """A control file as text, "" when the file or the group is gone."""
    try:
        fd = os.open(f"{directory}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return os.read(fd, 1 << 20).decode()
    except OSError:  # ENODEV: removed while open
        return ""
    finally:
        os.close(fd)


def read_number(directory: str, name: str) -> int:
    """A control file with one number; 0 when it is gone or says `max`."""
    text = read(directory, name).strip()
    return int(text) if text.isdecimal() else 0


def read_table(directory: str, name: str) -> dict[str, int]:
    """A control file of `KEY NUMBER` lines."""
    rows = (line.split(" ", 1) for line in read(directory, name).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdecimal()}


def below(directory: str) -> list[str]:
    """`directory` and all groups below it, children before their parents."""
    try:
        names = [entry.name for entry in os.scandir(directory) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    found = [path for name in names for path in below(f"{directory}/{name}")]
    return [*found, directory]
