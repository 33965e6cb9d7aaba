"""What a running VM can change, and the figures of its VMM: values alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ambi.core.errors import InvalidRequest, Unsupported
from ambi.core.model import InstanceId, Isolation, VmShape
from ambi.core.plan import LaunchPlan, Layers
from hyper.guest.protocol import SetupTag
from hyper.qemu import argv, monitor
from hyper.vm import live
from hyper.vm.hardware import Hardware, Memory, Nic, Volume
from tests.driverkit import oci_config


def plan_of(**resources: Any) -> LaunchPlan:
    config = oci_config(["true"], resources=resources)
    here = Path("/nowhere")
    shape = VmShape(vcpus=2, memory_bytes=256 << 20)
    return LaunchPlan(InstanceId("a" * 64), Isolation.VM, config, Layers((), here), here, here, here, here, vm=shape)


def test_a_change_is_merged_and_only_it_is_told() -> None:
    plan = plan_of(memory={"limit": 100 << 20, "swap": -1}, cpu={"quota": 50_000, "period": 100_000}, pids={"limit": 7})
    change = {"memory": {"limit": 64 << 20, "swap": 0}, "cpu": {"quota": 80_000}}
    changed = live.updated(plan, change)
    assert changed.config["linux"]["resources"]["memory"] == {"limit": 64 << 20, "swap": -1}
    assert live.limits(changed, change) == [
        (SetupTag.MEMORY, 64 << 20), (SetupTag.CPU_QUOTA, 80_000), (SetupTag.CPU_PERIOD, 100_000),
    ]  # fmt: skip
    assert plan.config["linux"]["resources"]["memory"]["limit"] == 100 << 20
    assert live.limits(live.updated(plan, {"pids": {"limit": -1}}), {"pids": {"limit": -1}}) == [
        (SetupTag.PIDS, live.NO_LIMIT)
    ]
    assert live.limits(live.updated(plan, {}), {}) == []


@pytest.mark.parametrize(
    ("change", "kind", "named"),
    [
        ({"memory": {"limit": 257 << 20}}, Unsupported, "256 MiB, cannot become 257 MiB: its monitor"),
        ({"cpu": {"quota": 200_001}}, Unsupported, "2 CPUs"),
        ({"cpu": {"cpus": "0-1"}}, Unsupported, "cpu.cpus"),
        ({"memory": {"reservation": 1}}, Unsupported, "memory.reservation"),
        ({"blockIO": {"weight": 1}}, Unsupported, "blockIO.weight"),
        ({"pids": 3}, InvalidRequest, "pids"),
    ],
)
def test_what_cannot_change_is_named(change: dict[str, Any], kind: type[Exception], named: str) -> None:
    with pytest.raises(kind, match=named):
        live.updated(plan_of(), change)


def test_more_memory_is_what_the_limit_needs_beyond_the_boot() -> None:
    most = 1 << 30
    for limit, more in ((100, 0), (160, 0), (161, 4), (200, 44), (416, 260)):
        change = {"memory": {"limit": limit << 20}}
        changed = live.updated(plan_of(), change, most)
        assert live.more_memory(changed) == more << 20, limit
        assert live.limits(changed, change) == [(SetupTag.MEMORY, limit << 20)]
    with pytest.raises(Unsupported, match="began with 256 MiB cannot become 1200 MiB: 1184 MiB are the most"):
        live.updated(plan_of(), {"memory": {"limit": 1200 << 20}}, most)
    assert live.more_memory(plan_of()) == 0
    assert live.updated(plan_of(memory={"limit": 4 << 30}), {"pids": {"limit": 3}}, most)


def test_cpus_on_line_are_those_that_the_quota_needs() -> None:
    for cpu, count in (({}, 2), ({"quota": -1}, 2), ({"quota": 1}, 1), ({"quota": 100_000}, 1), ({"quota": 100_001}, 2),
                       ({"quota": 50_000, "period": 20_000}, 2)):  # fmt: skip
        assert live.cpus(plan_of(cpu=cpu)) == count


@pytest.mark.parametrize(
    "stats", [None, {}, [None, 1, {"qdev": "x"}, {"qdev": "x", "stats": {"rd_bytes": "a", "wr_bytes": -1}}]]
)
def test_figures_of_a_strange_vmm_are_none(stats: Any) -> None:
    assert monitor.block_bytes(stats) == (0, 0)


def test_figures_are_those_of_all_disks_with_a_device() -> None:
    one = {"qdev": "/machine/a", "stats": {"rd_bytes": 5, "wr_bytes": 7}}
    bare = {"node-name": "file", "stats": one["stats"]}
    assert monitor.block_bytes([one, {**one, "qdev": "/machine/b"}, bare]) == (10, 14)


def test_network_devices_and_volumes_are_inherited_by_number() -> None:
    machine = Hardware(
        "x", True, 1, 256 << 20, 1, 3, 4, 5, 6, 7,
        nics=(Nic(b"\2\0\0\0\0\1", 10, 11), Nic(b"\2\0\0\0\0\2", 12, None)),
        volumes=(Volume("volume3", 13, readonly=True),),
    )  # fmt: skip
    assert {10, 11, 12, 13} <= set(machine.fds)
    words = argv.build("qemu", machine)
    assert "virtio-balloon-device,free-page-reporting=on" in words
    copy = argv.build("qemu", machine._replace(memory=Memory(20, shared=False)))
    assert not any("balloon" in word for word in copy), "QEMU cannot give pages of a file back that it may not change"
    assert "tap,id=nic0,fd=10,vhost=on,vhostfd=11" in words and "tap,id=nic1,fd=12,vhost=off" in words
    assert "virtio-net-device,netdev=nic1,mac=02:00:00:00:00:02" in words
    assert "virtio-blk-device,drive=volume3,serial=volume3" in words
    assert any("node-name=volume3,read-only=on" in word and "/dev/fdset/13" in word for word in words)
