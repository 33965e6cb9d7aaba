"""What a client asks for, checked and completed from the image. What is not supported is refused by the flag's name."""

from __future__ import annotations

import os
from typing import Any

from ambi.core.errors import InvalidRequest
from ambi.core.model import Isolation
from ambi.engine import annotation, endpoints, healthcheck, ports
from ambi.engine.body import Body
from ambi.engine.endpoints import SHARED
from ambi.engine.types import CreateSpec

RUNTIMES = {"": Isolation.CONTAINER, "container": Isolation.CONTAINER, "runc": Isolation.CONTAINER, "vm": Isolation.VM}

# Fields that work, for both kinds unless _CONTAINER_ONLY has them; everything else must be neutral.
_WORKS = """
    Annotations AutoRemove Binds BlkioDeviceReadBps BlkioDeviceReadIOps BlkioDeviceWriteBps BlkioDeviceWriteIOps BlkioWeight
    BlkioWeightDevice CapAdd CapDrop CgroupParent CgroupnsMode ConsoleSize ContainerIDFile CpuPeriod CpuQuota CpuShares
    CpusetCpus CpusetMems Devices Dns DnsOptions DnsSearch ExtraHosts GroupAdd Init IpcMode Links LogConfig MaskedPaths
    Memory MemoryReservation MemorySwap Mounts NanoCpus NetworkMode OomScoreAdj PidMode PidsLimit PortBindings Privileged
    PublishAllPorts ReadonlyPaths ReadonlyRootfs RestartPolicy Runtime SecurityOpt ShmSize StorageOpt Sysctls Tmpfs Ulimits
    UTSMode VolumeDriver VolumesFrom
"""
_SUPPORTED = frozenset(_WORKS.split())
# Fields that do not work, and Docker's flag for each.
_REFUSED = {
    "Cgroup": "HostConfig.Cgroup",
    "CpuRealtimePeriod": "--cpu-rt-period",
    "CpuRealtimeRuntime": "--cpu-rt-runtime",
    "DeviceCgroupRules": "--device-cgroup-rule",
    "DeviceRequests": "--gpus",
    "KernelMemory": "--kernel-memory",
    "KernelMemoryTCP": "HostConfig.KernelMemoryTCP",
    "MemorySwappiness": "--memory-swappiness",
    "OomKillDisable": "--oom-kill-disable",
    "UsernsMode": "--userns",
}
_CONTAINER_ONLY = {
    "BlkioDeviceReadBps": "--device-read-bps",
    "BlkioDeviceReadIOps": "--device-read-iops",
    "BlkioDeviceWriteBps": "--device-write-bps",
    "BlkioDeviceWriteIOps": "--device-write-iops",
    "BlkioWeight": "--blkio-weight",
    "BlkioWeightDevice": "--blkio-weight-device",
    "CgroupParent": "--cgroup-parent",
    "CpuShares": "--cpu-shares",
    "CpusetCpus": "--cpuset-cpus",
    "CpusetMems": "--cpuset-mems",
    "Devices": "--device",
    "MemoryReservation": "--memory-reservation",
}
_NEUTRAL: dict[str, tuple[Any, ...]] = {"MemorySwappiness": (-1,), "Isolation": ("default",), "UsernsMode": ("host",)}


def isolation_of(host: Body) -> Isolation:
    """What HostConfig.Runtime asks for."""
    name = host.text("Runtime")
    if name not in RUNTIMES:
        raise InvalidRequest(f"unknown or invalid runtime name: {name}", hint="--runtime takes `container` or `vm`")
    return RUNTIMES[name]


def check(spec: CreateSpec) -> list[str]:
    """Refuse what does not work. Returns warnings."""
    isolation = check_host(spec)
    _check_config(Body("Config", spec.config))
    endpoints.check(spec, isolation)
    ports.exposed(spec)
    ports.wanted(spec)
    return []


def check_host(spec: CreateSpec) -> Isolation:
    """Refuse what does not work in HostConfig alone. Returns what the instance runs in."""
    host = Body("HostConfig", spec.host)
    isolation = isolation_of(host)
    for key, value in host.data.items():
        if neutral(key, value):
            continue
        if key not in _SUPPORTED:
            raise InvalidRequest(
                f"{flag_of(key)} is not supported yet",
                hint="leave it out; `ambi run --help` lists what works",
            )
        if isolation is Isolation.VM and key in _CONTAINER_ONLY:
            raise InvalidRequest(
                f"{_CONTAINER_ONLY[key]} is not supported for a VM",
                hint="leave it out, or run it as a container: --isolation container",
            )
    annotation.check(host, isolation)
    _check_restart(host)
    _check_modes(host, isolation)
    return isolation


def neutral(key: str, value: Any) -> bool:
    """Whether `value` of a HostConfig field asks for nothing."""
    return not value or value in _NEUTRAL.get(key, ()) or _empty(value)


def flag_of(key: str) -> str:
    """What people know a HostConfig field by."""
    return _REFUSED.get(key) or _CONTAINER_ONLY.get(key) or f"HostConfig.{key}"


