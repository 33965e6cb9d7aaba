"""`doctor`: what this host can do, and the fix where it cannot."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ambi.core.errors import AmbiError
from ambi.core.model import Isolation
from ambi.engine.core import Core
from ambi.engine.types import Check
from ambi.linux import capabilities
from ambi.network import checks as network_checks
from ambi.shim import drivers

_FREE_BYTES = 1 << 30


def checks(core: Core) -> tuple[Check, ...]:
    """One line each, in the order of a start: host, storage, drivers."""
    found = [_kernel(), _cgroups(), _capabilities(), _disk(core), _layers(core), _zygote(core)]
    for isolation in Isolation:
        found.extend(_driver(isolation))
    found.extend(Check(*finding) for finding in network_checks.checks())
    return tuple(found)


def cgroup_version() -> int:
    """2 when the unified hierarchy has the controllers, else 1."""
    try:
        return 2 if "memory" in Path("/sys/fs/cgroup/cgroup.controllers").read_text().split() else 1
    except OSError:
        return 1


def _kernel() -> Check:
    name = os.uname()
    if name.machine != "x86_64":
        return Check("kernel", "problem", f"{name.release} on {name.machine}", "ambi runs on x86-64 alone")
    major, minor = (int(x) for x in name.release.split(".")[:2])
    if (major, minor) < (5, 12):
        return Check("kernel", "problem", f"Linux {name.release}", "install Linux 5.12 or newer (mount_setattr)")
    return Check("kernel", "ok", f"Linux {name.release}")


def _cgroups() -> Check:
    if cgroup_version() == 2:
        return Check("cgroups", "ok", "version 2")
    if os.path.isdir("/sys/fs/cgroup/memory"):
        return Check("cgroups", "ok", "version 1")
    hint = "mount -t cgroup2 none /sys/fs/cgroup"
    return Check("cgroups", "problem", "no memory controller below /sys/fs/cgroup", hint)


def _capabilities() -> Check:
    held = set(capabilities.names_of(capabilities.permitted()))
    missing = [name for name in capabilities.NAMES[:38] if name not in held]
    if "CAP_SYS_ADMIN" in missing:
        return Check("capabilities", "problem", "CAP_SYS_ADMIN is missing", "run the engine as root")
    if missing:
        detail = f"without {', '.join(missing)}; --privileged instances do without them as well"
        return Check("capabilities", "warning", detail)
    return Check("capabilities", "ok", "all")


def _disk(core: Core) -> Check:
    free = shutil.disk_usage(core.roots.data).free
    detail = f"{free >> 20} MiB free below {core.roots.data}"
    if free < _FREE_BYTES:
        return Check("disk", "warning", detail, "free space, or move the data root: ambi --data-root DIRECTORY")
    return Check("disk", "ok", detail)


def _layers(core: Core) -> Check:
    try:
        form, why = core.store.layer_form()
    except AmbiError as error:
        return Check("layer form", "problem", error.message, error.hint or "")
    if form == "erofs":
        return Check("layer form", "ok", f"erofs: {why}")
    return Check("layer form", "warning", f"{form}: {why}", "modprobe erofs")


def _zygote(core: Core) -> Check:
    try:
        return Check("zygote", "ok", f"pid {core.shims.zygote_pid()}")
    except AmbiError as error:
        hint = error.hint or f"see {core.roots.run}/zygote.log"
        return Check("zygote", "problem", error.message, hint)


def _driver(isolation: Isolation) -> list[Check]:
    name = f"driver {isolation.value}"
    try:
        features = drivers.load(isolation.value).probe()
    except AmbiError as error:
        return [Check(name, "problem", error.message, error.hint or "")]
    if features.problem is not None:
        return [Check(name, "problem", features.problem.message, features.problem.hint or "")]
    details = [Check(f"{isolation.value} {key}", "ok", value) for key, value in features.details.items()]
    return [Check(name, "ok", "usable"), *details]
