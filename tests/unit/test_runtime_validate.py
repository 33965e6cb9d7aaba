"""What the container driver refuses before anything is made, and that each refusal names its cause."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from ambi.core.model import IdMap, IdRange, InstanceId, Isolation
from ambi.core.plan import Directory, LaunchPlan, Layer, Layers
from runtime import validate
from tests.driverkit import oci_config


def plan(tmp_path: Path, change: dict[str, Any] | None = None, **fields: Any) -> LaunchPlan:
    """A good plan, with `change` merged into its config (None removes)."""
    config = oci_config(["true"])
    config["linux"]["cgroupsPath"] = "/ambi/x"
    base = LaunchPlan(
        id=InstanceId("a" * 64),
        isolation=Isolation.CONTAINER,
        config=_merged(config, change or {}),
        rootfs=Directory(tmp_path),
        data_dir=tmp_path,
        run_dir=tmp_path,
        layers_dir=tmp_path,
        guest_dir=tmp_path,
    )
    return base._replace(**fields)


def _merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    found = copy.deepcopy(base)
    for key, value in change.items():
        if value is None:
            found.pop(key, None)
        elif isinstance(value, dict) and isinstance(found.get(key), dict):
            found[key] = _merged(found[key], value)
        else:
            found[key] = value
    return found


def test_a_good_plan(tmp_path: Path) -> None:
    assert validate.problems_of(plan(tmp_path)) == []


@pytest.mark.parametrize(
    "change,words",
    [
        ({"ociVersion": "2.0.0"}, "ociVersion 2.0.0"),
        ({"linux": {"cgroupsPath": None}}, "cgroupsPath"),
        ({"linux": None}, "linux"),
        ({"process": None}, "process"),
        ({"process": {"args": []}}, "process.args"),
        ({"process": {"args": [1]}}, "process.args"),
        ({"process": {"cwd": "relative"}}, "process.cwd: relative"),
        ({"process": {"scheduler": {"policy": "SCHED_FIFO"}}}, "process.scheduler"),
        ({"process": {"apparmorProfile": "docker-default"}}, "AppArmor"),
        ({"process": {"selinuxLabel": "x"}}, "SELinux"),
        ({"process": {"capabilities": {"bounding": ["CAP_X"]}}}, "CAP_X"),
        ({"hooks": {"prestart": [{"path": "/x"}]}}, "hooks.prestart"),
        ({"linux": {"namespaces": [{"type": "pid"}]}}, "mount namespace is required"),
        ({"linux": {"namespaces": [{"type": "mount", "path": "/x"}]}}, "cannot be joined"),
        ({"linux": {"namespaces": [{"type": "mount"}, {"type": "user"}]}}, "user"),
        ({"linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "pid"}]}}, "twice"),
        ({"linux": {"rootfsPropagation": "sideways"}}, "sideways"),
        ({"linux": {"sysctl": {"kernel.panic": "1"}}}, "kernel.panic"),
        ({"linux": {"namespaces": [{"type": "mount"}], "sysctl": {"net.ipv4.ip_forward": "1"}}}, "net.ipv4.ip_forward"),
        ({"linux": {"namespaces": [{"type": "mount"}], "sysctl": {"kernel.shmmax": "1"}}}, "kernel.shmmax"),
        ({"linux": {"resources": {"hugepageLimits": [{}]}}}, "hugepageLimits"),
        ({"linux": {"resources": {"mystery": 1}}}, "mystery"),
        ({"linux": {"resources": {"memory": {"kernel": 5}}}}, "memory.kernel"),
        ({"linux": {"resources": {"cpu": {"realtimeRuntime": 5}}}}, "realtimeRuntime"),
        ({"linux": {"resources": {"blockIO": {"throttleReadBpsDevice": [{}]}}}}, "malformed: KeyError: 'major'"),
        ({"linux": {"resources": {"blockIO": {"weight": "a"}}}}, "malformed"),
        ({"linux": {"resources": {"blockIO": {"leafWeight": 10}}}}, "blockIO.leafWeight"),
        (
            {"linux": {"seccomp": {"defaultAction": "SCMP_ACT_ALLOW", "flags": ["SECCOMP_FILTER_FLAG_NEW_LISTENER"]}}},
            "LISTENER",
        ),
        ({"linux": {"devices": [{"path": "/dev/x", "type": "q"}]}}, "/dev/x"),
        ({"linux": {"devices": [{}]}}, "malformed"),
        ({"mounts": [{"destination": "/x", "type": "ceph"}]}, "ceph"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    if words in ("AppArmor", "SELinux") and any(
        Path(p).is_dir() for p in ("/sys/kernel/security/apparmor", "/sys/fs/selinux")
    ):
        change = {"process": {"args": []}}  # this host has one: then the label is fine, and something else is refused
        words = "process.args"
    problems = validate.problems_of(plan(tmp_path, change))
    assert problems and words in problems[0].message


def test_roots_that_are_not_there(tmp_path: Path) -> None:
    missing = Layers((Layer("gone", "dir", tmp_path / "gone", 0),), tmp_path)
    for root, words in ((Directory(tmp_path / "no"), "/no is not a directory"), (missing, "layer gone")):
        problems = validate.problems_of(plan(tmp_path, rootfs=root))
        assert problems and words in problems[0].message


def test_user_namespaces(tmp_path: Path) -> None:
    ids = (IdRange(0, 100_000, 65_536),)
    problems = validate.problems_of(plan(tmp_path, id_map=IdMap(ids, ids)))
    assert problems and "user namespaces" in problems[0].message
