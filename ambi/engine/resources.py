"""Limits and devices: HostConfig into `linux.resources`, `linux.devices`, rlimits, sysctls and the shape of a VM."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from typing import Any

from ambi.core.errors import InvalidRequest
from ambi.core.model import GUEST_OVERHEAD_BYTES, Isolation, VmShape
from ambi.engine import cgroups, diskquota
from ambi.engine.body import Body
from ambi.engine.endpoints import SHARED

MINIMUM_MEMORY = 6 << 20  # as Docker's
_RLIMITS = frozenset(
    ("as", "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile", "nproc", "rss", "rtprio")
    + ("rttime", "sigpending", "stack")
)
_IPC_SYSCTLS = frozenset(
    ("kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem", "kernel.shmall", "kernel.shmmax", "kernel.shmmni")
    + ("kernel.shm_rmid_forced",)
)
_NOT_COPIED = ("pts", "shm", "fd", "mqueue", "console", "lxc", "lxd-fs", ".lxc", ".lxd-mounts", ".udev")


def limits(host: Body) -> dict[str, Any]:
    """The `linux.resources` member but for devices. Raises InvalidRequest with Docker's words."""
    found: dict[str, Any] = {}
    if memory := _memory(host):
        found["memory"] = memory
    if cpu := _cpu(host):
        found["cpu"] = cpu
    pids = host.number("PidsLimit")
    if pids > 0:
        found["pids"] = {"limit": pids}
    if block := cgroups.block_io(host):
        found["blockIO"] = block
    return found


def _memory(host: Body) -> dict[str, int]:
    limit, swap, soft = host.number("Memory"), host.number("MemorySwap"), host.number("MemoryReservation")
    if 0 < limit < MINIMUM_MEMORY or limit < 0:
        raise InvalidRequest("Minimum memory limit allowed is 6MB", hint="give it more, for example --memory 64m")
    if 0 < swap < limit:
        raise InvalidRequest(
            "Minimum memoryswap limit should be larger than memory limit, see usage",
            hint="--memory-swap counts memory and swap together; -1 is no limit",
        )
    if swap > 0 and not limit:
        raise InvalidRequest(
            "You should always set the Memory limit when using Memoryswap limit, see usage", hint="add --memory SIZE"
        )
    if soft and (soft < MINIMUM_MEMORY or 0 < limit < soft):
        raise InvalidRequest(
            "Minimum memory limit can not be less than memory reservation limit, see usage",
            hint="raise --memory, or lower --memory-reservation",
        )
    found = {}
    if limit:
        found["limit"] = limit
        found["swap"] = swap or 2 * limit
    if soft:
        found["reservation"] = soft
    return found


def _cpu(host: Body) -> dict[str, Any]:
    nano, period, quota = host.number("NanoCpus"), host.number("CpuPeriod"), host.number("CpuQuota")
    count = os.cpu_count() or 1
    if nano:
        if period or quota:
            raise InvalidRequest(
                "Conflicting options: Nano CPUs and CPU Period or Quota cannot both be set",
                hint="leave --cpus out, or --cpu-period and --cpu-quota",
            )
        if not 10_000_000 <= nano <= count * 1_000_000_000:
            raise InvalidRequest(
                f"Range of CPUs is from 0.01 to {count}.00, as there are only {count} CPUs available",
                hint=f"--cpus {count} is all of this host",
            )
        period, quota = 100_000, nano // 10_000
    if period and not 1_000 <= period <= 1_000_000:
        raise InvalidRequest(
            "CPU cfs period can not be less than 1ms (i.e. 1000) or larger than 1s (i.e. 1000000)", hint="use --cpus"
        )
    if 0 < quota < 1_000:
        raise InvalidRequest("CPU cfs quota can not be less than 1ms (i.e. 1000)", hint="use --cpus")
    shares = host.number("CpuShares")
    if shares < 0:
        raise InvalidRequest(
            f"invalid CPU shares ({shares}): value must be a positive integer", hint="--cpu-shares 1024 is the usual weight"
        )
    found: dict[str, Any] = {"shares": shares, "quota": quota, "period": period}
    for key, name in (("CpusetCpus", "cpus"), ("CpusetMems", "mems")):
        text = host.text(key)
        if text and not all(c in "0123456789,-" for c in text):
            raise InvalidRequest(
                f"Invalid value {text} for {'cpuset cpus' if name == 'cpus' else 'cpuset mems'}",
                hint="a list of numbers and ranges, for example 0-1,3",
            )
        found[name] = text
    return {key: value for key, value in found.items() if value}


