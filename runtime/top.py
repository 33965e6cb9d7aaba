"""Processes as `top` shows them, read from the host's /proc."""

from __future__ import annotations

import os
import pwd
from typing import Any

_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")


def describe(pids: list[int]) -> list[dict[str, Any]]:
    """One entry a living process of `pids`; the keys are those of ambi.core.driver.Created.processes."""
    boot_ns = _boot_time_ns()
    found = (_one(pid, boot_ns) for pid in pids)
    return [entry for entry in found if entry is not None]


def _boot_time_ns() -> int:
    with open("/proc/stat", "rb") as file:
        for line in file:
            if line.startswith(b"btime "):
                return int(line.split()[1]) * 1_000_000_000
    return 0


def _one(pid: int, boot_ns: int) -> dict[str, Any] | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            head, _, tail = file.read().rpartition(b")")
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            command = file.read().rstrip(b"\0").replace(b"\0", b" ")
        uid = os.stat(f"/proc/{pid}").st_uid
    except OSError:  # it has ended
        return None
    fields = tail.split()
    name = head.partition(b"(")[2].decode(errors="replace")
    return {
        "pid": pid,
        "ppid": int(fields[1]),
        "uid": uid,
        "user": _user_name(uid),
        "tty": _terminal_name(int(fields[4])),
        "stime_ns": boot_ns + int(fields[19]) * _TICK_NS,
        "cpu_ns": (int(fields[11]) + int(fields[12])) * _TICK_NS,
        "command": command.decode(errors="replace") or f"[{name}]",
    }


def _user_name(uid: int) -> str:
    """As the host calls it, which is what `ps` there would show."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _terminal_name(device: int) -> str:
    """`pts/3` for a pseudo terminal, `?` for none."""
    major, minor = os.major(device), os.minor(device)
    return f"pts/{minor + 256 * (major - 136)}" if 136 <= major <= 143 else "?"
