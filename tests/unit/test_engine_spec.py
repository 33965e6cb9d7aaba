"""From a completed request to config.json."""

import json
from pathlib import Path
from typing import Any

import pytest

from ambi.core.errors import InvalidRequest
from ambi.core.model import InstanceId, Isolation
from ambi.core.plan import LaunchPlan, Layers
from ambi.core.roots import Roots
from ambi.engine import mounts, resources, security, spec
from ambi.engine.body import Body
from ambi.engine.mountpoints import Point
from ambi.engine.types import CreateSpec
from ambi.linux.capabilities import NAMES

ID = InstanceId("cd" * 32)
DATA = Path("/data/instances") / ID


def prepared(config: dict[str, Any] | None = None, isolation: Isolation = Isolation.CONTAINER, **host: Any) -> spec.Prepared:
    base = {"Image": "x", "Cmd": ["true"], "Hostname": "box", **(config or {})}
    return spec.prepare(ID, isolation, CreateSpec(base, host, {}), DATA)


def oci(config: dict[str, Any] | None = None, **host: Any) -> dict[str, Any]:
    return prepared(config, **host).config


def namespaces(config: dict[str, Any]) -> set[str]:
    return {entry["type"] for entry in config["linux"]["namespaces"]}


def mount_at(config: dict[str, Any], target: str) -> dict[str, Any]:
    found: dict[str, Any] = next(m for m in config["mounts"] if m["destination"] == target)
    return found


def test_a_default_container_has_dockers_isolation() -> None:
    config = oci()
    assert namespaces(config) == {"mount", "cgroup", "network", "uts", "pid", "ipc"}
    assert config["linux"]["cgroupsPath"] == f"/ambi/{ID}"
    assert config["process"]["capabilities"]["bounding"] == [name for name in NAMES if name in security.DEFAULT_CAPABILITIES]
    assert config["process"]["noNewPrivileges"] is False
    assert config["linux"]["seccomp"]["defaultAction"] == "SCMP_ACT_ERRNO"
    assert "/proc/kcore" in config["linux"]["maskedPaths"] and "/proc/sys" in config["linux"]["readonlyPaths"]
    assert config["linux"]["resources"]["devices"][0] == {"allow": False, "access": "rwm"}
    assert "ro" in mount_at(config, "/sys")["options"]
    assert mount_at(config, "/dev/shm")["options"][-1] == f"size={64 << 20}"


def test_privileged_lifts_what_dockers_does() -> None:
    config = oci(Privileged=True)
    assert config["process"]["capabilities"]["bounding"] == list(NAMES)
    assert "seccomp" not in config["linux"]
    assert config["linux"]["maskedPaths"] == config["linux"]["readonlyPaths"] == []
    assert config["linux"]["resources"]["devices"] == [{"allow": True, "access": "rwm"}]
    assert "ro" not in mount_at(config, "/sys")["options"]
    assert any(device["path"] == "/dev/null" for device in config["linux"]["devices"])


def test_host_modes_leave_the_namespace_out() -> None:
    assert namespaces(oci(NetworkMode="host")) == {"mount", "cgroup", "uts", "pid", "ipc"}
    assert namespaces(oci(PidMode="host", UTSMode="host", IpcMode="host")) == {"mount", "cgroup", "network"}
    assert mount_at(oci(IpcMode="host"), "/dev/shm")["type"] == "bind"
    assert all(m["destination"] != "/dev/shm" for m in oci(IpcMode="none")["mounts"])


@pytest.mark.parametrize(
    "add,drop,has,lacks",
    [
        (["NET_ADMIN"], None, "CAP_NET_ADMIN", "CAP_SYS_ADMIN"),
        (["cap_sys_time"], ["CHOWN"], "CAP_SYS_TIME", "CAP_CHOWN"),
        (["ALL"], ["SYS_ADMIN"], "CAP_SYS_MODULE", "CAP_SYS_ADMIN"),
        (["CHOWN"], ["ALL"], "CAP_CHOWN", "CAP_KILL"),
    ],
)
def test_capabilities_are_added_and_dropped(add: Any, drop: Any, has: str, lacks: str) -> None:
    names = security.capabilities(Body("HostConfig", {"CapAdd": add, "CapDrop": drop}))
    assert has in names and lacks not in names


