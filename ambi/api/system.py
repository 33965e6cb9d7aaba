"""What the engine says of itself, and the parts of Docker's API that are not here."""

from __future__ import annotations

import os
import platform
import time
from typing import Any

from ambi.api import containers, image_shapes, instance_shapes, volumes
from ambi.api.exchange import API_VERSION, COMMON_HEADERS, MIN_API_VERSION, Call, Reply, json_reply
from ambi.api.router import Route
from ambi.api.stats import host_memory_bytes
from ambi.api.words import rfc3339_nano
from ambi.core.errors import NotFound, Unavailable, Unsupported
from ambi.core.model import Isolation
from ambi.engine.newnetwork import DRIVERS
from ambi.shim import drivers

_PING_HEADERS = (
    *COMMON_HEADERS,
    ("Builder-Version", "1"),
    ("Cache-Control", "no-cache, no-store, must-revalidate"),
    ("Content-Type", "text/plain; charset=utf-8"),
    ("Pragma", "no-cache"),
    ("Swarm", "inactive"),
)
_PONG = Reply(200, b"OK", _PING_HEADERS)


def ping(call: Call) -> Reply:
    return _PONG


def version(call: Call) -> Reply:
    info, host = call.engine.info(), os.uname()
    newest, oldest = ("{}.{}".format(*pair) for pair in (API_VERSION, MIN_API_VERSION))
    common = {"Arch": "amd64", "GitCommit": "", "GoVersion": "", "KernelVersion": host.release, "Os": "linux"}
    details = {
        "Experimental": "true",
        "ApiVersion": newest,
        "MinAPIVersion": oldest,
        "Python": platform.python_version(),
        **common,
    }
    return json_reply({
        "Platform": {"Name": "ambi"},
        "Components": [{"Name": "Engine", "Version": info.version, "Details": details}],
        "Version": info.version,
        "ApiVersion": newest,
        "MinAPIVersion": oldest,
        "BuildTime": "",
        "Experimental": True,  # docker's word for an engine with checkpoints
        **common,
    })  # fmt: skip


def info(call: Call) -> Reply:
    it, host = call.engine.info(), os.uname()
    form, reason = it.layer_form
    return json_reply({
        "ID": it.engine_id,
        "Containers": it.running + it.paused + it.stopped,
        "ContainersRunning": it.running,
        "ContainersPaused": it.paused,
        "ContainersStopped": it.stopped,
        "Images": it.images,
        "Driver": "ambi",
        "DriverStatus": [["Layers", form], ["Because", reason]],
        "Plugins": {"Volume": ["local"], "Network": [*DRIVERS, "host", "null"], "Authorization": None,
                    "Log": ["json-file", "none"]},
        "MemoryLimit": True, "SwapLimit": True, "CpuCfsPeriod": True, "CpuCfsQuota": True, "CPUShares": True,
        "CPUSet": True, "PidsLimit": True, "IPv4Forwarding": True, "OomKillDisable": False,
        "BridgeNfIptables": False, "BridgeNfIp6tables": False,
        "Debug": False, "NFd": len(os.listdir("/proc/self/fd")), "NGoroutines": 0, "NEventsListener": 0,
        "SystemTime": rfc3339_nano(time.time_ns()),
        "LoggingDriver": "json-file",
        "CgroupDriver": "cgroupfs",
        "CgroupVersion": str(it.cgroup_version),
        "KernelVersion": host.release,
        "OperatingSystem": _operating_system(),
        "OSVersion": "",
        "OSType": "linux",
        "Architecture": host.machine,
        "IndexServerAddress": "https://index.docker.io/v1/",
        "RegistryConfig": {
            "AllowNondistributableArtifactsCIDRs": None, "AllowNondistributableArtifactsHostnames": None,
            "InsecureRegistryCIDRs": ["127.0.0.0/8"], "IndexConfigs": {}, "Mirrors": [],
        },
        "NCPU": os.cpu_count() or 1,
        "MemTotal": host_memory_bytes(),
        "GenericResources": None,
        "DockerRootDir": str(it.data_root),
        "HttpProxy": "", "HttpsProxy": "", "NoProxy": "",
        "Name": host.nodename,
        "Labels": [],
        "ExperimentalBuild": True,
        "ServerVersion": it.version,
        "Runtimes": {name.value: _runtime(name) for name in Isolation},
        "DefaultRuntime": "container",
        "Swarm": {"NodeID": "", "NodeAddr": "", "LocalNodeState": "inactive", "ControlAvailable": False, "Error": "",
                  "RemoteManagers": None},
        "LiveRestoreEnabled": True,
        "Isolation": "",
        "InitBinary": "ambi-init",
        "ContainerdCommit": {"ID": "", "Expected": ""},
        "RuncCommit": {"ID": "", "Expected": ""},
        "InitCommit": {"ID": "", "Expected": ""},
        "SecurityOptions": ["name=seccomp,profile=builtin"],
        "Warnings": None,
    })  # fmt: skip


