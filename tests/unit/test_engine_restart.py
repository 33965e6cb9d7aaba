"""Restart policies, health checks and updates as values: what they want, what they mean, what has changed."""

from __future__ import annotations

import threading
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from ambi.cli import policies
from ambi.core.errors import Conflict, InvalidRequest
from ambi.engine import update
from ambi.engine.healthcheck import Check, check_of, merged
from ambi.engine.restart import Policy, policy_of
from ambi.engine.schedule import Scheduler
from runtime.cgroups.hierarchies import Hierarchies, Hierarchy
from runtime.cgroups.v1 import V1Group
from runtime.cgroups.v2 import V2Group

SECOND = 10**9


@pytest.mark.parametrize(
    ("policy", "code", "count", "wanted"),
    [
        (Policy("no"), 1, 0, False),
        (Policy("always"), 0, 100, True),
        (Policy("unless-stopped"), 0, 0, True),
        (Policy("on-failure"), 0, 0, False),
        (Policy("on-failure"), 1, 1000, True),
        (Policy("on-failure", 2), 1, 1, True),
        (Policy("on-failure", 2), 1, 2, False),
    ],
)
def test_what_a_policy_wants(policy: Policy, code: int, count: int, wanted: bool) -> None:
    assert policy.wants(code, count) is wanted


def test_the_policy_of_a_host_config() -> None:
    assert policy_of({}) == policy_of({"RestartPolicy": {"Name": ""}}) == Policy("no")
    assert policy_of({"RestartPolicy": {"Name": "on-failure", "MaximumRetryCount": 3}}) == Policy("on-failure", 3)


def test_a_health_check_with_dockers_defaults() -> None:
    assert check_of({"Healthcheck": {"Test": ["CMD", "a", "b"]}}) == Check(("a", "b"), 30.0, 30.0, 0.0, 5.0, 3)
    shell = {"Shell": ["/bin/ash", "-ec"], "Healthcheck": {"Test": ["CMD-SHELL", "a | b"], "Interval": SECOND, "Retries": 1}}
    assert check_of(shell) == Check(("/bin/ash", "-ec", "a | b"), 1.0, 30.0, 0.0, 5.0, 1)
    nothing: tuple[dict[str, Any], ...] = ({}, {"Test": ["NONE"]}, {"Interval": SECOND})
    assert [check_of({"Healthcheck": body}) for body in nothing] == [None] * 3 and check_of({}) is None


def test_a_health_check_over_that_of_the_image() -> None:
    image = {"Test": ["CMD", "a"], "Interval": SECOND, "Retries": 5}
    assert merged(None, image) == image and merged({}, None) is None
    assert merged({"Interval": 2 * SECOND}, image) == {**image, "Interval": 2 * SECOND}
    assert check_of({"Healthcheck": merged({"Test": ["NONE"]}, image)}) is None


def test_changes_name_what_differs_and_what_goes_with_it() -> None:
    old = {"memory": {"limit": 1, "swap": 2}, "cpu": {"shares": 512}, "pids": {"limit": 5}}
    assert update.changes(old, old) == {}
    new = {"memory": {"limit": 2, "swap": 2}, "cpu": {"shares": 512, "quota": 1000, "period": 100_000}}
    assert update.changes(old, new) == {
        "memory": {"limit": 2, "swap": 2},
        "cpu": {"quota": 1000, "period": 100_000},
        "pids": {"limit": -1},
    }


def test_an_update_sets_only_what_it_names() -> None:
    host = {"Memory": 100, "PidsLimit": 5, "RestartPolicy": {"Name": "always"}}
    neutral = {"Memory": 0, "Devices": [], "CpusetCpus": "", "RestartPolicy": {"Name": "", "MaximumRetryCount": 0}}
    assert update.merged(host, {**neutral, "PidsLimit": None}) == host
    assert update.merged(host, {**neutral, "PidsLimit": -5, "CpuShares": 2}) == {**host, "PidsLimit": -1, "CpuShares": 2}


