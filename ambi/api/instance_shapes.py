"""An instance as Docker's JSON: one row of the list, and the whole of inspect.

Clients compare these to the letter: what the caller gave comes back verbatim, and what it did not give is null, `[]` or
`{}` exactly where Docker has it so.
"""

from __future__ import annotations

import time
from typing import Any

from ambi.api import network_shapes
from ambi.api.words import rfc3339_nano
from ambi.core.model import Status
from ambi.core.words import human_duration
from ambi.engine.health import STARTING, Health
from ambi.engine.mountpoints import Point
from ambi.engine.types import Instance
from ambi.shim import record

_CONFIG: dict[str, Any] = {
    "Hostname": "", "Domainname": "", "User": "", "AttachStdin": False, "AttachStdout": False, "AttachStderr": False,
    "Tty": False, "OpenStdin": False, "StdinOnce": False, "Env": [], "Cmd": None, "Image": "", "Volumes": None,
    "WorkingDir": "", "Entrypoint": None, "OnBuild": None, "Labels": {},
}  # fmt: skip
_CONFIG_IF_SET = (
    "ExposedPorts", "Healthcheck", "ArgsEscaped", "NetworkDisabled", "MacAddress", "StopSignal", "StopTimeout", "Shell",
)  # fmt: skip

_HOST: dict[str, Any] = {
    "Binds": None, "ContainerIDFile": "", "LogConfig": {"Type": "json-file", "Config": {}}, "NetworkMode": "default",
    "PortBindings": {}, "RestartPolicy": {"Name": "no", "MaximumRetryCount": 0}, "AutoRemove": False, "VolumeDriver": "",
    "VolumesFrom": None, "ConsoleSize": [0, 0], "CapAdd": None, "CapDrop": None, "CgroupnsMode": "private", "Dns": [],
    "DnsOptions": [], "DnsSearch": [], "ExtraHosts": None, "GroupAdd": None, "IpcMode": "private", "Cgroup": "",
    "Links": None, "OomScoreAdj": 0, "PidMode": "", "Privileged": False, "PublishAllPorts": False, "ReadonlyRootfs": False,
    "SecurityOpt": None, "UTSMode": "", "UsernsMode": "", "ShmSize": 64 << 20, "Runtime": "", "Isolation": "",
    "CpuShares": 0, "Memory": 0, "NanoCpus": 0, "CgroupParent": "", "BlkioWeight": 0, "BlkioWeightDevice": [],
    "BlkioDeviceReadBps": [], "BlkioDeviceWriteBps": [], "BlkioDeviceReadIOps": [], "BlkioDeviceWriteIOps": [],
    "CpuPeriod": 0, "CpuQuota": 0, "CpuRealtimePeriod": 0, "CpuRealtimeRuntime": 0, "CpusetCpus": "", "CpusetMems": "",
    "Devices": [], "DeviceCgroupRules": None, "DeviceRequests": None, "MemoryReservation": 0, "MemorySwap": 0,
    "MemorySwappiness": None, "OomKillDisable": None, "PidsLimit": None, "Ulimits": [], "CpuCount": 0, "CpuPercent": 0,
    "IOMaximumIOps": 0, "IOMaximumBandwidth": 0,
}  # fmt: skip

_MASKED = [
    "/proc/asound", "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
    "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap",
]  # fmt: skip
_READONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]


def summary(instance: Instance) -> dict[str, Any]:
    """A row of `/containers/json`."""
    config = instance.spec.config
    return {
        "Id": instance.id,
        "Names": [f"/{instance.name}"],
        "Image": instance.image,
        "ImageID": instance.image_id,
        "Command": command_line(instance.argv),
        "Created": instance.created_ns // 1_000_000_000,
        "Ports": network_shapes.port_list(instance),
        "Labels": config.get("Labels") or {},
        "State": instance.state.status.value,
        "Status": status_text(instance),
        "Isolation": instance.isolation.value,  # ours; Docker's clients ignore it
        "HostConfig": {"NetworkMode": instance.spec.host.get("NetworkMode") or "default"},
        "NetworkSettings": {"Networks": network_shapes.endpoints(instance, names=False)},
        "Mounts": mounts(instance),
    }


def command_line(argv: tuple[str, ...]) -> str:
    """The program and its arguments in one line; arguments with blanks are quoted, as docker ps shows them."""
    return " ".join([*argv[:1], *(f"'{arg}'" if " " in arg else arg for arg in argv[1:])])


