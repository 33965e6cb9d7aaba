"""From the flags of `run` and `create` to the body of `POST /containers/create`.

The body is the one that the docker CLI sends, field for field (tests/cli/test_run_body.py compares them): clients read it
back with `inspect`, so what is not asked for has docker's neutral value rather than none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from ambi.cli import humanize, mounts, networking, policies
from ambi.cli.blocks import block_limits
from ambi.cli.values import env_list, key_values
from ambi.core.errors import InvalidRequest, from_os_error
from ambi.core.words import is_address

STREAMS = ("stdin", "stdout", "stderr")
_SYSCTL_PREFIXES = ("net.", "fs.mqueue.")
_SYSCTLS = (
    "kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem",
    "kernel.shmall", "kernel.shmmax", "kernel.shmmni", "kernel.shm_rmid_forced",
)  # fmt: skip
_ULIMITS = (
    "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice",
    "nofile", "nproc", "rss", "rtprio", "rttime", "sigpending", "stack",
)  # fmt: skip


def body_of(flags: dict[str, Any], image: str, command: Sequence[str], *, detach: bool) -> dict[str, Any]:
    """The body for `flags` (parameter name to value, see `flags.py`). Raises InvalidRequest, naming the flag."""
    attached = _attached(flags, detach=detach)
    stdin = bool(flags["interactive"])
    body: dict[str, Any] = {
        "Hostname": flags["hostname"] or "",
        "Domainname": flags["domainname"] or "",
        "User": flags["user"] or "",
        "AttachStdin": "stdin" in attached,
        "AttachStdout": "stdout" in attached,
        "AttachStderr": "stderr" in attached,
        "Tty": bool(flags["tty"]),
        "OpenStdin": stdin,
        "StdinOnce": stdin and "stdin" in attached,
        "Env": env_list(flags["env_file"], flags["env"]) or None,
        "Cmd": list(command) or None,
        "Image": image,
        "Volumes": {},
        "WorkingDir": flags["workdir"] or "",
        "Entrypoint": None if flags["entrypoint"] is None else [flags["entrypoint"]],
        "OnBuild": None,
        "Labels": key_values("--label", flags["label_file"], flags["label"]),
    }
    if flags["stop_signal"]:
        body["StopSignal"] = flags["stop_signal"]
    if flags["stop_timeout"] is not None:
        body["StopTimeout"] = flags["stop_timeout"]
    if check := policies.health(flags):
        body["Healthcheck"] = check
    exposed, bindings = networking.ports(flags["publish"], flags["expose"])
    if exposed:
        body["ExposedPorts"] = exposed
    mode, endpoints = networking.attachments(flags)
    body["HostConfig"] = {**_host(flags, body["Volumes"]), "PortBindings": bindings, "NetworkMode": mode}
    body["NetworkingConfig"] = {"EndpointsConfig": endpoints}
    return body


def _attached(flags: dict[str, Any], *, detach: bool) -> set[str]:
    chosen = {name.lower() for name in flags["attach"]}
    for name in chosen - set(STREAMS):
        raise InvalidRequest(f"invalid value for --attach: '{name}'", hint="use stdin, stdout or stderr")
    if detach:
        if chosen:
            raise InvalidRequest("--attach and --detach exclude each other", hint="leave one of them out")
        return set()
    chosen = chosen or {"stdout", "stderr"}
    return chosen | {"stdin"} if flags["interactive"] else chosen


def _host(flags: dict[str, Any], volumes: dict[str, Any]) -> dict[str, Any]:
    options, masked, read_only = security(flags["security_opt"])
    host: dict[str, Any] = {
        **_NEUTRAL,
        "Binds": mounts.binds(flags["volume"], volumes) or None,
        "VolumesFrom": list(flags["volumes_from"]) or None,
        "VolumeDriver": flags["volume_driver"] or "",
        "ContainerIDFile": flags["cidfile"] or "",
        "LogConfig": _log(flags["log_driver"], flags["log_opt"]),
        "Links": list(flags["link"]) or None,
        "PublishAllPorts": bool(flags["publish_all"]),
        "AutoRemove": bool(flags["auto_remove"]),
        "CapAdd": capabilities(flags["cap_add"]) or None,
        "CapDrop": capabilities(flags["cap_drop"]) or None,
        "Dns": _addresses("--dns", flags["dns"]),
        "DnsOptions": list(flags["dns_option"]),
        "DnsSearch": list(flags["dns_search"]),
        "ExtraHosts": [extra_host(text) for text in flags["add_host"]] or None,
        "GroupAdd": list(flags["group_add"]) or None,
        "IpcMode": flags["ipc"] or "",
        "OomScoreAdj": flags["oom_score_adj"] or 0,
        "PidMode": flags["pid"] or "",
        "Privileged": bool(flags["privileged"]),
        "ReadonlyRootfs": bool(flags["read_only"]),
        "SecurityOpt": options if flags["security_opt"] else None,
        "UTSMode": flags["uts"] or "",
        "ShmSize": _size(flags, "shm_size"),
        "RestartPolicy": policies.restart(flags["restart"], removes=bool(flags["auto_remove"])),
        "BlkioWeight": flags["blkio_weight"] or 0,
        **block_limits(flags),
        "CgroupParent": flags["cgroup_parent"] or "",
        "CpuShares": flags["cpu_shares"] or 0,
        "Memory": _size(flags, "memory"),
        "NanoCpus": nano_cpus(flags["cpus"]),
        "CpusetCpus": flags["cpuset_cpus"] or "",
        "Devices": [mounts.device(text) for text in flags["device"]],
        "MemorySwap": _swap(flags),
        "PidsLimit": flags["pids_limit"] or 0,
        "Ulimits": [ulimit(text) for text in flags["ulimit"]],
        "MaskedPaths": masked,
        "ReadonlyPaths": read_only,
    }
    optional = {
        "Tmpfs": mounts.tmpfs(flags["tmpfs"]),
        "Mounts": [mounts.mount(text) for text in flags["mount"]],
        "StorageOpt": key_values("--storage-opt", (), flags["storage_opt"]),
        "Annotations": key_values("--annotation", (), flags["annotation"]),
        "Sysctls": _sysctls(flags["sysctl"]),
        "Runtime": _runtime(flags["isolation"], flags["runtime"]),
    }
    host.update({key: value for key, value in optional.items() if value})
    if flags["init"] is not None:
        host["Init"] = flags["init"]
    return host


# What docker sends for flags that this command does not have.
_NEUTRAL: dict[str, Any] = {
    "PortBindings": {}, "VolumeDriver": "", "VolumesFrom": None,
    "ConsoleSize": [0, 0], "CgroupnsMode": "", "Cgroup": "", "Links": None, "PublishAllPorts": False, "UsernsMode": "",
    "Isolation": "", "CpuPeriod": 0, "CpuQuota": 0,
    "CpuRealtimePeriod": 0, "CpuRealtimeRuntime": 0, "CpusetMems": "", "DeviceCgroupRules": None, "DeviceRequests": None,
    "MemoryReservation": 0, "MemorySwappiness": -1, "OomKillDisable": False, "CpuCount": 0, "CpuPercent": 0,
    "IOMaximumIOps": 0, "IOMaximumBandwidth": 0,
}  # fmt: skip


def changes_of(flags: dict[str, Any]) -> dict[str, Any]:
    """The body of `POST /containers/ID/update`: what is given alone."""
    body = {
        "Memory": _size(flags, "memory"),
        "MemoryReservation": _size(flags, "memory_reservation"),
        "MemorySwap": _swap(flags),
        "NanoCpus": nano_cpus(flags["cpus"]),
        "CpuPeriod": flags["cpu_period"],
        "CpuQuota": flags["cpu_quota"],
        "CpuShares": flags["cpu_shares"],
        "CpusetCpus": flags["cpuset_cpus"],
        "CpusetMems": flags["cpuset_mems"],
        "BlkioWeight": flags["blkio_weight"],
        "PidsLimit": flags["pids_limit"],
        "RestartPolicy": policies.restart(flags["restart"]) if flags["restart"] else None,
        "StorageOpt": key_values("--storage-opt", (), flags["storage_opt"]),
    }
    return {key: value for key, value in body.items() if value}


def _swap(flags: dict[str, Any]) -> int:
    return -1 if flags["memory_swap"] == "-1" else _size(flags, "memory_swap")


def _runtime(isolation: str | None, runtime: str | None) -> str:
    if isolation and runtime and isolation != runtime:
        raise InvalidRequest(
            f"--isolation {isolation} and --runtime {runtime} exclude each other", hint="leave one of them out"
        )
    return isolation or runtime or ""


def _size(flags: dict[str, Any], name: str) -> int:
    text = flags[name]
    return humanize.parse_size("--" + name.replace("_", "-"), text) if text else 0


def nano_cpus(text: str | None) -> int:
    """Billionths of a CPU of `1.5`. Raises InvalidRequest, also for more than nine decimals."""
    if not text:
        return 0
    whole, _, fraction = text.partition(".")
    if not text.isascii() or not (whole + fraction).isdigit() or len(fraction) > 9:
        raise InvalidRequest(f"invalid value for --cpus: '{text}'", hint="a number of CPUs looks like 2 or 0.5")
    return int(whole or "0") * 10**9 + int(f"{fraction:0<9}")


def capabilities(names: Sequence[str]) -> list[str]:
    """`names` under their full names, sorted, each once. What ALL and both lists together mean is the engine's to say."""
    upper = (name.strip().upper() for name in names)
    return sorted({name if name == "ALL" or name.startswith("CAP_") else f"CAP_{name}" for name in upper})


