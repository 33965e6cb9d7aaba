"""The network namespace of a run: taken with `start`, given to the driver as a path, handed out to later engines."""

from __future__ import annotations

import os
from typing import Any

from ambi.core.deadline import Deadline
from ambi.core.driver import Created
from ambi.core.errors import InvalidRequest, NotFound, from_os_error
from ambi.core.plan import LaunchPlan
from ambi.linux import unix


def taken(message: unix.Message) -> int | None:
    """The descriptor that came with a start, None without. Raises InvalidRequest for more than one."""
    if len(message.fds) > 1:
        raise InvalidRequest(f"'start' wants at most one descriptor, not {len(message.fds)}")
    return message.fds.pop() if message.fds else None


def given(plan: LaunchPlan, fd: int | None) -> LaunchPlan:
    """`plan` with `fd` as the path of its network namespace, by a name that is good in any process below this one too."""
    if fd is None:
        return plan
    linux = plan.config["linux"]
    path = f"/proc/{os.getpid()}/fd/{fd}"
    namespaces = [entry for entry in linux.get("namespaces") or () if entry.get("type") != "network"]
    namespaces.append({"type": "network", "path": path})
    return plan._replace(config={**plan.config, "linux": {**linux, "namespaces": namespaces}})


def opened(fd: int | None, pid: int | None) -> int:
    """A descriptor of the namespace `fd`, or of the one that process `pid` of a container is in. The caller closes it.

    pid: None where it is a guest's. Raises NotFound when there is neither.
    """
    if fd is not None:
        return os.dup(fd)
    if pid is None:
        raise NotFound("the instance has no network namespace")
    try:
        return os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise from_os_error("the instance has no network namespace", error) from error


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
