"""Which process has a port: by the inode of its socket (proc(5): /proc/net/tcp and /proc/PID/fd)."""

from __future__ import annotations

import os

_LISTEN = "0A"


def of(protocol: str, number: int) -> str:
    """`nginx (pid 812)`, or "" when it cannot be told."""
    inodes = {f"socket:[{inode}]" for family in ("", "6") for inode in _inodes(f"/proc/net/{protocol}{family}", number)}
    if not inodes:
        return ""
    for entry in os.listdir("/proc"):
        if entry.isdigit() and _has(entry, inodes):
            try:
                with open(f"/proc/{entry}/comm", encoding="utf-8", errors="replace") as file:
                    return f"{file.read().strip()} (pid {entry})"
            except OSError:  # it has ended meanwhile
                continue
    return ""


def _inodes(path: str, number: int) -> list[str]:
    found = []
    try:
        with open(path, encoding="ascii") as file:
            for line in list(file)[1:]:
                fields = line.split()
                if int(fields[1].rpartition(":")[2], 16) == number and (fields[3] == _LISTEN or "udp" in path):
                    found.append(fields[9])
    except OSError:  # this kernel has no such family
        pass
    return found


def _has(pid: str, inodes: set[str]) -> bool:
    try:
        return any(os.readlink(f"/proc/{pid}/fd/{fd}") in inodes for fd in os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return False