def test_security_options() -> None:
    assert oci(SecurityOpt=["no-new-privileges"])["process"]["noNewPrivileges"] is True
    assert oci(SecurityOpt=["no-new-privileges:false"])["process"]["noNewPrivileges"] is False
    assert "seccomp" not in oci(SecurityOpt=["seccomp=unconfined"])["linux"]
    profile = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
        {"names": ["mkdir"], "action": "SCMP_ACT_ERRNO"},
        {"names": ["mount"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
        {"names": ["uname"], "action": "SCMP_ACT_ERRNO", "excludes": {"caps": ["CAP_SYS_ADMIN"]}},
        {"names": ["nanosleep"], "action": "SCMP_ACT_ERRNO", "includes": {"arches": ["s390x"]}},
        {"names": ["getpid"], "action": "SCMP_ACT_ERRNO", "includes": {"minKernel": "99.0"}},
    ]}  # fmt: skip
    rules = oci(SecurityOpt=[f"seccomp={json.dumps(profile)}"])["linux"]["seccomp"]["syscalls"]
    assert [rule["names"] for rule in rules] == [["mkdir"], ["uname"]]
    for wrong in ("seccomp={", "seccomp=[]", "apparmor=mine", "label=user:x"):
        with pytest.raises(InvalidRequest):
            oci(SecurityOpt=[wrong])


def test_limits_become_resources() -> None:
    found = oci(Memory=64 << 20, NanoCpus=500_000_000, PidsLimit=10, CpuShares=512)["linux"]["resources"]
    assert found["memory"] == {"limit": 64 << 20, "swap": 128 << 20}
    assert found["cpu"] == {"shares": 512, "quota": 50_000, "period": 100_000}
    assert found["pids"] == {"limit": 10}
    assert oci(Memory=64 << 20, MemorySwap=-1)["linux"]["resources"]["memory"]["swap"] == -1
    assert "memory" not in oci()["linux"]["resources"] and "pids" not in oci(PidsLimit=-1)["linux"]["resources"]


