"""From a launch plan to the words of the guest protocol. Values only; `validate.py` says what a VM cannot do."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

from ambi.core.errors import InvalidRequest
from ambi.core.model import VmShape
from ambi.core.plan import Directory, LaunchPlan, Layers
from ambi.linux import capabilities
from hyper.guest.protocol import FileTag, Items, MountTag, ProcessTag, SetupTag, SysctlTag, Value
from hyper.vm.cgroup import Limits
from hyper.vm.disk import Volume
from hyper.vm.share import BINDS_TAG, ROOT_TAG, Bind

INIT_ANNOTATION = "ambi.init"
DISPOSABLE_ANNOTATION = "ambi.disposable"
DISK = "ambi.disk"  # a type of mounts; COPY and SUBPATH are options, see ambi.core.plan
COPY = "ambi.copy"
SUBPATH = "ambi.subpath="
CAPABILITY_TAGS = {
    "bounding": ProcessTag.BOUNDING,
    "effective": ProcessTag.EFFECTIVE,
    "permitted": ProcessTag.PERMITTED,
    "inheritable": ProcessTag.INHERITABLE,
    "ambient": ProcessTag.AMBIENT,
}


def is_bind(mount: dict[str, Any]) -> bool:
    options = mount.get("options") or ()
    return mount.get("type") == "bind" or "bind" in options or "rbind" in options


def binds(plan: LaunchPlan) -> tuple[Bind, ...]:
    """The bind mounts of the plan, named by their place among its mounts."""
    found = []
    for number, mount in enumerate(plan.config.get("mounts") or ()):
        if is_bind(mount):
            found.append(bind(str(number), mount))
    return tuple(found)


def bind(name: str, mount: dict[str, Any]) -> Bind:
    """A bind mount as an entry `name` of the shared tree."""
    options = mount.get("options") or ()
    readonly = "ro" in options or "rro" in options
    subpath = next((word.removeprefix(SUBPATH) for word in options if word.startswith(SUBPATH)), "")
    return Bind(name, Path(mount["source"]), readonly, "bind" not in options, subpath, COPY in options)


def volumes(plan: LaunchPlan) -> tuple[Volume, ...]:
    """The disks of the plan's mounts, named by their place among them."""
    return tuple(
        Volume(f"volume{number}", Path(mount["source"]), "ro" in (mount.get("options") or ()))
        for number, mount in enumerate(plan.config.get("mounts") or ())
        if mount.get("type") == DISK
    )


def setup(plan: LaunchPlan) -> Items:
    """The fields of SETUP."""
    config = plan.config
    linux = config.get("linux") or {}
    items: list[tuple[int, Value]] = [
        (SetupTag.HOSTNAME, config.get("hostname") or plan.id[:12]),
        (SetupTag.READ_ONLY, int(bool((config.get("root") or {}).get("readonly")))),
    ]
    if config.get("domainname"):
        items.append((SetupTag.DOMAINNAME, config["domainname"]))
    if isinstance(plan.rootfs, Layers):
        items += [(SetupTag.LAYERS, len(plan.rootfs.lowers)), (SetupTag.DISK, 1)]
    else:
        items.append((SetupTag.ROOT_TAG, ROOT_TAG))
    items += [(SetupTag.MOUNT, _mount(n, mount)) for n, mount in enumerate(config.get("mounts") or ())]
    items += [(SetupTag.COPY, m["destination"]) for m in config.get("mounts") or () if COPY in (m.get("options") or ())]
    items += [(SetupTag.FILE, _file(f.path, f.mode, f.content)) for f in plan.files]
    items += [(SetupTag.MASKED, path) for path in linux.get("maskedPaths") or ()]
    items += [(SetupTag.READ_ONLY_PATH, path) for path in linux.get("readonlyPaths") or ()]
    for key, value in (linux.get("sysctl") or {}).items():
        items.append((SetupTag.SYSCTL, ((SysctlTag.KEY, key), (SysctlTag.VALUE, value))))
    items += _limits(linux.get("resources") or {})
    if (config.get("annotations") or {}).get(INIT_ANNOTATION) == "1":
        items.append((SetupTag.INIT, 1))
    return items


def disposable(plan: LaunchPlan) -> bool:
    """Whether nothing that the guest has not written yet is of use to anybody: neither its disk nor a shared tree."""
    annotations = plan.config.get("annotations") or {}
    return annotations.get(DISPOSABLE_ANNOTATION) == "1" and not shares(plan) and not volumes(plan)


def may_mount(plan: LaunchPlan) -> bool:
    """Whether the workload could mount file systems of the guest's kernel that no plan mounts, such as tracefs."""
    sets = plan.config["process"].get("capabilities") or {}
    return any("CAP_SYS_ADMIN" in (names or ()) for names in sets.values())


def _mount(number: int, mount: dict[str, Any]) -> Items:
    if is_bind(mount):
        return mount_items(mount, str(number))
    return mount_items(mount, f"volume{number}" if mount.get("type") == DISK else mount.get("source") or mount.get("type"))


