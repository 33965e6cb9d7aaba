"""What the container driver reads: mounts, users, devices, limits, hierarchies, plans; nothing here touches the kernel."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest

from ambi.core.errors import InvalidRequest, Unsupported
from ambi.linux import capabilities, mount, paths
from runtime import attach, devices, finish, mounts, users
from runtime.cgroups import blocks, v1, v2
from runtime.cgroups.hierarchies import Hierarchies, Hierarchy, read_mounts

# Mounts

TABLE = r"""20 1 0:30 / / rw - overlay overlay rw
21 20 0:31 / /proc rw - proc proc rw
30 20 8:1 /src /a\040b\134\134040c rw,relatime - ext4 /dev/sda1 rw
31 30 0:40 / /a\040b\134\134040c/below rw master:1 - tmpfs tmpfs rw
32 31 0:41 / /a\040b\134\134040c/below/deep rw - tmpfs tmpfs rw
33 20 0:42 / /other rw - tmpfs tmpfs rw
"""


def test_a_mount_and_what_is_below_it() -> None:
    found = attach.below(TABLE, 30)
    assert [line.number for line in found] == [30, 31, 32]
    assert [line.place for line in found][:2] == ["/a b\\\\040c", "/a b\\\\040c/below"]
    assert attach.below(TABLE, 99) == [] and len(attach.below(TABLE, 20)) == 6


def parse(kind: str = "bind", options: tuple[str, ...] = (), destination: str = "/x") -> mounts.Mount:
    return mounts.parse({"destination": destination, "type": kind, "source": "/s", "options": list(options)})


def test_later_flags_win() -> None:
    found = parse(options=("rbind", "ro", "nosuid", "suid", "rw", "noexec"))
    assert (found.set, found.clear) == (
        mount.MOUNT_ATTR_NOEXEC,
        mount.MOUNT_ATTR_RDONLY | mount.MOUNT_ATTR_NOSUID,
    )
    assert parse(options=("rw", "ro")).set == mount.MOUNT_ATTR_RDONLY


def test_recursive_flags_and_propagation() -> None:
    found = parse(options=("rbind", "rro", "rslave"))
    assert (found.set, found.set_all, found.propagation, found.propagation_recursive) == (
        0, mount.MOUNT_ATTR_RDONLY, mount.MS_SLAVE, True,
    )  # fmt: skip
    assert not parse(options=("bind", "shared")).propagation_recursive
    assert (parse(options=("bind",)).recursive, parse(options=("rbind",)).recursive) == (False, True)


def test_options_of_a_file_system() -> None:
    found = parse("tmpfs", ("nosuid", "size=1m", "mode=1777", "huge"))
    assert found.options == (("size", "1m"), ("mode", "1777"), ("huge", None))


@pytest.mark.parametrize(
    "kind,options,destination,error",
    [
        ("bind", ("uid=0",), "/x", InvalidRequest),
        ("nfs", (), "/x", Unsupported),
        ("", (), "/x", Unsupported),
        ("tmpfs", (), "/", InvalidRequest),
        ("tmpfs", (), "/a/..", InvalidRequest),
        ("tmpfs", (), "/proc/x", InvalidRequest),
        ("bind", ("bind",), "/x/../proc/self", InvalidRequest),
    ],
)
def test_mounts_that_are_refused(kind: str, options: tuple[str, ...], destination: str, error: type[Exception]) -> None:
    with pytest.raises(error, match="mount at"):
        parse(kind, options, destination)


def test_some_files_of_proc_may_be_covered() -> None:
    assert parse(destination="/proc/cpuinfo").destination == "/proc/cpuinfo"


# Users


@pytest.fixture
def root(tmp_path: Path) -> Any:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "passwd").write_text(
        "root:x:0:0::/root:/bin/sh\nbroken:x:abc:0::/:\nalice:x:1000:1001::/home/alice:\n77:x:78:79::/seven:\n"
    )
    (tmp_path / "etc" / "group").write_text("root:x:0:\nstaff:x:50:bob,alice\nvideo:x:44:alice\nbad:x:y:alice\n")
    fd = os.open(tmp_path, paths.O_PATH)
    yield fd
    os.close(fd)


@pytest.mark.parametrize(
    "written,expected",
    [
        ("alice", (1000, 1001, (50, 44, 1001), "/home/alice")),
        ("1000", (1000, 1001, (50, 44, 1001), "/home/alice")),
        ("alice:staff", (1000, 50, (50,), "/home/alice")),
        ("alice:4", (1000, 4, (4,), "/home/alice")),
        ("5", (5, 0, (0,), "")),
        ("5:video", (5, 44, (44,), "")),
        ("77", (78, 79, (79,), "/seven")),
        (":50", (0, 50, (50,), "")),
    ],
)
def test_users(root: int, written: str, expected: tuple[Any, ...]) -> None:
    assert tuple(users.identify(root, {"username": written})) == expected


def test_additional_groups_come_last_and_once(root: int) -> None:
    assert users.identify(root, {"username": "alice", "additionalGids": [44, 9]}).groups == (50, 44, 9, 1001)


def test_additional_groups_by_name(root: int) -> None:
    assert users.identify(root, {"uid": 5, "gid": 6, "additionalGids": [9], "additionalGroups": ["video"]}).groups == (
        9,
        44,
        6,
    )
    assert users.identify(root, {"username": "alice:4", "additionalGroups": ["staff"]}).groups == (50, 4)
    with pytest.raises(InvalidRequest, match="Unable to find group nope"):
        users.identify(root, {"uid": 5, "additionalGroups": ["nope"]})


def test_numbers_without_a_name(root: int) -> None:
    assert tuple(users.identify(root, {"uid": 1000, "gid": 3, "additionalGids": [4]})) == (1000, 3, (4, 3), "/home/alice")


@pytest.mark.parametrize("written", ["bob", "broken", "alice:nope", "2147483648", "1:99999999999", "-1", "٣"])
def test_users_that_are_refused(root: int, written: str) -> None:
    with pytest.raises(InvalidRequest):
        users.identify(root, {"username": written})


# Process


def test_environment() -> None:
    nobody = users.Identity(5, 5, (), "")
    found = finish.environment({"env": ["A=1", "A=2", "B=x=y", "nothing", "=x"]}, nobody)
    assert found == {"A": "2", "B": "x=y", "HOME": "/"}
    assert finish.environment({"env": ["HOME=/h"]}, nobody)["HOME"] == "/h"


def test_capability_sets_name_the_unknown() -> None:
    with pytest.raises(InvalidRequest, match="CAP_FLY"):
        finish.capability_sets({"capabilities": {"bounding": ["CAP_FLY"]}})
    assert capabilities.names_of(capabilities.mask_of(["CAP_KILL", "CAP_BPF"])) == ["CAP_KILL", "CAP_BPF"]


# Devices


def test_rules() -> None:
    config = {"linux": {"resources": {"devices": [
        {"allow": False, "access": "rwm"}, {"allow": True, "type": "c", "major": 10, "minor": -1, "access": "rw"},
    ]}}}  # fmt: skip
    texts = [rule.text() for rule in devices.rules_of(config)]
    assert texts[:2] == ["a", "c 10:* rw"]
    assert {"c *:* m", "b *:* m", "c 1:3 rwm", "c 136:* rwm", "c 5:2 rwm"} <= set(texts[2:])


@pytest.mark.parametrize("entry", [{"type": "x"}, {"type": "c", "access": "q"}, {"type": "a", "major": 1}, {"access": "r"}])
def test_rules_that_are_refused(entry: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=r"linux\.resources\.devices"):
        devices.rules_of({"linux": {"resources": {"devices": [{"allow": True, **entry}]}}})


def test_nodes_replace_defaults() -> None:
    config = {
        "linux": {
            "devices": [{"path": "/dev/../dev/null", "type": "c", "major": 9, "minor": 9, "fileMode": 0o600, "uid": 3}]
        }
    }
    found = {node.path: node for node in devices.nodes_of(config)}
    assert found["/dev/null"] == devices.Node("/dev/null", "c", 9, 9, 0o600, 3, 0)
    assert len(found) == len(devices.DEFAULT_NODES)
    with pytest.raises(InvalidRequest, match="/dev/x"):
        devices.nodes_of({"linux": {"devices": [{"path": "/dev/x", "type": "z"}]}})


# Control groups

MOUNTINFO = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
33 31 0:30 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
36 31 0:33 / /sys/fs/cgroup/devices rw,relatime shared:9 - cgroup cgroup rw,devices
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,release_agent=/x,name=systemd
50 31 0:37 / /elsewhere/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw,nsdelegate
"""


