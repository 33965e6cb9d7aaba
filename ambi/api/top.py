"""`docker top`: ps(1)'s table from what the driver tells of each process, the same for a container and a VM.

ps itself never runs: it could not look into a guest, and inside a container there may be none. So of its options only
the usual forms are known: `-ef`, `aux` and `-o` with a list of columns.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from typing import Any

from ambi.core.errors import InvalidRequest

Process = dict[str, Any]  # pid, ppid, uid, user, tty, stime_ns, cpu_ns, command


def _started(process: Process) -> str:
    """ps's STIME: the hour today, the day otherwise."""
    at, now = time.localtime(process["stime_ns"] / 1e9), time.localtime()
    return time.strftime("%H:%M" if tuple(at)[:3] == tuple(now)[:3] else "%b%d", at)


def _cpu_time(process: Process) -> str:
    minutes, seconds = divmod(process["cpu_ns"] // 1_000_000_000, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{seconds:02}"


def _cpu_percent(process: Process) -> int:
    alive_ns = time.time_ns() - process["stime_ns"]
    return min(99, process["cpu_ns"] * 100 // alive_ns) if alive_ns > 0 else 0


def _user(process: Process) -> str:
    return str(process.get("user") or process["uid"])


def _name(process: Process) -> str:
    return os.path.basename(str(process["command"]).split(" ", 1)[0])


_COLUMNS: dict[str, tuple[str, Callable[[Process], object]]] = {
    "user": ("USER", _user),
    "uid": ("UID", lambda p: p["uid"]),
    "pid": ("PID", lambda p: p["pid"]),
    "ppid": ("PPID", lambda p: p["ppid"]),
    "c": ("C", _cpu_percent),
    "stime": ("STIME", _started),
    "start": ("STARTED", _started),
    "tty": ("TT", lambda p: p["tty"] or "?"),
    "tt": ("TT", lambda p: p["tty"] or "?"),
    "time": ("TIME", _cpu_time),
    "cmd": ("CMD", lambda p: p["command"]),
    "args": ("COMMAND", lambda p: p["command"]),
    "command": ("COMMAND", lambda p: p["command"]),
    "comm": ("COMMAND", _name),
}
_FULL = (
    ("UID", _user), ("PID", _COLUMNS["pid"][1]), ("PPID", _COLUMNS["ppid"][1]), ("C", _cpu_percent), ("STIME", _started),
    ("TTY", _COLUMNS["tty"][1]), ("TIME", _cpu_time), ("CMD", _COLUMNS["cmd"][1]),
)  # fmt: skip
_BSD = (
    ("USER", _user), ("PID", _COLUMNS["pid"][1]), ("START", _started), ("TIME", _cpu_time), ("COMMAND", _COLUMNS["cmd"][1]),
)  # fmt: skip


def table(processes: Iterable[Process], ps_args: str) -> tuple[list[str], list[list[str]]]:
    """The titles, and a row a process, for `ps_args`. Raises InvalidRequest for options that are not known."""
    columns = _columns(ps_args)
    return [title for title, _ in columns], [[str(cell(p)) for _, cell in columns] for p in processes]


def _columns(ps_args: str) -> tuple[tuple[str, Callable[[Process], object]], ...]:
    words = ps_args.split()
    if words in (["-ef"], ["ef"], ["-e", "-f"], ["-eF"]):
        return _FULL
    if words in (["aux"], ["-aux"], ["auxw"], ["auxww"]):
        return _BSD
    chosen: list[tuple[str, Callable[[Process], object]]] = []
    rest = iter(words)
    for word in rest:
        names = next(rest, "") if word in ("o", "-o") else word[2:] if word.startswith("-o") else None
        if not names or any(name not in _COLUMNS for name in names.split(",")):
            known = ",".join(_COLUMNS)
            raise InvalidRequest(f"ps options {ps_args!r} are not known", hint=f"use -ef, aux or -o with some of {known}")
        chosen += [_COLUMNS[name] for name in names.split(",")]
    return tuple(chosen)