def vm_shape(host: Body) -> VmShape:
    """vCPUs: `--cpus` rounded up. Memory: the limit, which holds inside, and room for the guest's kernel. Disk: by
    `--storage-opt`."""
    default = VmShape()
    limit, nano = host.number("Memory"), host.number("NanoCpus")
    memory = max(limit + GUEST_OVERHEAD_BYTES, default.memory_bytes) if limit else default.memory_bytes
    memory = (memory + (2 << 20) - 1) & ~((2 << 20) - 1)
    return VmShape(
        vcpus=max(default.vcpus, -(-nano // 1_000_000_000)),
        memory_bytes=memory,
        disk_bytes=diskquota.wanted_bytes(host, Isolation.VM) or default.disk_bytes,
    )


def rlimits(host: Body) -> list[dict[str, Any]]:
    found = []
    for entry in host.objects("Ulimits"):
        name, soft, hard = entry.text("Name"), entry.number("Soft"), entry.number("Hard")
        if name not in _RLIMITS:
            raise InvalidRequest(f"invalid ulimit type: {name}", hint="ulimits: " + " ".join(sorted(_RLIMITS)))
        if hard != -1 and (soft > hard or soft == -1):
            raise InvalidRequest(
                f"ulimit soft limit must be less than or equal to hard limit: {soft} > {hard}",
                hint=f"--ulimit {name}=SOFT:HARD",
            )
        top = (1 << 64) - 1
        limit = {"soft": top if soft == -1 else soft, "hard": top if hard == -1 else hard}
        found.append({"type": f"RLIMIT_{name.upper()}", **limit})
    return found


def sysctls(host: Body, *, vm: bool) -> dict[str, str]:
    """The client's over Docker's defaults. In a VM every name is its own kernel's; a container has the namespaced ones."""
    network = host.text("NetworkMode") != "host"
    found = {}
    if network:
        found = {"net.ipv4.ip_unprivileged_port_start": "0", "net.ipv4.ping_group_range": "0 2147483647"}
    for name, value in host.texts("Sysctls").items():
        parts = name.split(".")
        if len(parts) < 2 or not all(parts) or any("/" in part for part in parts):
            raise InvalidRequest(
                f"sysctl '{name}' is not a name of the form a.b.c", hint="for example --sysctl net.ipv4.ip_forward=1"
            )
        ipc = name in _IPC_SYSCTLS or name.startswith("fs.mqueue.")
        if ipc and host.text("IpcMode") == "host":
            raise InvalidRequest(f"sysctl '{name}' not allowed with host ipc namespace", hint="leave --ipc host out")
        if ipc and host.text("IpcMode").startswith(SHARED):
            raise InvalidRequest(
                f"sysctl '{name}' not allowed with the ipc namespace of another container",
                hint=f"give it to {host.text('IpcMode').removeprefix(SHARED)}",
            )
        if name.startswith("net.") and not network:
            raise InvalidRequest(f"sysctl '{name}' not allowed in host network namespace", hint="leave --network host out")
        if not (vm or ipc or name.startswith("net.")):
            raise InvalidRequest(f"sysctl '{name}' is not whitelisted", hint="run it in a VM: --runtime vm")
        found[name] = value
    return found


# moby: oci/devices/devices_linux.go and oci/defaults.go
_DEFAULT_RULES: tuple[tuple[str, int | None, int | None, str], ...] = (
    ("c", 1, 5, "rwm"), ("c", 1, 3, "rwm"), ("c", 1, 9, "rwm"), ("c", 1, 8, "rwm"), ("c", 1, 7, "rwm"),
    ("c", 5, 0, "rwm"), ("c", 5, 1, "rwm"), ("c", 5, 2, "rwm"), ("c", 136, None, "rwm"), ("c", None, None, "m"),
    ("b", None, None, "m"),
)  # fmt: skip


def device_rules(host: Body, devices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The `linux.resources.devices` member: deny all, then the exceptions."""
    if host.flag("Privileged"):
        return [{"allow": True, "access": "rwm"}]
    rules: list[dict[str, Any]] = [{"allow": False, "access": "rwm"}]
    for kind, major, minor, access in _DEFAULT_RULES:
        rule: dict[str, Any] = {"allow": True, "type": kind, "access": access}
        rule.update({k: v for k, v in (("major", major), ("minor", minor)) if v is not None})
        rules.append(rule)
    for device in devices:
        keys = ("type", "major", "minor", "access")
        rules.append({"allow": True, **{key: device[key] for key in keys}})
    return rules


def devices(host: Body) -> list[dict[str, Any]]:
    """What `--device` names, and for a privileged container all of the host's; each with an `access` of ours.

    Raises InvalidRequest when a source is not a device.
    """
    if host.flag("Privileged"):
        return list(_below("/dev", "/dev", "rwm"))
    found: list[dict[str, Any]] = []
    for entry in host.objects("Devices"):
        source, access = entry.text("PathOnHost"), entry.text("CgroupPermissions") or "rwm"
        target = entry.text("PathInContainer") or source
        if not access or set(access) - set("rwm") or not source.startswith("/") or not target.startswith("/"):
            raise InvalidRequest(f"--device {source}:{target}:{access}: not a path and a mode of r, w and m")
        made = list(_below(os.path.realpath(source), target, access))
        if not made:
            raise InvalidRequest(
                f'error gathering device information while adding custom device "{source}": not a device node'
            )
        found.extend(made)
    return found


def _below(source: str, target: str, access: str) -> Iterator[dict[str, Any]]:
    """The device at `source`, or all below it when it is a directory."""
    try:
        about = os.lstat(source)
        if stat.S_ISDIR(about.st_mode):
            for name in sorted(os.listdir(source)):
                if name not in _NOT_COPIED:
                    yield from _below(f"{source}/{name}", f"{target}/{name}", access)
            return
    except OSError:
        return
    if not (stat.S_ISCHR(about.st_mode) or stat.S_ISBLK(about.st_mode)):
        return
    yield {
        "path": target,
        "type": "c" if stat.S_ISCHR(about.st_mode) else "b",
        "major": os.major(about.st_rdev),
        "minor": os.minor(about.st_rdev),
        "fileMode": stat.S_IMODE(about.st_mode),
        "uid": about.st_uid,
        "gid": about.st_gid,
        "access": access,
    }