def _empty(value: Any) -> bool:
    """Whether an object or list has nothing but neutral values in it, as `[0, 0]` or `{"Name": ""}`."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return not any(items)


def _check_restart(host: Body) -> None:
    policy = host.object("RestartPolicy").text("Name")
    if policy not in ("", "no", "always", "unless-stopped", "on-failure"):
        raise InvalidRequest(
            f"invalid restart policy '{policy}'", hint="--restart no, always, unless-stopped or on-failure[:N]"
        )
    most = host.object("RestartPolicy").number("MaximumRetryCount")
    if most and policy != "on-failure":
        raise InvalidRequest(
            f"maximum retry count cannot be used with restart policy '{policy}'",
            hint="--restart on-failure:N",
        )
    if most < 0:
        raise InvalidRequest("maximum retry count cannot be negative", hint="--restart on-failure:3")
    if policy not in ("", "no") and host.flag("AutoRemove"):
        raise InvalidRequest("can't create 'AutoRemove' container with restart policy", hint="leave --rm out, or --restart")


def _check_modes(host: Body, isolation: Isolation) -> None:
    flags = {"IpcMode": "--ipc", "PidMode": "--pid", "UTSMode": "--uts", "CgroupnsMode": "--cgroupns"}
    for key, flag in flags.items():
        mode = host.text(key)
        allowed = ("", "private") if key == "CgroupnsMode" else ("", "private", "host")
        shared = key in ("PidMode", "IpcMode") and mode.startswith(SHARED) and mode != SHARED
        if (shared or mode == "shareable") and isolation is Isolation.VM:
            what = "its processes are" if key == "PidMode" else "its shared memory is"
            raise InvalidRequest(
                f"{flag} {mode} is not possible for a VM: {what} its guest's",
                hint=f"leave {flag} out, or run it as a container: --isolation container",
            )
        if mode not in allowed and not shared and not (key == "IpcMode" and mode in ("none", "shareable")):
            raise InvalidRequest(f"{flag} {mode} is not supported", hint=f"leave {flag} out")
        if mode == "host" and isolation is Isolation.VM:
            raise InvalidRequest(
                f"{flag} host is not possible for a VM: it has a kernel of its own",
                hint=f"leave {flag} out, or run it as a container: --isolation container",
            )


def _check_config(config: Body) -> None:
    healthcheck.check_config(config)
    if config.number("StopTimeout") < -1:
        raise InvalidRequest("--stop-timeout must not be negative", hint="--stop-timeout 10")
    for item in config.strings("Env"):
        if not item or item.startswith("="):
            raise InvalidRequest(f"invalid environment variable: {item}", hint="-e NAME=VALUE")


def complete(spec: CreateSpec, image: dict[str, Any], instance: str) -> CreateSpec:
    """`spec` with what Docker fills in from the image's config (`image`, the `config` member) and the instance's id."""
    config, host = Body("Config", spec.config), Body("HostConfig", spec.host)
    base = Body("image config", image)
    merged = dict(config.data)
    entrypoint, command = config.strings("Entrypoint"), config.strings("Cmd")
    if not entrypoint:
        command = command or base.strings("Cmd")
        if config.data.get("Entrypoint") is None:
            entrypoint = base.strings("Entrypoint")
    if entrypoint == [""]:
        entrypoint = []
    if not entrypoint and not command:
        raise InvalidRequest("no command specified", hint="give a command after the image's name")
    merged["Entrypoint"], merged["Cmd"] = entrypoint or None, command or None
    for key in ("User", "WorkingDir", "StopSignal"):
        value = config.text(key) or base.text(key)
        if value or key in merged:
            merged[key] = value
    if check := healthcheck.merged(config.object("Healthcheck").data, base.object("Healthcheck").data):
        merged["Healthcheck"] = check
    if shell := config.strings("Shell") or base.strings("Shell"):
        merged["Shell"] = shell
    merged["Env"] = merge_env(config.strings("Env"), base.strings("Env"))
    merged["Labels"] = {**base.texts("Labels"), **config.texts("Labels")}
    ports = {**base.object("ExposedPorts").data, **config.object("ExposedPorts").data}
    if ports:
        merged["ExposedPorts"] = ports
    volumes = {**base.object("Volumes").data, **config.object("Volumes").data}
    if volumes:
        merged["Volumes"] = volumes
    if not config.text("Hostname"):
        shared = host.text("NetworkMode") == "host" or host.text("UTSMode") == "host"
        merged["Hostname"] = os.uname().nodename if shared else instance[:12]
    if merged.get("WorkingDir") and not merged["WorkingDir"].startswith("/"):
        raise InvalidRequest(
            f"the working directory '{merged['WorkingDir']}' is invalid, it needs to be an absolute path",
            hint=f"-w /{merged['WorkingDir']}",
        )
    return CreateSpec(merged, host.data, spec.networking or {})


def merge_env(own: list[str], base: list[str]) -> list[str]:
    """`own`, then what `base` has and `own` does not, by name."""
    names = {item.partition("=")[0] for item in own}
    return own + [item for item in base if item.partition("=")[0] not in names]


def argv_of(config: dict[str, Any]) -> tuple[str, ...]:
    """What runs, of a completed config."""
    return tuple((config.get("Entrypoint") or []) + (config.get("Cmd") or []))