def _runtime(isolation: Isolation) -> dict[str, Any]:
    """Docker's Runtime; `status` is what the driver tells of this host, a VM's accelerator for one."""
    features = drivers.load(isolation.value).probe()
    status = {"problem": features.problem.message} if features.problem else features.details
    return {"path": isolation.value, "status": status}


def _operating_system() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        return "Linux"


def disk_usage(call: Call) -> Reply:
    """Space by kind. A layer that images share is told with each of them, and counted once in LayersSize.

    LayersReclaimable is ours: bytes of layers that no instance needs.
    """
    engine, instances = call.engine, call.engine.list(True, {})
    images = engine.images.list()
    users = [instance.image_id for instance in instances]
    rows = [{**instance_shapes.summary(it), **containers.sizes(engine, it)} for it in instances]
    usage = engine.images.usage()
    shown = [
        {**image_shapes.summary(it, call.version, users.count(it.id)), "SharedSize": usage.shared.get(it.id, 0)}
        for it in images
    ]
    return json_reply({
        "LayersSize": usage.layers_bytes,
        "LayersReclaimable": usage.reclaimable_bytes,
        "Images": shown,
        "Containers": rows,
        "Volumes": [volumes.with_usage(engine.volumes, it) for it in engine.volumes.all()],
        "BuildCache": [],
        "BuilderSize": 0,
    })  # fmt: skip


def no_plugins(call: Call) -> Reply:
    return json_reply([])


def no_plugin(call: Call) -> Reply:
    raise NotFound(f'plugin "{call.name}" not found')


def no_swarm(call: Call) -> Reply:
    raise Unavailable("This node is not a swarm manager.", hint="ambi has no swarm mode")


def no_build(call: Call) -> Reply:
    raise Unsupported("building is not available yet", hint="build elsewhere, then `docker save IMAGE | ambi image load`")


def prune_builds(call: Call) -> Reply:
    """Nothing is kept of builds, and `docker system prune` asks for it last."""
    return json_reply({"CachesDeleted": None, "SpaceReclaimed": 0})


def _swarm_routes() -> tuple[Route, ...]:
    nouns = ("services", "tasks", "nodes", "secrets", "configs")
    whole = [Route("GET", f"/{noun}", no_swarm) for noun in (*nouns, "swarm")]
    return (*whole, *(Route("GET", f"/{noun}/{{}}", no_swarm) for noun in nouns))


ROUTES = (
    Route("GET", "/_ping", ping),
    Route("GET", "/version", version),
    Route("GET", "/info", info),
    Route("GET", "/system/df", disk_usage),
    Route("POST", "/build", no_build),
    Route("POST", "/build/prune", prune_builds),
    Route("GET", "/plugins", no_plugins),
    Route("GET", "/plugins/{}/json", no_plugin),
    *_swarm_routes(),
)
