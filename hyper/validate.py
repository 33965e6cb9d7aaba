"""Whether a launch plan can work in a VM: everything that can be told from the plan alone."""

from __future__ import annotations

import os
from collections.abc import Iterator

from ambi.core.driver import Problem
from ambi.core.errors import AmbiError
from ambi.core.plan import LaunchPlan, Layers
from hyper import translate
from hyper.vm import vsock

MIN_MEMORY = 64 << 20
MAX_VCPUS = 255
HINT = "run it as a container: --isolation container"
OWN_NAMESPACES = ("mount", "pid", "network", "ipc", "uts")  # a guest always has them; a plan must not ask for the host's
KNOWN_NAMESPACES = (*OWN_NAMESPACES, "cgroup")
MOUNT_TYPES = frozenset(("bind", "tmpfs", "proc", "sysfs", "devpts", "mqueue", "cgroup", "cgroup2", translate.DISK))

# Limits that the guest's cgroup has, and what means nothing there: `devices` are rules for the host's, a guest has no swap.
RESOURCES = {
    "memory": frozenset(("limit", "swap", "swappiness", "checkBeforeUpdate", "useHierarchy")),
    "cpu": frozenset(("quota", "period", "shares")),
    "pids": frozenset(("limit",)),
}
IGNORED_RESOURCES = ("devices",)
REFUSED = ("devices", "intelRdt", "uidMappings", "gidMappings", "timeOffsets", "mountLabel", "personality", "memoryPolicy")
OWN_PROPAGATION = (None, "", "private", "rprivate", "unbindable", "runbindable")


def problems(plan: LaunchPlan) -> list[Problem]:
    """What stands in the way of `plan`; empty when create should work."""
    if not isinstance(plan.config.get("linux"), dict) or not plan.config["linux"].get("cgroupsPath"):
        return [Problem("linux.cgroupsPath is missing")]
    if not isinstance(plan.config.get("process"), dict):
        return [Problem("process is missing")]
    try:
        return [
            *_shape(plan),
            *_root(plan),
            *_namespaces(plan),
            *_mounts(plan),
            *_resources(plan),
            *_process(plan),
            *_rest(plan),
        ]
    except (KeyError, TypeError, AttributeError) as error:
        return [Problem(f"config.json is malformed: {type(error).__name__}: {error}")]


def _shape(plan: LaunchPlan) -> Iterator[Problem]:
    shape = translate.shape(plan)
    if shape.memory_bytes < MIN_MEMORY:
        hint = f"give it at least {MIN_MEMORY >> 20} MiB, for example --memory 256m"
        yield Problem(f"{shape.memory_bytes >> 20} MiB of memory are too few for a virtual machine", hint)
    if not 1 <= shape.vcpus <= MAX_VCPUS:
        yield Problem(f"a virtual machine has 1 to {MAX_VCPUS} CPUs, not {shape.vcpus}", "--cpus 1")


def _root(plan: LaunchPlan) -> Iterator[Problem]:
    if not isinstance(plan.rootfs, Layers):
        if not plan.rootfs.path.is_dir():
            yield Problem(f"root {plan.rootfs.path} is not a directory")
        return
    for layer in plan.rootfs.lowers:
        if layer.form != "erofs":
            hint = "apt-get install erofs-utils, then import the image again"
            yield Problem(f"layer {layer.name} is a directory; a virtual machine needs EROFS layers", hint)
        elif not layer.path.exists():
            yield Problem(f"layer {layer.name}: {layer.path} does not exist", "import the image again")


def _namespaces(plan: LaunchPlan) -> Iterator[Problem]:
    given = {entry.get("type"): entry.get("path") for entry in plan.config["linux"].get("namespaces") or ()}
    for kind in OWN_NAMESPACES:
        if kind not in given:
            yield Problem(f"a virtual machine has a kernel of its own: it cannot use the host's {kind} namespace", HINT)
    for kind, path in given.items():
        if kind not in KNOWN_NAMESPACES:
            yield Problem(f"linux.namespaces: a virtual machine does not support type {kind}", HINT)
        elif path and (kind != "network" or _is_ours(path)):
            yield Problem(f"linux.namespaces: a virtual machine cannot join the {kind} namespace {path}", HINT)


def _is_ours(path: str) -> bool:
    """Whether `path` is the network namespace that this process is in; one that is not there is found out by `create`."""
    try:
        return os.path.samefile(path, "/proc/thread-self/ns/net")
    except OSError:
        return False


def _mounts(plan: LaunchPlan) -> Iterator[Problem]:
    for mount in plan.config.get("mounts") or ():
        name, options = mount["destination"], mount.get("options") or ()
        if not translate.is_bind(mount):
            if mount.get("type") not in MOUNT_TYPES:
                yield Problem(f"mount {name}: a virtual machine does not support type {mount.get('type')}", HINT)
            elif mount["type"] == translate.DISK and not os.path.isfile(mount.get("source") or ""):
                yield Problem(f"mount {name}: there is no disk {mount.get('source')}", "ambi volume ls")
        elif {"shared", "rshared", "slave", "rslave"} & set(options):
            yield Problem(f"mount {name}: mounts do not propagate between a virtual machine and its host", HINT)
        elif {"idmap", "ridmap"} & set(options):
            yield Problem(f"mount {name}: a virtual machine does not support idmap", HINT)


def _resources(plan: LaunchPlan) -> Iterator[Problem]:
    for name, value in (plan.config["linux"].get("resources") or {}).items():
        if name in IGNORED_RESOURCES or not value:
            continue
        if name not in RESOURCES:
            if any(value.values()) if isinstance(value, dict) else value:
                yield Problem(f"linux.resources.{name}: a virtual machine does not support it", HINT)
            continue
        for key, limit in value.items():
            if limit and key not in RESOURCES[name]:
                yield Problem(f"linux.resources.{name}.{key}: a virtual machine does not support it", HINT)


def _process(plan: LaunchPlan) -> Iterator[Problem]:
    body = plan.config["process"]
    for key in ("apparmorProfile", "selinuxLabel", "scheduler", "ioPriority", "execCPUAffinity"):
        if body.get(key):
            yield Problem(f"process.{key}: a virtual machine does not support it", HINT)
    try:
        translate.process(body, {**plan.config, "linux": {}}, stdin=False)
    except AmbiError as error:
        yield Problem(error.message, error.hint)


def _rest(plan: LaunchPlan) -> Iterator[Problem]:
    linux = plan.config["linux"]
    if wrong := vsock.problem(plan):
        yield Problem(wrong, f"{vsock.ANNOTATION}={vsock.AUTO}")
    for name in REFUSED:
        if linux.get(name):
            yield Problem(f"linux.{name}: a virtual machine does not support it", HINT)
    if linux.get("rootfsPropagation") not in OWN_PROPAGATION:
        yield Problem("linux.rootfsPropagation: mounts do not propagate between a virtual machine and its host", HINT)
    for name in plan.config.get("hooks") or {}:
        yield Problem(f"hooks.{name}: a virtual machine does not support it", HINT)