def test_hierarchies() -> None:
    found = read_mounts(MOUNTINFO)
    assert found.v1 == (
        Hierarchy("/sys/fs/cgroup/cpu,cpuacct", ("cpu", "cpuacct")),
        Hierarchy("/sys/fs/cgroup/devices", ("devices",)),
        Hierarchy("/sys/fs/cgroup/systemd", ("name=systemd",)),
    )
    assert (found.v2, found.mode, found.of("cpuacct"), found.of("memory")) == (
        "/sys/fs/cgroup/unified", "hybrid", "/sys/fs/cgroup/cpu,cpuacct", None,
    )  # fmt: skip
    assert read_mounts("41 31 0:38 / /c rw - cgroup2 cgroup2 rw\n").mode == "v2"
    assert Hierarchies((), "").mode == "none"


LIMITS: dict[str, Any] = {
    "memory": {"limit": 100, "swap": 150, "reservation": 50, "swappiness": 10},
    "cpu": {"shares": 2048, "quota": 5000, "period": 10_000, "cpus": "0-1"},
    "pids": {"limit": -1},
}


def _given(rows: list[tuple[Any, ...]]) -> dict[str, str]:
    return {row[-2]: str(row[-1]) for row in rows if row[-1] is not None}


def test_limits_of_version_1() -> None:
    assert _given(v1._settings(LIMITS)) == {
        "memory.limit_in_bytes": "100", "memory.memsw.limit_in_bytes": "150", "memory.soft_limit_in_bytes": "50",
        "memory.swappiness": "10", "cpu.shares": "2048", "cpu.cfs_period_us": "10000", "cpu.cfs_quota_us": "5000",
        "cpuset.cpus": "0-1", "pids.max": "max",
    }  # fmt: skip


