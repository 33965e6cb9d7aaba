"""The nouns that every part shares. Values only: no behaviour beyond conversion, standard library only."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple, NewType

InstanceId = NewType("InstanceId", str)  # 64 lower-case hexadecimal digits
ExecId = NewType("ExecId", str)  # the same form
Digest = NewType("Digest", str)  # "sha256:" and 64 lower-case hexadecimal digits


class Workload(str, Enum):
    """What runs: an image and its process, or a disk that boots itself. A machine is always a VM."""

    OCI = "oci"
    MACHINE = "machine"


class Isolation(str, Enum):
    CONTAINER = "container"
    VM = "vm"


class Status(str, Enum):
    """The states of an instance, in Docker's words."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    RESTARTING = "restarting"
    REMOVING = "removing"
    EXITED = "exited"
    DEAD = "dead"


class ExitStatus(NamedTuple):
    """How a process ended.

    code: 0-255 as docker reports it: the exit code, or 128 + signal.
    reason: one line when something other than the workload ended it ("the VMM died", "killed with its shim"), else "".
    oom_killed: the kernel killed a process of the instance for memory while it ran.
    finished_ns: wall clock, nanoseconds since the epoch.
    """

    code: int
    reason: str = ""
    oom_killed: bool = False
    finished_ns: int = 0


class Usage(NamedTuple):
    """What an instance uses now; a VM's figures are those of its guest where the guest knows better."""

    cpu_ns: int
    cpu_user_ns: int
    cpu_system_ns: int
    memory_bytes: int
    memory_cache_bytes: int  # reclaimable page cache inside memory_bytes
    memory_limit_bytes: int  # 0: none
    pids: int
    oom_kills: int
    block_read_bytes: int = 0
    block_write_bytes: int = 0


GUEST_OVERHEAD_BYTES = 96 << 20  # what kernel and agent of a guest take beside the workload's limit


class VmShape(NamedTuple):
    """What a VM needs and config.json has no words for.

    kernel: version directory below the guest root (`6.1.0-40-cloud-amd64`), "" for the newest.
    disk_bytes: size of the writable disk, sparse.
    """

    vcpus: int = 1
    memory_bytes: int = 256 << 20
    kernel: str = ""
    disk_bytes: int = 10 << 30


class IdRange(NamedTuple):
    """One line of a user namespace map."""

    inside: int
    outside: int
    size: int


class IdMap(NamedTuple):
    uids: tuple[IdRange, ...]
    gids: tuple[IdRange, ...]
