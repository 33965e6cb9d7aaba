"""What the engine accepts of Docker's create request, refuses by the flag's name, and completes from the image."""

from typing import Any

import pytest

from ambi.core.errors import InvalidRequest
from ambi.core.model import Isolation
from ambi.engine import request
from ambi.engine.body import Body
from ambi.engine.types import CreateSpec

ID = "ab" * 32

# What docker 28.2.2 sends for `docker run IMAGE` without a flag.
CLI_DEFAULTS: dict[str, Any] = {
    "Binds": None, "ContainerIDFile": "", "LogConfig": {"Type": "", "Config": {}}, "NetworkMode": "none",
    "PortBindings": {}, "RestartPolicy": {"Name": "no", "MaximumRetryCount": 0}, "AutoRemove": False, "VolumeDriver": "",
    "VolumesFrom": None, "ConsoleSize": [0, 0], "CapAdd": None, "CapDrop": None, "CgroupnsMode": "", "Dns": [],
    "DnsOptions": [], "DnsSearch": [], "ExtraHosts": None, "GroupAdd": None, "IpcMode": "", "Cgroup": "", "Links": None,
    "OomScoreAdj": 0, "PidMode": "", "Privileged": False, "PublishAllPorts": False, "ReadonlyRootfs": False,
    "SecurityOpt": None, "UTSMode": "", "UsernsMode": "", "ShmSize": 0, "Isolation": "", "CpuShares": 0, "Memory": 0,
    "NanoCpus": 0, "CgroupParent": "", "BlkioWeight": 0, "BlkioWeightDevice": [], "BlkioDeviceReadBps": [],
    "CpuPeriod": 0, "CpuQuota": 0, "CpuRealtimePeriod": 0, "CpuRealtimeRuntime": 0, "CpusetCpus": "", "CpusetMems": "",
    "Devices": [], "DeviceCgroupRules": None, "DeviceRequests": None, "MemoryReservation": 0, "MemorySwap": 0,
    "MemorySwappiness": -1, "OomKillDisable": False, "PidsLimit": 0, "Ulimits": [], "CpuCount": 0, "CpuPercent": 0,
    "IOMaximumIOps": 0, "IOMaximumBandwidth": 0, "MaskedPaths": None, "ReadonlyPaths": None,
}  # fmt: skip


def spec(config: dict[str, Any] | None = None, **host: Any) -> CreateSpec:
    return CreateSpec(config or {"Image": "x"}, {**CLI_DEFAULTS, **host}, {})


def test_the_clients_defaults_pass_without_a_warning() -> None:
    assert request.check(spec()) == []


def test_networks_and_ports_pass_without_a_warning() -> None:
    host = {"NetworkMode": "bridge", "PortBindings": {"80/tcp": [{"HostPort": "80"}]}, "Links": ["a:b"]}
    assert request.check(spec({"Image": "x", "MacAddress": "02:00:00:00:00:01"}, **host)) == []