def mount_items(mount: dict[str, Any], source: str | None) -> Items:
    """The fields of a MOUNT. source: the name of a bind in the shared tree, the serial number of a disk, else its own."""
    kind = "bind" if is_bind(mount) else mount.get("type") or "none"
    source = source or kind
    items: list[tuple[int, Value]] = [
        (MountTag.DESTINATION, mount["destination"]),
        (MountTag.TYPE, kind),
        (MountTag.SOURCE, source),
    ]
    options = [word for word in mount.get("options") or () if word != COPY and not word.startswith(SUBPATH)]
    return items + [(MountTag.OPTION, option) for option in options]


def _file(path: object, mode: int, content: str) -> Items:
    return ((FileTag.PATH, str(path)), (FileTag.MODE, mode), (FileTag.CONTENT, content))


def _limits(resources: dict[str, Any]) -> list[tuple[int, Value]]:
    memory, cpu, pids = (resources.get(name) or {} for name in ("memory", "cpu", "pids"))
    pairs = (
        (SetupTag.MEMORY, memory.get("limit")),
        (SetupTag.CPU_QUOTA, cpu.get("quota")),
        (SetupTag.CPU_PERIOD, cpu.get("period")),
        (SetupTag.PIDS, pids.get("limit")),
        (SetupTag.CPU_SHARES, cpu.get("shares")),
    )
    return [(tag, value) for tag, value in pairs if value and value > 0]


def shape(plan: LaunchPlan) -> VmShape:
    return plan.vm or VmShape()


def memory_limit(plan: LaunchPlan, more: int = 0) -> int:
    """What the workload may use: its own limit, or all that the VM has. more: bytes beyond what it booted with."""
    memory = ((plan.config.get("linux") or {}).get("resources") or {}).get("memory") or {}
    limit = memory.get("limit") or 0
    most = shape(plan).memory_bytes + more
    return min(limit, most) if limit > 0 else most


def cpu_limits(plan: LaunchPlan) -> Limits:
    """The same quota for the VMM as for the workload in the guest, which might not keep to it."""
    cpu = ((plan.config.get("linux") or {}).get("resources") or {}).get("cpu") or {}
    quota = cpu.get("quota") or 0
    return Limits(cpu_quota_us=max(-1, quota), cpu_period_us=cpu.get("period") or 100_000)


def process(body: dict[str, Any], config: dict[str, Any], *, stdin: bool) -> Items:
    """The fields of PROCESS, of an OCI process object. Raises InvalidRequest for what it does not understand."""
    items: list[tuple[int, Value]] = [(ProcessTag.ARG, arg) for arg in body.get("args") or ()]
    if not items:
        raise InvalidRequest("process.args is empty")
    items += [(ProcessTag.ENV, entry) for entry in body.get("env") or ()]
    items.append((ProcessTag.CWD, body.get("cwd") or "/"))
    items += _user(body.get("user") or {})
    terminal = bool(body.get("terminal"))
    items += [(ProcessTag.TERMINAL, int(terminal)), (ProcessTag.STDIN, int(stdin or terminal))]
    size = body.get("consoleSize") or {}
    if size:
        items += [(ProcessTag.ROWS, size["height"]), (ProcessTag.COLUMNS, size["width"])]
    items += _privileges(body, config)
    items += [(ProcessTag.RLIMIT, _rlimit(entry)) for entry in body.get("rlimits") or ()]
    if body.get("oomScoreAdj") is not None:
        items.append((ProcessTag.OOM_SCORE_ADJ, body["oomScoreAdj"]))
    return items


def _user(user: dict[str, Any]) -> list[tuple[int, Value]]:
    name = user.get("username")
    items: list[tuple[int, Value]] = (
        [(ProcessTag.USER, name)] if name else [(ProcessTag.UID, user.get("uid", 0)), (ProcessTag.GID, user.get("gid", 0))]
    )
    items += [(ProcessTag.GROUP, gid) for gid in user.get("additionalGids") or ()]
    items += [(ProcessTag.GROUP_NAME, group) for group in user.get("additionalGroups") or ()]
    if user.get("umask") is not None:
        items.append((ProcessTag.UMASK, user["umask"]))
    return items


def _privileges(body: dict[str, Any], config: dict[str, Any]) -> list[tuple[int, Value]]:
    items: list[tuple[int, Value]] = []
    sets = body.get("capabilities")
    if sets is not None:
        for name, tag in CAPABILITY_TAGS.items():
            try:
                items.append((tag, capabilities.mask_of(sets.get(name) or ())))
            except ValueError as error:
                raise InvalidRequest(str(error)) from error
    items.append((ProcessTag.NO_NEW_PRIVS, int(bool(body.get("noNewPrivileges")))))
    profile = (config.get("linux") or {}).get("seccomp")
    if profile:
        from ambi.linux import seccomp  # big tables: loaded where they are used

        items.append((ProcessTag.SECCOMP, seccomp.compile(profile)))
    return items


def _rlimit(entry: dict[str, Any]) -> Items:
    number = getattr(resource, entry["type"], None)
    if not isinstance(number, int) or not entry["type"].startswith("RLIMIT_"):
        raise InvalidRequest(f"no resource limit is called {entry['type']}")
    return ((1, number), (2, entry["soft"]), (3, entry["hard"]))


def shares(plan: LaunchPlan) -> tuple[str, ...]:
    """The tags of the trees that the plan needs by virtiofs."""
    tags = [ROOT_TAG] if isinstance(plan.rootfs, Directory) else []
    return (*tags, BINDS_TAG) if binds(plan) else tuple(tags)