@pytest.mark.parametrize(
    "host,words",
    [
        ({"Memory": 1 << 20}, "Minimum memory limit allowed is 6MB"),
        ({"Memory": 64 << 20, "MemorySwap": 32 << 20}, "larger than memory limit"),
        ({"MemorySwap": 64 << 20}, "You should always set the Memory limit"),
        ({"NanoCpus": 1000 * 10**9}, "Range of CPUs is from 0.01"),
        ({"NanoCpus": 10**9, "CpuQuota": 5000}, "Conflicting options"),
        ({"CapAdd": ["FLY"]}, 'unknown capability: "CAP_FLY"'),
        ({"Ulimits": [{"Name": "fly", "Soft": 1, "Hard": 1}]}, "invalid ulimit type: fly"),
        ({"Ulimits": [{"Name": "nofile", "Soft": 2, "Hard": 1}]}, "less than or equal to hard limit"),
        ({"Sysctls": {"kernel.panic": "1"}}, "kernel.panic"),
        ({"Sysctls": {"net.x": "1"}, "NetworkMode": "host"}, "host network"),
        ({"Sysctls": {"net/../../x": "1"}}, "net/../../x"),
        ({"Devices": [{"PathOnHost": "/etc/passwd", "PathInContainer": "/x"}]}, "not a device node"),
        ({"CgroupParent": "/a/../b"}, "invalid --cgroup-parent '/a/../b'"),
        ({"CgroupParent": "/a\nb"}, "invalid --cgroup-parent"),
        ({"CgroupParent": f"/ambi/{ID}"}, "end with their instances"),
        ({"BlkioWeight": 1001}, "from 10 to 1000"),
        ({"BlkioWeightDevice": [{"Path": "/dev/null", "Weight": 10}]}, "/dev/null: not a block device"),
        ({"BlkioDeviceReadBps": [{"Path": "/dev/none", "Rate": 10}]}, "--device-read-bps /dev/none: no such file"),
        ({"IpcMode": "container:a", "Sysctls": {"kernel.shmmax": "1"}}, "ipc namespace of another container"),
        ({"Binds": ["data:/x:rslave"]}, "invalid mode: rslave"),
        ({"VolumesFrom": ["a:fly"]}, "invalid volumes-from"),
        ({"Binds": ["/a:relative"]}, "must be absolute"),
        ({"Binds": ["/a:/"]}, "destination can't be '/'"),
        ({"Binds": ["/a:/x/../.."]}, "destination can't be '/'"),
        ({"Binds": ["/a:/x:fly"]}, "invalid mode: fly"),
        ({"Binds": ["/a:/x"], "Tmpfs": {"/x": ""}}, "Duplicate mount point: /x"),
        ({"Mounts": [{"Type": "bind", "Source": "/no/such/thing", "Target": "/x"}]}, "bind source path does not exist"),
        ({"Mounts": [{"Type": "fly", "Target": "/x"}]}, "mount type unknown"),
        ({"Mounts": [{"Type": "volume", "Target": "/x", "Source": "v", "VolumeOptions": {"Subpath": "../y"}}]}, "inside"),
        ({"Tmpfs": {"/x": "upperdir=/etc"}}, "invalid tmpfs option"),
        ({"LogConfig": {"Type": "syslog"}}, "--log-driver syslog"),
        ({"LogConfig": {"Type": "json-file", "Config": {"compress": "true"}}}, "unknown log opt 'compress'"),
        ({"LogConfig": {"Type": "json-file", "Config": {"max-file": "3"}}}, "without max-size"),
        ({"ExtraHosts": ["x:1.2.3"]}, "bad format for add-host"),
        ({"ExtraHosts": ["x\n:1.2.3.4"]}, "bad format for add-host"),
        ({"Dns": ["1.2.3.4\nnameserver 5.6.7.8"]}, "not an IP address"),
        ({"GroupAdd": ["2147483648"]}, "--group-add 2147483648"),
        ({"OomScoreAdj": 2000}, "oom score adj"),
        ({"ShmSize": -1}, "SHM size"),
    ],
)
def test_wrong_values_are_refused_with_the_cause(host: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        oci(**host)
    assert words in caught.value.message


def test_where_its_control_group_is() -> None:
    assert oci()["linux"]["cgroupsPath"] == f"/ambi/{ID}"
    for parent in ("/jobs/a", "jobs//a/", "./jobs/a"):
        assert oci(CgroupParent=parent)["linux"]["cgroupsPath"] == f"/jobs/a/{ID}"
    assert oci(CgroupParent="/")["linux"]["cgroupsPath"] == f"/{ID}"


def test_the_environment_is_in_dockers_order() -> None:
    env = oci({"Env": ["A=1", "PATH=/bin", "GONE"], "Tty": True})["process"]["env"]
    assert env == ["PATH=/bin", "HOSTNAME=box", "TERM=xterm", "A=1"]
    assert oci({"Env": []})["process"]["env"][0] == spec.DEFAULT_PATH


def test_annotations_say_what_config_has_no_words_for() -> None:
    assert oci()["annotations"] == {}
    assert oci(Init=True, AutoRemove=True)["annotations"] == {"ambi.init": "1", "ambi.disposable": "1"}


def test_users_are_left_to_the_driver() -> None:
    assert oci({"User": "alice:staff"}, GroupAdd=["44", "video"])["process"]["user"] == {
        "uid": 0, "gid": 0, "username": "alice:staff", "additionalGids": [44], "additionalGroups": ["video"],
    }  # fmt: skip


def test_our_files_stay_away_from_the_clients_mounts() -> None:
    files = {str(f.path): f.content for f in prepared(ExtraHosts=["db:10.0.0.1"], Dns=["9.9.9.9"]).files}
    assert files["/etc/hostname"] == "box\n"
    assert files["/etc/hosts"].endswith("10.0.0.1\tdb\n") and "127.0.0.1\tlocalhost" in files["/etc/hosts"]
    assert "nameserver 9.9.9.9\n" in files["/etc/resolv.conf"]
    assert {str(f.path) for f in prepared(Binds=["/tmp:/etc/hosts"]).files} == {"/etc/hostname", "/etc/resolv.conf"}


def test_a_client_may_replace_default_mounts_and_outer_mounts_come_first() -> None:
    config = oci(Binds=["/tmp:/a/b/c", "/tmp:/a:ro"], Tmpfs={"/dev/shm": "exec,size=1m"})
    own = [m for m in config["mounts"] if m["destination"] in ("/a", "/a/b/c", "/dev/shm")]
    assert [m["destination"] for m in own] == ["/a", "/dev/shm", "/a/b/c"]
    assert own[0]["options"] == ["rbind", "rprivate", "ro", "rro"]
    assert own[1]["options"] == ["nosuid", "nodev", "exec", "size=1m"]


def test_a_missing_source_is_made_for_a_volume_and_for_nothing_else(tmp_path: Path) -> None:
    found = mounts.parse(Body("Config", {}), Body("HostConfig", {"Binds": [f"{tmp_path}/new/deep:/x"]}))
    mounts.make_sources(found.points)
    assert (tmp_path / "new/deep").is_dir()
    bind = Point("bind", "/x", "bind", str(tmp_path / "gone"), ("rbind",))
    with pytest.raises(InvalidRequest, match="does not exist"):
        mounts.make_sources((bind,))


@pytest.mark.parametrize(
    "host,vcpus,memory",
    [
        ({}, 1, 256 << 20),
        ({"Memory": 64 << 20}, 1, 256 << 20),
        ({"Memory": 512 << 20, "NanoCpus": 1_500_000_000}, 2, (512 << 20) + resources.GUEST_OVERHEAD_BYTES),
    ],
)
def test_the_shape_of_a_vm(host: dict[str, Any], vcpus: int, memory: int) -> None:
    shape = resources.vm_shape(Body("HostConfig", host))
    assert (shape.vcpus, shape.memory_bytes) == (vcpus, memory)


def test_a_vm_has_its_own_sysctls_and_no_host_devices() -> None:
    config = prepared(None, Isolation.VM, Sysctls={"kernel.panic": "1"}, Privileged=True).config
    assert config["linux"]["sysctl"]["kernel.panic"] == "1"
    assert config["linux"]["devices"] == []


def test_a_plan_survives_its_own_json() -> None:
    asked = CreateSpec({"Image": "x", "Cmd": ["a"], "Hostname": "h", "OpenStdin": True}, {"Init": True}, {})
    made = spec.prepare(ID, Isolation.VM, asked, DATA)
    plan = spec.plan(ID, Isolation.VM, asked, Layers((), DATA / "upper"), Roots(), made)
    again = LaunchPlan.from_json(plan.to_json())
    assert again == plan
    assert again.stdin and again.vm is not None and again.config["annotations"] == {"ambi.init": "1"}


def test_an_exec_takes_what_the_instance_has_and_its_own() -> None:
    asked = CreateSpec({"Image": "x", "Env": ["A=1", "B=2"], "User": "alice", "WorkingDir": "/srv"}, {}, {})
    process = spec.exec_process(asked, Body("ExecConfig", {"Cmd": ["id"], "Env": ["B=3"], "Tty": True}))
    assert process["env"][-2:] == ["TERM=xterm", "B=3"] and "A=1" in process["env"] and "B=2" not in process["env"]
    assert (process["user"]["username"], process["cwd"], process["args"]) == ("alice", "/srv", ["id"])
    raised = spec.exec_process(asked, Body("ExecConfig", {"Cmd": ["id"], "Privileged": True, "User": "0"}))
    assert raised["capabilities"]["effective"] == list(NAMES) and raised["user"]["username"] == "0"
