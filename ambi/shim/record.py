"""`shim.json`: which process supervises an instance, written before the instance exists.

{"pid": int, "start_time": clock ticks as in field 22 of /proc/PID/stat, "version": protocol version}
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import NamedTuple

from ambi.linux.process import start_time

VERSION = 1  # of PROTOCOL.md
FILE = "shim.json"
SOCKET = "shim.sock"

Path = str | os.PathLike[str]


class ShimRecord(NamedTuple):
    pid: int
    start_time: int
    version: int

    def alive(self) -> bool:
        """Whether that very process still runs: a reused pid has another start time."""
        try:
            return start_time(self.pid) == self.start_time
        except (OSError, IndexError):
            return False


def write(run_dir: Path) -> ShimRecord:
    """Record the calling process; the file appears whole."""
    record = ShimRecord(os.getpid(), start_time(os.getpid()), VERSION)
    write_whole(os.path.join(run_dir, FILE), json.dumps(record._asdict()).encode())
    return record


def read(run_dir: Path) -> ShimRecord | None:
    """The record below `run_dir`, None when there is none that can be read."""
    try:
        with open(os.path.join(run_dir, FILE), "rb", buffering=0) as file:
            body = json.loads(file.read(4096))
        return ShimRecord(int(body["pid"]), int(body["start_time"]), int(body["version"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def living(run_root: Path) -> Iterator[ShimRecord]:
    """The shims that run below `run_root`."""
    instances = os.path.join(run_root, "instances")
    try:
        names = sorted(os.listdir(instances))
    except OSError:
        return
    for name in names:
        record = read(os.path.join(instances, name))
        if record is not None and record.alive():
            yield record


def write_whole(path: str, data: bytes) -> None:
    """Have `path` appear with `data` by rename; nothing of it is seen before."""
    beside = f"{path}.{os.getpid()}"
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)
    os.rename(beside, path)
