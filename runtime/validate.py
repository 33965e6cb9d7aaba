"""Whether a launch plan can work in a container here: everything that can be told before anything is made."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from ambi.core.driver import Problem
from ambi.core.errors import AmbiError
from ambi.core.plan import LaunchPlan, Layers
from ambi.linux import seccomp
from runtime import cgroups, devices, finish, mounts
from runtime.cgroups import blocks

_NAMESPACES = ("pid", "network", "mount", "ipc", "uts", "cgroup")
_IPC_SYSCTLS = frozenset(
    (
        "kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem", "kernel.shmall", "kernel.shmmax",
        "kernel.shmmni", "kernel.shm_rmid_forced",
    )
)  # fmt: skip
_RESOURCES = ("devices", "memory", "cpu", "pids", "blockIO", "hugepageLimits", "network", "rdma", "unified")
_PROPAGATIONS = ("", *(p + q for p in ("", "r") for q in ("private", "shared", "slave", "unbindable")))


def problems_of(plan: LaunchPlan) -> list[Problem]:
    """What stands in the way of `plan`, the most fundamental first; empty when create should work."""
    config = plan.config
    found = [Problem(text) for text in _structure(config)]
    if found:
        return found
    linux = config["linux"]
    for reason in (_namespaces(linux), _sysctls(linux), _resources(linux), _process(config["process"]), _root(plan)):
        found += [Problem(text) for text in reason]
    if plan.id_map is not None:
        found.append(Problem("user namespaces are not supported yet", "leave out the id map"))
    for entry in config.get("hooks") or {}:
        found.append(Problem(f"hooks.{entry}: hooks are not supported"))
    found += _refusals(config)
    return found


def _structure(config: dict[str, Any]) -> list[str]:
    version = str(config.get("ociVersion") or "1.0.2")
    found = []
    if version.partition(".")[0] != "1":
        found.append(f"ociVersion {version} is not supported")
    if not isinstance(config.get("linux"), dict) or not config["linux"].get("cgroupsPath"):
        found.append("linux.cgroupsPath is missing")
    spec = config.get("process")
    if not isinstance(spec, dict) or not isinstance(spec.get("user"), dict):
        found.append("process.user is missing")
    elif not spec.get("args") or not all(isinstance(a, str) for a in spec["args"]):
        found.append("process.args is empty")
    return found


def _namespaces(linux: dict[str, Any]) -> list[str]:
    found, seen = [], set()
    for entry in linux.get("namespaces") or ():
        kind = entry.get("type")
        if kind not in _NAMESPACES:
            found.append(f"linux.namespaces: type {kind} is not supported")
        elif kind in seen:
            found.append(f"linux.namespaces: {kind} is there twice")
        elif kind == "mount" and entry.get("path"):
            found.append("linux.namespaces: a mount namespace cannot be joined")
        seen.add(kind)
    if "mount" not in seen:
        found.append("linux.namespaces: a mount namespace is required")
    if (linux.get("rootfsPropagation") or "") not in _PROPAGATIONS:
        found.append(f"linux.rootfsPropagation: {linux['rootfsPropagation']} is not known")
    return found


def _sysctls(linux: dict[str, Any]) -> list[str]:
    """Only what belongs to a namespace of the container; anything else would change the host."""
    own = {entry.get("type") for entry in linux.get("namespaces") or ()}
    found = []
    for key in linux.get("sysctl") or {}:
        if ".." in key or "/" in key:
            found.append(f"linux.sysctl: {key} is not a name")
        elif key in _IPC_SYSCTLS or key.startswith("fs.mqueue."):
            if "ipc" not in own:
                found.append(f"linux.sysctl: {key} needs an ipc namespace of the container's own")
        elif key.startswith("net."):
            if "network" not in own:
                found.append(f"linux.sysctl: {key} is not allowed in the host's network namespace")
        elif key != "kernel.domainname" or "uts" not in own:
            found.append(f"linux.sysctl: {key} is not in a namespace of the container's own")
    return found


def _resources(linux: dict[str, Any]) -> list[str]:
    resources = linux.get("resources") or {}
    found = [f"linux.resources.{name} is not known" for name in resources if name not in _RESOURCES]
    found += [
        f"linux.resources.{name} is not supported"
        for name in ("hugepageLimits", "network", "rdma", "unified")
        if resources.get(name)
    ]
    memory, block = resources.get("memory") or {}, resources.get("blockIO") or {}
    found += [f"linux.resources.memory.{name} is not supported" for name in ("kernel", "kernelTCP") if memory.get(name)]
    known = ("weight", "weightDevice", *blocks.THROTTLES)
    found += [f"linux.resources.blockIO.{k} is not supported" for k, value in block.items() if value and k not in known]
    if any(entry.get("leafWeight") for entry in block.get("weightDevice") or ()):
        found.append("linux.resources.blockIO.weightDevice: leafWeight is not supported")
    cpu = resources.get("cpu") or {}
    found += [
        f"linux.resources.cpu.{name} is not supported"
        for name in ("realtimePeriod", "realtimeRuntime", "idle")
        if cpu.get(name)
    ]
    if memory.get("disableOOMKiller") and not cgroups.hierarchies().v1:
        found.append("linux.resources.memory.disableOOMKiller exists on cgroup version 1 alone")
    return found


def _process(spec: dict[str, Any]) -> list[str]:
    found = []
    if spec.get("scheduler") or spec.get("ioPriority"):
        found.append("process.scheduler and process.ioPriority are not supported")
    if spec.get("apparmorProfile") and not os.path.isdir("/sys/kernel/security/apparmor"):
        found.append("process.apparmorProfile: this host has no AppArmor")
    if spec.get("selinuxLabel") and not os.path.isdir("/sys/fs/selinux"):
        found.append("process.selinuxLabel: this host has no SELinux")
    if not (spec.get("cwd") or "/").startswith("/"):
        found.append(f"process.cwd: {spec['cwd']} is not absolute")
    return found


def _root(plan: LaunchPlan) -> list[str]:
    if not isinstance(plan.rootfs, Layers):
        return [] if plan.rootfs.path.is_dir() else [f"root {plan.rootfs.path} is not a directory"]
    return [f"layer {x.name}: {x.path} does not exist" for x in plan.rootfs.lowers if not os.path.exists(x.path)]


def _refusals(config: dict[str, Any]) -> list[Problem]:
    """Values whose readers raise what is wrong with them."""
    found = []
    readers: list[Callable[[], object]] = [
        lambda: devices.nodes_of(config),
        lambda: devices.rules_of(config),
        lambda: blocks.check((config["linux"].get("resources") or {}).get("blockIO") or {}),
        lambda: finish.capability_sets(config["process"]),
        lambda: seccomp.flags_of(config["linux"].get("seccomp") or {}),
        *[functools.partial(mounts.parse, entry) for entry in config.get("mounts") or ()],
    ]
    for reader in readers:
        try:
            reader()
        except AmbiError as error:
            found.append(Problem(error.message, error.hint))
        except (KeyError, TypeError, AttributeError) as error:
            found.append(Problem(f"config.json is malformed: {type(error).__name__}: {error}"))
    return found