def test_limits_of_version_2() -> None:
    assert _given(v2._settings(LIMITS)) == {
        "memory.max": "100", "memory.swap.max": "50", "memory.low": "50", "cpu.weight": str(v2.weight_of(2048)),
        "cpu.max": "5000 10000", "cpuset.cpus": "0-1", "pids.max": "max",
    }  # fmt: skip


def test_block_io(tmp_path: Path) -> None:
    """Weights go to every scheduler that the kernel has; limits of devices need none."""
    disk = {"major": 8, "minor": 16}
    block = {
        "weight": 500, "weightDevice": [{**disk, "weight": 10}], "throttleReadBpsDevice": [{**disk, "rate": 7}],
        "throttleWriteIOPSDevice": [{**disk, "rate": 9}],
    }  # fmt: skip
    rates = {name: value for name, value in block.items() if name.startswith("throttle")}
    for version in (blocks.v1, blocks.v2):
        with pytest.raises(Unsupported, match="weight"):
            version(str(tmp_path), block)
        assert version(str(tmp_path), {}) == []
    for name in ("blkio.bfq.weight", "io.weight", "io.bfq.weight"):
        (tmp_path / name).touch()
    assert [row[1:] for row in blocks.v1(str(tmp_path), block)] == [
        ("blkio.bfq.weight", "500"), ("blkio.bfq.weight_device", "8:16 10"),
        ("blkio.throttle.read_bps_device", "8:16 7"), ("blkio.throttle.write_iops_device", "8:16 9"),
    ]  # fmt: skip
    assert [row[1:] for row in blocks.v2(str(tmp_path), block)] == [
        ("io.bfq.weight", "500"), ("io.bfq.weight", "8:16 10"), ("io.weight", str(1 + 490 * 9999 // 990)),
        ("io.weight", "8:16 1"), ("io.max", "8:16 rbps=7"), ("io.max", "8:16 wiops=9"),
    ]  # fmt: skip
    assert len(blocks.v2("/no", rates)) == 2


def test_zero_is_unset() -> None:
    nothing = {"memory": {"limit": 0, "swap": 0}, "cpu": {"shares": 0, "quota": 0, "period": 0}, "pids": {"limit": 0}}
    assert _given(v1._settings(nothing)) == {} == _given(v2._settings(nothing))


def test_weights() -> None:
    assert [v2.weight_of(shares) for shares in (2, 1024, 262_144)] == [1, 100, 10_000]
    weights = [v2.weight_of(2**n) for n in range(1, 19)]
    assert weights == sorted(weights) and math.isclose(weights[9], 100)