def status_text(instance: Instance) -> str:
    state = instance.state
    now = time.time()
    since_start = human_duration(now - state.started_ns / 1e9)
    since_end = human_duration(now - state.finished_ns / 1e9)
    match state.status:
        case Status.RUNNING:
            return f"Up {since_start}{_health_text(instance)}"
        case Status.PAUSED:
            return f"Up {since_start} (Paused)"
        case Status.RESTARTING:
            return f"Restarting ({state.exit_code}) {since_end} ago"
        case Status.REMOVING:
            return "Removal In Progress"
        case Status.DEAD:
            return "Dead"
        case Status.CREATED:
            return "Created"
        case _:
            return f"Exited ({state.exit_code}) {since_end} ago"


def _health_text(instance: Instance) -> str:
    if instance.health is None:
        return ""
    status = instance.health.status
    return f" (health: {status})" if status == STARTING else f" ({status})"


def inspect(instance: Instance, version: tuple[int, int]) -> dict[str, Any]:
    """The answer of `/containers/ID/json`, but for the sizes."""
    argv = instance.argv
    files = instance.data_dir / "files"
    return {
        "Id": instance.id,
        "Created": rfc3339_nano(instance.created_ns),
        "Path": argv[0] if argv else "",
        "Args": list(argv[1:]),
        "State": _state(instance),
        "Image": instance.image_id,
        "ResolvConfPath": str(files / "resolv.conf"),
        "HostnamePath": str(files / "hostname"),
        "HostsPath": str(files / "hosts"),
        "LogPath": str(instance.log_path or ""),
        "Name": f"/{instance.name}",
        "RestartCount": instance.restart_count,
        "Driver": "ambi",
        "Platform": "linux",
        "MountLabel": "",
        "ProcessLabel": "",
        "AppArmorProfile": "",
        "ExecIDs": list(instance.exec_ids) or None,
        "HostConfig": host_config(instance),
        "GraphDriver": {"Name": "ambi", "Data": {"UpperDir": str(instance.data_dir / "upper")}},
        "Mounts": mounts(instance),
        "Config": config(instance),
        "NetworkSettings": network_shapes.settings(instance),
        "Ambi": _ours(instance),
    }


def _ours(instance: Instance) -> dict[str, Any]:
    """What Docker has no words for; its clients ignore it. ShimPid is 0 while nothing supervises the instance."""
    shim = record.read(instance.run_dir)
    return {
        "Isolation": instance.isolation.value,
        "Workload": instance.workload.value,
        "ShimPid": shim.pid if shim is not None and shim.alive() else 0,
    }


def _state(instance: Instance) -> dict[str, Any]:
    state = instance.state
    shown: dict[str, Any] = {
        "Status": state.status.value,
        "Running": state.alive,
        "Paused": state.status is Status.PAUSED,
        "Restarting": state.status is Status.RESTARTING,
        "OOMKilled": state.oom_killed,
        "Dead": state.status is Status.DEAD,
        "Pid": state.pid,
        "ExitCode": state.exit_code,
        "Error": state.error,
        "StartedAt": rfc3339_nano(state.started_ns),
        "FinishedAt": rfc3339_nano(state.finished_ns),
    }
    if instance.health is not None:
        shown["Health"] = _health(instance.health)
    return shown


def _health(health: Health) -> dict[str, Any]:
    log = [
        {"Start": rfc3339_nano(r.start_ns), "End": rfc3339_nano(r.end_ns), "ExitCode": r.code, "Output": r.output}
        for r in health.results
    ]
    return {"Status": health.status, "FailingStreak": health.failures, "Log": log}


def host_config(instance: Instance) -> dict[str, Any]:
    given = instance.spec.host
    host = {**_HOST, **{name: value for name, value in given.items() if value is not None or name not in _HOST}}
    host["Runtime"] = host["Runtime"] or instance.isolation.value
    if not host["LogConfig"].get("Type"):
        host["LogConfig"] = {"Type": "json-file", "Config": host["LogConfig"].get("Config") or {}}
    for name, paths in (("MaskedPaths", _MASKED), ("ReadonlyPaths", _READONLY)):
        if host.get(name) is None:
            host[name] = None if host["Privileged"] else paths
    return host


def config(instance: Instance) -> dict[str, Any]:
    given = instance.spec.config
    shown = {name: default if given.get(name) is None else given[name] for name, default in _CONFIG.items()}
    shown["Image"] = instance.image
    shown.update({name: given[name] for name in _CONFIG_IF_SET if given.get(name)})
    return shown


def mounts(instance: Instance) -> list[dict[str, Any]]:
    """MountPoint objects; `--tmpfs` shows in HostConfig alone."""
    return [_mount_point(point) for point in instance.mounts]


def _mount_point(point: Point) -> dict[str, Any]:
    volume = {"Name": point.name} if point.name else {}
    driver = {"Driver": "local"} if point.name else {}
    return {
        "Type": point.kind,
        **volume,
        "Source": point.shown,
        "Destination": point.target,
        **driver,
        "Mode": point.mode,
        "RW": not point.readonly,
        "Propagation": point.propagation,
    }
