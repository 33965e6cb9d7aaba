"""docs/guest-fields.md says what is refused in a guest; this holds it to the driver."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from ambi.core.model import InstanceId, Isolation
from ambi.core.plan import LaunchPlan, Layers
from hyper import validate
from tests.driverkit import oci_config

PAGE = Path(__file__).parents[2] / "docs" / "guest-fields.md"
BIND = {"destination": "/x", "type": "bind", "source": "/", "options": ["bind"]}
ALL = ("mount", "pid", "network", "ipc", "uts", "cgroup")

# Where in config.json -> a value that asks for something
REFUSED: dict[str, Any] = {
    "process.apparmorProfile": "docker-default",
    "process.selinuxLabel": "system_u:system_r:x",
    "process.scheduler": {"policy": "SCHED_FIFO"},
    "process.ioPriority": {"class": "IOPRIO_CLASS_IDLE"},
    "process.execCPUAffinity": {"initial": "0"},
    "mounts": [
        [{"destination": "/x", "type": "nfs", "source": "a:/b"}],
        *([{**BIND, "options": ["bind", option]}] for option in ("shared", "rshared", "slave", "rslave", "idmap", "ridmap")),
    ],
    "hooks": {"prestart": [{"path": "/bin/true"}]},
    "linux.namespaces": [
        [{"type": kind} for kind in ALL if kind != "network"],
        [{"type": kind, **({"path": "/proc/self/ns/net"} if kind == "network" else {})} for kind in ALL],
        [{"type": kind, **({"path": "/proc/1/ns/ipc"} if kind == "ipc" else {})} for kind in ALL],
        [{"type": kind} for kind in (*ALL, "user")],
        [{"type": kind} for kind in (*ALL, "time")],
    ],
    "linux.resources.memory.reservation": 1 << 20,
    "linux.resources.memory.kernel": 1 << 20,
    "linux.resources.cpu.cpus": "0",
    "linux.resources.cpu.mems": "0",
    "linux.resources.cpu.realtimeRuntime": 1,
    "linux.resources.blockIO": {"weight": 10},
    "linux.resources.network": {"classID": 1},
    "linux.resources.hugepageLimits": [{"pageSize": "2MB", "limit": 1}],
    "linux.resources.rdma": {"mlx": {"hcaHandles": 1}},
    "linux.resources.unified": {"memory.high": "1"},
    "linux.devices": [{"path": "/dev/x", "type": "c", "major": 1, "minor": 3}],
    "linux.rootfsPropagation": "rshared",
    "linux.uidMappings": [{"containerID": 0, "hostID": 1, "size": 1}],
    "linux.gidMappings": [{"containerID": 0, "hostID": 1, "size": 1}],
    "linux.timeOffsets": {"boottime": {"secs": 1}},
    "linux.mountLabel": "system_u:object_r:x",
    "linux.personality": {"domain": "LINUX32"},
    "linux.memoryPolicy": {"mode": "MPOL_BIND"},
    "linux.intelRdt": {"closID": "x"},
}
SEVERAL = ("mounts", "linux.namespaces")  # whose value is a list of examples


def _plan(tmp_path: Path, field: str = "", value: Any = None) -> LaunchPlan:
    config = oci_config(["true"])
    config["linux"]["cgroupsPath"] = "/ambi/x"
    if field:
        *parents, name = field.split(".")
        place = config
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = value
    return LaunchPlan(
        InstanceId("a" * 64), Isolation.VM, config, Layers((), tmp_path), tmp_path, tmp_path, tmp_path, tmp_path
    )


@pytest.mark.parametrize("field", REFUSED)
def test_refused(tmp_path: Path, field: str) -> None:
    assert validate.problems(_plan(tmp_path)) == []
    for value in REFUSED[field] if field in SEVERAL else [REFUSED[field]]:
        found = validate.problems(_plan(tmp_path, field, value))
        assert found, value
        assert field in SEVERAL or any(field.removeprefix("linux.").split(".")[0] in p.message for p in found), found


@pytest.mark.parametrize("value", ["private", "rprivate", "unbindable", "runbindable", ""])
def test_propagation_that_a_guest_has(tmp_path: Path, value: str) -> None:
    assert validate.problems(_plan(tmp_path, "linux.rootfsPropagation", value)) == []


def test_the_page_lists_what_is_refused_and_nothing_else() -> None:
    prefix, listed = "", set()
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            prefix = {"process": "process.", "linux": "linux."}.get(line[3:], "")
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 3 and cells[1] == "refused":
            names = re.findall(r"`([^`]+)`", cells[0])
            listed |= {prefix + name for name in (names[:1] if names[0] in ("mounts", "namespaces") else names)}
    assert listed == set(REFUSED)