def security(options: Sequence[str]) -> tuple[list[str], list[str] | None, list[str] | None]:
    """(SecurityOpt, MaskedPaths, ReadonlyPaths); a seccomp profile is read here, because the engine may not see the file."""
    kept: list[str] = []
    paths: list[str] | None = None
    for option in options:
        if option == "systempaths=unconfined":
            paths = []
            continue
        name, separator, value = option.partition("=" if "=" in option else ":")
        if not separator and name != "no-new-privileges":
            raise InvalidRequest(f"invalid value for --security-opt: '{option}'", hint="options look like NAME=VALUE")
        if name == "seccomp" and value not in ("unconfined", "builtin"):
            kept.append(f"seccomp={_profile(value)}")
        else:
            kept.append(option)
    return kept, paths, paths


def _profile(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return json.dumps(json.load(file), separators=(",", ":"))
    except OSError as error:
        raise from_os_error("cannot read the seccomp profile", error) from error
    except ValueError as error:
        raise InvalidRequest(f"the seccomp profile {path} is no JSON: {error}") from None


def _log(driver: str | None, options: Sequence[str]) -> dict[str, Any]:
    config = key_values("--log-opt", (), options)
    if driver == "none" and config:
        raise InvalidRequest("--log-driver none takes no --log-opt", hint="leave --log-opt out")
    return {"Type": driver or "", "Config": config}


def _addresses(flag: str, texts: Sequence[str]) -> list[str]:
    return [_address(flag, text.strip()) for text in texts]


def _address(flag: str, text: str) -> str:
    """`text` when it is an IPv4 or IPv6 address, without a zone."""
    if is_address(text):
        return text
    raise InvalidRequest(f"invalid value for {flag}: '{text}' is no IP address", hint=f"as in {flag} 192.0.2.1")


def extra_host(text: str) -> str:
    """`name:ip` of `name:ip`, `name=ip` or `name=[ip]`."""
    name, separator, address = text.partition("=") if "=" in text else text.partition(":")
    if not separator or not name:
        raise InvalidRequest(f"invalid value for --add-host: '{text}'", hint="as in --add-host db:192.0.2.1")
    if address.startswith("[") and address.endswith("]"):
        address = address[1:-1]
    return f"{name}:{address if address == 'host-gateway' else _address('--add-host', address)}"


def ulimit(text: str) -> dict[str, Any]:
    """`nofile=1024:2048` as docker's object. Raises InvalidRequest."""
    name, separator, values = text.partition("=")
    soft, _, hard = values.partition(":")
    if name not in _ULIMITS or not separator:
        raise InvalidRequest(f"invalid value for --ulimit: '{text}'", hint="as in --ulimit nofile=1024:2048")
    try:
        low = int(soft)
        high = int(hard) if hard else low
    except ValueError:
        raise InvalidRequest(f"invalid value for --ulimit: '{text}' has no number", hint="-1 is no limit") from None
    if high >= 0 and (low > high or low < 0):
        raise InvalidRequest(f"invalid value for --ulimit: '{text}': the soft limit is above the hard one")
    return {"Name": name, "Hard": high, "Soft": low}


def _sysctls(texts: Sequence[str]) -> dict[str, str]:
    for text in texts:
        name = text.partition("=")[0]
        if "=" not in text or not (name.startswith(_SYSCTL_PREFIXES) or name in _SYSCTLS):
            hint = "namespaced ones are net.*, fs.mqueue.* and kernel.{msg*,sem,shm*}"
            raise InvalidRequest(f"invalid value for --sysctl: '{text}' cannot be set for one instance", hint=hint)
    return key_values("--sysctl", (), texts)


def write_cidfile(path: str, instance_id: str) -> None:
    """Write the id to `path`, which `check_cidfile` has found free."""
    try:
        with open(path, "x", encoding="ascii") as file:
            file.write(instance_id)
    except OSError as error:
        raise from_os_error("cannot write the file of --cidfile", error) from error


def check_cidfile(path: str) -> None:
    if os.path.lexists(path):
        raise InvalidRequest(f"the file of --cidfile exists already: {path}", hint=f"rm {path}")
