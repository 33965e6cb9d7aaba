"""What of ours exists on this machine now: mounts, cgroups, links, loop devices, processes, namespaces.

`take(mark)` looks for processes whose environment carries AMBI_TEST_SESSION=`mark` (every process of ours inherits it from
the test that started the engine), for the namespaces that such processes hold, and for kernel objects with our name.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

MARK_VARIABLE = "AMBI_TEST_SESSION"
TAG_LETTERS = 4
NAMESPACES = ("mnt", "pid", "net", "uts", "ipc", "cgroup", "user")

Census = dict[str, frozenset[str]]


def take(mark: str) -> Census:
    pids = list(_marked(mark))
    return {
        "processes": frozenset(f"{pid} {_name(pid)}" for pid in pids),
        "namespaces": frozenset(_foreign_namespaces(pids)),
        "mounts": frozenset(line for line in _mounts() if not _is_elsewhere(line, mark)),
        "cgroups": frozenset(path for path in _cgroups() if not _is_foreign(path, mark)),
        "links": frozenset(n for n in os.listdir("/sys/class/net") if n.startswith(("ambi", "tap", "veth"))),
        "loops": frozenset(line for line in _loops() if not _is_elsewhere(line, mark)),
    }


def settle(mark: str, before: Census, seconds: float = 10) -> dict[str, list[str]]:
    """What is there more than `before`, and stays until `seconds` have passed; {} is clean.

    What comes or goes meanwhile is another session's, or on its way out.
    """
    end = time.monotonic() + seconds
    stays = _more(take(mark), before)
    while any(stays.values()) and time.monotonic() < end:
        time.sleep(0.2)
        now = _more(take(mark), before)
        stays = {kind: names & now[kind] for kind, names in stays.items()}
    return {kind: sorted(names) for kind, names in stays.items() if names}


def _more(now: Census, before: Census) -> Census:
    return {kind: now[kind] - before[kind] for kind in now}


def temporary_prefix(mark: str) -> str:
    """How the names of a session's directories below /tmp begin; by it, other sessions tell what is mounted there."""
    return f"ambi-{mark[:TAG_LETTERS]}-"


def _is_elsewhere(text: str, mark: str) -> bool:
    """Whether a mount or loop device is in the temporary directory of another session."""
    tag = re.search(rf"/tmp/ambi-([0-9a-f]{{{TAG_LETTERS}}})-", text)
    return tag is not None and tag[1] != mark[:TAG_LETTERS]


def _marked(mark: str) -> Iterator[int]:
    needle = f"{MARK_VARIABLE}={mark}".encode()
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            try:
                environment = Path("/proc", entry, "environ").read_bytes()
            except OSError:
                continue
            if needle in environment.split(b"\0") and _state(int(entry)) != "Z":
                yield int(entry)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()[:120]
    except OSError:
        return "?"


def _foreign_namespaces(pids: list[int]) -> Iterator[str]:
    """Namespaces of `pids` that this process is not in."""
    mine = {os.readlink(f"/proc/self/ns/{kind}") for kind in NAMESPACES}
    for pid in pids:
        for kind in NAMESPACES:
            try:
                name = os.readlink(f"/proc/{pid}/ns/{kind}")
            except OSError:
                continue
            if name not in mine:
                yield name


def _mounts() -> Iterator[str]:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if "ambi" in line:
            fields = line.split()
            yield f"{fields[4]} {line.partition(' - ')[2]}"


def _cgroups() -> Iterator[str]:
    for top, folders, _ in os.walk("/sys/fs/cgroup"):
        for folder in folders:
            if "ambi" in folder:
                if folder != "ambi":  # the parent of all engines' groups: the last clean end removes it, a kill -9 cannot
                    yield os.path.join(top, folder)
                for below, deeper, _ in os.walk(os.path.join(top, folder)):
                    yield from (os.path.join(below, name) for name in deeper)


def _is_foreign(group: str, mark: str) -> bool:
    """Whether a living shim or zygote of another session is above the processes of `group`; an empty one counts as ours.

    Those of tests/driverkit.py and runtime/park.py are named after the process that made them.
    """
    maker = re.fullmatch(r"(?:test|park)-(\d+)(?:-\d+)?", os.path.basename(group))
    if maker and int(maker[1]) != os.getpid() and os.path.exists(f"/proc/{maker[1]}"):
        return True
    for _, folders, files in os.walk(group):
        if folders or "cgroup.procs" not in files:
            continue
        try:
            pids = Path(group, "cgroup.procs").read_text().split()
        except OSError:
            return True  # gone
        return bool(pids) and all(_owner(int(pid)) not in (None, mark) for pid in pids)
    return False


def _owner(pid: int) -> str | None:
    """The mark of the nearest process at or above `pid` that has one, "" below one of ours without; None for neither."""
    needle = f"{MARK_VARIABLE}=".encode()
    while pid > 1:
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            mark = next((x[len(needle) :].decode() for x in environment if x.startswith(needle)), None)
            if mark is not None:
                return mark
            if Path(f"/proc/{pid}/comm").read_text().startswith("ambi-"):
                return ""
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return None
    return None


def _loops() -> Iterator[str]:
    for device in Path("/sys/block").glob("loop*"):
        backing = device / "loop" / "backing_file"
        if backing.exists():
            yield f"{device.name} {backing.read_text().strip()}"
