"""The namespaces of a run that are not its own: taken with `start`, given to the driver as paths, handed out to others."""

from __future__ import annotations

import os
from typing import Any

from ambi.core.deadline import Deadline
from ambi.core.driver import Created
from ambi.core.errors import InvalidRequest, NotFound, from_os_error
from ambi.core.plan import LaunchPlan
from ambi.linux import unix

KINDS = {"network": "net", "pid": "pid", "ipc": "ipc", "mount": "mnt"}  # by OCI's name: the name in /proc/PID/ns

SHARED_MEMORY = "/dev/shm"


def taken(request: dict[str, Any], message: unix.Message) -> dict[str, int]:
    """The descriptors that came with a start, by kind: those of `namespaces`, by default the network alone. That of `mount`
    is not to be in, but to have shared memory from.

    Raises InvalidRequest for others and for more; the message still owns its descriptors then.
    """
    kinds = request.get("namespaces", ["network"] if message.fds else [])
    if not isinstance(kinds, list) or not set(kinds) <= set(KINDS) or not len(kinds) == len(set(kinds)) == len(message.fds):
        raise InvalidRequest(
            f"'start' wants a descriptor for each of its namespaces, not {len(message.fds)} for {kinds!r:.80}"
        )
    found = dict(zip(kinds, message.fds, strict=True))
    message.fds.clear()
    return found


def given(plan: LaunchPlan, fds: dict[str, int]) -> LaunchPlan:
    """`plan` with `fds` as the paths of its namespaces, by names that are good in any process below this one too."""
    if not fds:
        return plan
    linux = plan.config["linux"]
    names = {kind: f"/proc/{os.getpid()}/fd/{fd}" for kind, fd in fds.items()}
    origin = names.pop("mount", None)
    namespaces = [entry for entry in linux.get("namespaces") or () if entry.get("type") not in names]
    namespaces += [{"type": kind, "path": name} for kind, name in names.items()]
    mounts = plan.config.get("mounts") or []
    if origin is not None:  # a container has its own, with the other's memory in it
        mounts = [_shared(entry, origin) if entry["destination"] == SHARED_MEMORY else entry for entry in mounts]
    return plan._replace(config={**plan.config, "mounts": mounts, "linux": {**linux, "namespaces": namespaces}})


def _shared(entry: dict[str, Any], origin: str) -> dict[str, Any]:
    """The mount of shared memory as that of the container whose mount namespace is at `origin`; a volume of the
    user's stays as it is."""
    if entry.get("type") != "tmpfs":
        return entry
    words = ["bind", "nosuid", "noexec", "nodev", f"ambi.of={origin}"]
    return {"destination": SHARED_MEMORY, "type": "bind", "source": SHARED_MEMORY, "options": words}


def opened(kind: str, fd: int | None, pid: int | None) -> int:
    """A descriptor of the namespace `fd`, or of the one that process `pid` of a container is in. The caller closes it.

    pid: None where it is a guest's. Raises NotFound when there is neither, InvalidRequest.
    """
    if kind not in KINDS:
        raise InvalidRequest(f"no namespace of kind {kind!r:.40} is handed out")
    if fd is not None:
        return os.dup(fd)
    if pid is None:
        raise NotFound(f"the instance has no {kind} namespace")
    try:
        return os.open(f"/proc/{pid}/ns/{KINDS[kind]}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise from_os_error(f"the instance has no {kind} namespace", error) from error


def plug(created: Created, name: str, by: Deadline) -> None:
    """Tell a workload that does not see the namespace itself of the interface `name`."""
    _check(name)
    tell: Any = getattr(created, "plug_nic", None)
    if tell is not None:
        tell(name, by)


def unplug(created: Created, name: str, by: Deadline) -> None:
    """The same before it goes."""
    _check(name)
    tell: Any = getattr(created, "unplug_nic", None)
    if tell is not None:
        tell(name, by)


def _check(name: str) -> None:
    if not 0 < len(name) < 16 or "/" in name or name in (".", ".."):
        raise NotFound(f"no interface can be called {name!r:.40}")
