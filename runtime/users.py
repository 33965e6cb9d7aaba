"""Who the process is: `NAME|UID[:GROUP|GID]` looked up in the container's own /etc/passwd and /etc/group.

Both files are hostile: bounded in size, regular, and a line that makes no sense is skipped.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ambi.core.errors import InvalidRequest
from ambi.linux import paths

_HIGHEST = (1 << 31) - 1  # docker's limit; the kernel reserves 2^32 - 1


class Identity(NamedTuple):
    """`home` is "" when the user is not in passwd. `groups` has `gid` as well: else a process that changes its group would
    escape what the group is denied (CVE-2022-36109)."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


class _Person(NamedTuple):
    name: str
    uid: int
    gid: int
    home: str


class _Group(NamedTuple):
    name: str
    gid: int
    members: tuple[str, ...]


def identify(root: int, user: dict[str, Any]) -> Identity:
    """The identity that `process.user` asks for, in the root that is open as `root`."""
    written = user.get("username") or ""
    names = user.get("additionalGroups") or ()
    groups = _groups(root) if written or names else []
    extra = (*(user.get("additionalGids") or ()), *(_additional(name, groups) for name in names))
    people = _people(root)
    if not written:
        uid = user.get("uid") or 0
        home = next((p.home for p in people if p.uid == uid), "")
        gid = user.get("gid") or 0
        return Identity(uid, gid, tuple(dict.fromkeys((*extra, gid))), home)
    name, _, group = written.partition(":")
    person = _find_person(name, people)
    gid = _find_group(group, groups) if group else person.gid
    memberships = () if group or not person.name else tuple(g.gid for g in groups if person.name in g.members)
    return Identity(person.uid, gid, tuple(dict.fromkeys((*memberships, *extra, gid))), person.home)


def _find_person(written: str, people: list[_Person]) -> _Person:
    number = _number(written)
    for person in people:
        if person.name == written or (number is not None and person.uid == number):
            return person
    if number is None and written:
        raise InvalidRequest(
            f"unable to find user {written}: no matching entries in passwd file",
            hint="give a number, or a name in the image's /etc/passwd",
        )
    return _Person("", number or 0, 0, "")


def _find_group(written: str, groups: list[_Group]) -> int:
    number = _number(written)
    for group in groups:
        if group.name == written:
            return group.gid
    if number is None:
        raise InvalidRequest(
            f"unable to find group {written}: no matching entries in group file",
            hint="give a number, or a name in the image's /etc/group",
        )
    return number


def _additional(name: str, groups: list[_Group]) -> int:
    """The group of --group-add NAME, with docker's words when there is none."""
    for group in groups:
        if group.name == name:
            return group.gid
    raise InvalidRequest(
        f"Unable to find group {name}: no matching entries in group file",
        hint="give a number, or a name in the image's /etc/group",
    )


def _number(text: str) -> int | None:
    """`text` as an id; InvalidRequest when it is a number outside what docker takes."""
    if not text.isascii() or not text.isdigit():
        return None
    value = int(text) if len(text) < 20 else _HIGHEST + 1
    if value > _HIGHEST:
        raise InvalidRequest(f"uids and gids must be in range 0-{_HIGHEST}: {text}", hint="give a smaller number, or a name")
    return value


def _lines(root: int, path: str, fields: int) -> list[list[str]]:
    try:
        text = paths.read_in_root(root, path).decode("utf-8", "replace")
    except OSError:
        return []
    return [row for row in (line.split(":") for line in text.split("\n")) if len(row) >= fields]


def _people(root: int) -> list[_Person]:
    found = []
    for row in _lines(root, "/etc/passwd", 6):
        if row[2].isdecimal() and row[3].isdecimal() and len(row[2]) < 11 and len(row[3]) < 11:
            found.append(_Person(row[0], int(row[2]), int(row[3]), row[5]))
    return found


def _groups(root: int) -> list[_Group]:
    found = []
    for row in _lines(root, "/etc/group", 4):
        if row[2].isdecimal() and len(row[2]) < 11:
            found.append(_Group(row[0], int(row[2]), tuple(m.strip() for m in row[3].split(","))))
    return found