@pytest.mark.parametrize(
    ("host", "asked", "error", "text"),
    [
        ({}, {"Privileged": True}, InvalidRequest, "HostConfig.Privileged cannot be changed"),
        ({"NanoCpus": 1}, {"CpuQuota": 5000}, Conflict, "CPU Quota cannot be updated as NanoCPUs has already been set"),
        ({"CpuPeriod": 1000}, {"NanoCpus": 5000}, Conflict, "NanoCPUs cannot be updated as CPU Period has already been set"),
        ({"AutoRemove": True}, {"RestartPolicy": {"Name": "always"}}, Conflict, "AutoRemove is enabled"),
        ({}, {"RestartPolicy": {"Name": 5}}, InvalidRequest, "RestartPolicy.Name must be a string"),
        ({}, {"PidsLimit": "5"}, InvalidRequest, "PidsLimit must be a whole number"),
    ],
)
def test_an_update_that_cannot_be(host: dict[str, Any], asked: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        update.merged(host, asked)


@pytest.mark.parametrize("text", [":3", "on-failure:", "on-failure:x", "always:1.5"])
def test_policies_that_are_none(text: str) -> None:
    with pytest.raises(InvalidRequest, match="invalid value for --restart"):
        policies.restart(text)


def test_rm_and_restart_exclude_each_other() -> None:
    with pytest.raises(InvalidRequest, match="--restart and --rm"):
        policies.restart("always", removes=True)
    assert policies.restart("no", removes=True) == {"Name": "no", "MaximumRetryCount": 0}


@pytest.mark.parametrize(("text", "error"), [("-1s", "cannot be negative"), ("soon", "is no duration")])
def test_health_times_that_are_none(text: str, error: str) -> None:
    flags = dict.fromkeys(("health_cmd", "health_timeout", "health_start_period", "health_start_interval", "health_retries"))
    with pytest.raises(InvalidRequest, match=f"--health-interval.*{error}"):
        policies.health({**flags, "health_interval": text, "no_healthcheck": False})


def test_actions_come_in_their_order_and_one_that_fails_stops_nobody() -> None:
    scheduler, done = Scheduler(), threading.Event()
    seen: list[str] = []

    def fail() -> None:
        raise RuntimeError("of one instance")

    def last() -> None:
        seen.append("last")
        done.set()

    cancelled = scheduler.later(0.02, lambda: seen.append("cancelled"))
    scheduler.later(0.04, last)
    scheduler.later(0.0, fail)
    scheduler.later(0.0, lambda: seen.append("first"))
    scheduler.cancel(cancelled)
    assert done.wait(20) and seen == ["first", "last"]
    scheduler.close()
    scheduler.later(0.0, lambda: seen.append("closed"))
    assert seen == ["first", "last"]


def test_block_figures_of_both_versions(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "io.stat").write_text("8:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0\n253:1 rbytes=5\n7:0\n")
    usage = V2Group(Hierarchies((), str(tmp_path)), PurePosixPath("/x")).usage()
    assert (usage.block_read_bytes, usage.block_write_bytes) == (15, 20)
    text = "8:0 Read 1\n8:0 Write 2\n8:0 Sync 3\n8:0 Total 3\n7:0 Read 10\nTotal 13\n"
    (tmp_path / "x" / "blkio.throttle.io_service_bytes_recursive").write_text(text)
    usage = V1Group(Hierarchies((Hierarchy(str(tmp_path), ("blkio",)),), ""), PurePosixPath("/x")).usage()
    assert (usage.block_read_bytes, usage.block_write_bytes) == (11, 2)


@pytest.mark.parametrize(
    ("old", "new", "size"),
    [({}, {}, 0), ({"size": "20g"}, {"size": "20g"}, 0), ({}, {"size": "20g"}, 20 << 30), ({}, {"size": "10g"}, 0)],
)
def test_the_disk_of_a_vm_grows(old: dict[str, str], new: dict[str, str], size: int) -> None:
    host = {"Runtime": "vm"}
    assert update.disk_bytes({**host, "StorageOpt": old}, {**host, "StorageOpt": new}) == size


def test_a_disk_that_cannot_change() -> None:
    for old, new, text in (
        ({"Runtime": "vm"}, "9g", "cannot shrink from 10240 MiB to 9216 MiB"),
        ({"Runtime": "vm", "StorageOpt": {"size": "3g"}}, "2g", "cannot shrink from 3072 MiB to 2048 MiB"),
        ({"Runtime": "vm"}, "much", "invalid size"),
        ({}, "20g", "cannot be changed for a container"),
    ):
        with pytest.raises(InvalidRequest, match=text) as caught:
            update.disk_bytes(old, {**old, "StorageOpt": {"size": new}})
        assert caught.value.hint