@pytest.mark.parametrize(
    "host,flag",
    [
        ({"RestartPolicy": {"Name": "sometimes"}}, "restart policy"),
        ({"BlkioWeight": 10, "Runtime": "vm"}, "--blkio-weight"),
        ({"BlkioDeviceReadBps": [{"Path": "/dev/null", "Rate": 1}], "Runtime": "vm"}, "--device-read-bps"),
        ({"DeviceRequests": [{"Count": -1}]}, "--gpus"),
        ({"MemorySwappiness": 10}, "--memory-swappiness"),
        ({"OomKillDisable": True}, "--oom-kill-disable"),
        ({"CgroupParent": "/x", "Runtime": "vm"}, "--cgroup-parent"),
        ({"UsernsMode": "private"}, "--userns"),
        ({"PidMode": "container:"}, "--pid"),
        ({"IpcMode": "container:"}, "--ipc"),
        ({"IpcMode": "shareable", "Runtime": "vm"}, "--ipc"),
        ({"IpcMode": "container:one", "Runtime": "vm"}, "--ipc"),
        ({"FutureField": 1}, "HostConfig.FutureField"),
        ({"Runtime": "kata"}, "runtime name: kata"),
    ],
)
def test_what_does_not_work_is_refused_by_its_name(host: dict[str, Any], flag: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        request.check(spec(**host))
    assert flag in caught.value.message


@pytest.mark.parametrize(
    "host,flag",
    [
        ({"NetworkMode": "host"}, "--network host"),
        ({"NetworkMode": "container:x"}, "--network container:x"),
        ({"PidMode": "host"}, "--pid host"),
        ({"PidMode": "container:x"}, "--pid container:x"),
        ({"Devices": [{"PathOnHost": "/dev/null"}]}, "--device"),
        ({"CpusetCpus": "0"}, "--cpuset-cpus"),
    ],
)
def test_what_a_vm_cannot_do_is_refused_for_a_vm_alone(host: dict[str, Any], flag: str) -> None:
    assert request.check(spec(**host)) == []
    with pytest.raises(InvalidRequest) as caught:
        request.check(spec(Runtime="vm", **host))
    assert flag in caught.value.message and "VM" in caught.value.message


@pytest.mark.parametrize(
    "config",
    [
        {"Image": "x", "Healthcheck": {"Test": ["MAYBE", "true"]}},
        {"Image": "x", "Healthcheck": {"Test": ["CMD", "true"], "Interval": 10}},
        {"Image": "x", "MacAddress": "02:00:00:00:00"},
        {"Image": "x", "MacAddress": "01:00:00:00:00:01"},
        {"Image": "x", "ExposedPorts": {"80/ftp": {}}},
        {"Image": "x", "Env": ["=x"]},
        {"Image": "x", "Env": "A=1\0"},
        {"Image": 3},
        {"Image": "x", "StopTimeout": "soon"},
    ],
)
def test_wrong_or_unsupported_config_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        request.check(spec(config))
        Body("Config", config).text("Image")


@pytest.mark.parametrize(
    "name,isolation", [("", Isolation.CONTAINER), ("runc", Isolation.CONTAINER), ("container", Isolation.CONTAINER),
                       ("vm", Isolation.VM)]
)  # fmt: skip
def test_the_runtime_picks_the_isolation(name: str, isolation: Isolation) -> None:
    assert request.isolation_of(Body("HostConfig", {"Runtime": name})) is isolation


IMAGE = {"Entrypoint": ["/entry"], "Cmd": ["default"], "Env": ["PATH=/bin", "A=image"], "User": "alice",
         "WorkingDir": "/srv", "Labels": {"a": "image", "b": "image"}, "StopSignal": "SIGINT"}  # fmt: skip


def completed(config: dict[str, Any], image: dict[str, Any] = IMAGE) -> dict[str, Any]:
    return request.complete(CreateSpec({"Image": "x", **config}, {}, {}), image, ID).config


@pytest.mark.parametrize(
    "config,argv",
    [
        ({}, ("/entry", "default")),
        ({"Cmd": ["own"]}, ("/entry", "own")),
        ({"Cmd": "own words"}, ("/entry", "own words")),
        ({"Entrypoint": ["/mine"]}, ("/mine",)),
        ({"Entrypoint": ["/mine"], "Cmd": ["own"]}, ("/mine", "own")),
        ({"Entrypoint": [""], "Cmd": ["own"]}, ("own",)),
        ({"Entrypoint": [], "Cmd": ["own"]}, ("own",)),
    ],
)
def test_entrypoint_and_command_merge_as_dockers(config: dict[str, Any], argv: tuple[str, ...]) -> None:
    assert request.argv_of(completed(config)) == argv


def test_the_rest_comes_from_the_image_unless_given() -> None:
    got = completed({"Env": ["A=own", "B=own"], "Labels": {"b": "own"}})
    assert got["Env"] == ["A=own", "B=own", "PATH=/bin"]
    assert got["Labels"] == {"a": "image", "b": "own"}
    assert (got["User"], got["WorkingDir"], got["StopSignal"]) == ("alice", "/srv", "SIGINT")
    assert got["Hostname"] == ID[:12]
    assert completed({"User": "bob", "Hostname": "h"})["User"] == "bob"


def test_no_command_at_all_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no command specified"):
        completed({}, {})


def test_the_clients_own_dictionaries_are_not_changed() -> None:
    config = {"Image": "x", "Cmd": ["a"]}
    request.complete(CreateSpec(config, {}, {}), IMAGE, ID)
    assert config == {"Image": "x", "Cmd": ["a"]}
