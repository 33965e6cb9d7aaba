"""For the same flags, `ambi create` asks the engine for what the docker CLI asks it for, field by field."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.recorder import Recorder, recording
from tests.harness import AMBI

FILES = Path(__file__).parent / "files"

UNORDERED = ("Binds", "Ulimits", "Mounts", "Env")  # docker keeps these in maps, and sends them in any order

CASES = {
    "nothing": "busybox",
    "command": "busybox ls -l --color -- -x",
    "interactive": "-i busybox cat",
    "terminal": "-t busybox",
    "both": "-i -t busybox sh",
    "attach stdin": "-a stdin -i busybox",
    "attach stdout": "--attach stdout busybox",
    "attach upper case": "-a STDERR busybox",
    "switches with values": "--rm=true -i=false --tty=1 --read-only=false busybox",
    "init": "--init busybox",
    "no init": "--init=false busybox",
    "env": "-e A=1 --env B= -e C=a=b -e FROM_OUTSIDE -e NOT_SET_ANYWHERE busybox",
    "env file": "--env-file FILES/env -e A=flag busybox",
    "labels": "-l a -l b=1 --label b=2 --label-file FILES/labels busybox",
    "entrypoint": "--entrypoint /bin/sh busybox -c true",
    "empty entrypoint": "--entrypoint= busybox true",
    "user": "-u daemon:audio -w /tmp --group-add 5 --group-add audio busybox",
    "names": "-h box --domainname example.org busybox",
    "hosts": "--add-host a:192.0.2.1 --add-host b=192.0.2.2 --add-host c:2001:db8::1 --add-host d=[2001:db8::2] busybox",
    "dns": "--dns 192.0.2.53 --dns 2001:db8::53 --dns-option ndots:2 --dns-opt timeout:1 --dns-search example.org busybox",
    "network none": "--network none busybox",
    "network host": "--net host busybox",
    "network": "--network web busybox",
    "network address": "--network web --network-alias x --net-alias y --ip 10.1.0.4 --ip6 fd00::4 busybox",
    "link-local addresses": "--network web --link-local-ip 169.254.1.1 --link-local-ip 169.254.1.2 busybox",
    "networks": "--network name=web,alias=a,alias=b,ip=10.1.0.5,mac-address=02:42:ac:11:00:02,driver-opt=x=y --network z b",
    "network priority": "--network name=web,ip6=fd00::7,gw-priority=3,link-local-ip=fe80::9 busybox",
    "network of another": "--network container:x busybox",
    "mac": "--mac-address 02:42:ac:11:00:09 busybox",
    "mac on a network": "--mac-address 02:42:ac:11:00:09 --network web busybox",
    "links": "--link db:alias --link x busybox",
    "links on a network": "--link db:alias --network web busybox",
    "ports": "-p 80 -p 8080:80 -p 127.0.0.1:81:81/udp -p 9000-9002:9000-9002 -p 7000-7005:70 -p [::1]:5:5/sctp busybox",
    "port of an address": "-p 127.0.0.1::80 --publish target=22,published=2222,protocol=tcp busybox",
    "port ranges": "-p 8000-8001:80-81 -p 1-2:3-4/udp busybox",
    "exposed": "-P --expose 80 --expose 90-92/udp busybox",
    "ports of the host": "-p 80 --network host busybox",
    "namespaces": "--ipc host --pid host --uts host busybox",
    "ipc none": "--ipc none busybox",
    "volume": "-v /srv:/data -v /etc/hosts:/h:ro -v ./x:/y:rw busybox",
    "anonymous volume": "-v /data busybox",
    "named volume": "-v data:/data busybox",
    "mount": "--mount type=bind,src=/srv,dst=/data,readonly --mount type=bind,src=/a,target=/b,bind-propagation=shared -t x",
    "mount volume": "--mount src=v,dst=/v,volume-nocopy,volume-label=a=b,volume-opt=type=tmpfs --mount type=volume,dst=/w x",
    "mount volume subpath": "--mount type=volume,src=v,dst=/v,volume-subpath=a/b,volume-driver=local,ro busybox",
    "mount recursion": "--mount type=bind,src=/a,dst=/b,bind-recursive=writable,ro --volume-driver local busybox",
    "volumes from": "--volumes-from a --volumes-from b:ro busybox",
    "mount tmpfs": "--mount type=tmpfs,dst=/t,tmpfs-size=64m,tmpfs-mode=0700 --mount type=tmpfs,destination=/u busybox",
    "tmpfs": "--tmpfs /run --tmpfs /tmp:rw,size=1m busybox",
    "device": "--device /dev/fuse --device /dev/null:/dev/a --device /dev/zero:r --device /dev/full:/dev/b:rw busybox",
    "capabilities": "--cap-add net_admin --cap-add CAP_SYS_TIME --cap-drop mknod --cap-drop NET_ADMIN busybox",
    "all capabilities": "--cap-drop all --cap-add chown --cap-add ALL busybox",
    "privileged": "--privileged busybox",
    "security": "--security-opt no-new-privileges --security-opt seccomp=unconfined busybox",
    "security with colon": "--security-opt no-new-privileges:true busybox",
    "seccomp file": "--security-opt seccomp=FILES/seccomp.json busybox",
    "system paths": "--security-opt systempaths=unconfined busybox",
    "restart": "--restart always busybox",
    "restart a number of times": "--restart on-failure:3 busybox",
    "restart no": "--restart no --rm busybox",
    "health": "--health-cmd true --health-interval 1m30s --health-timeout 500ms --health-retries 2 busybox",
    "health start": "--health-start-period 5s --health-start-interval 100ms busybox",
    "no health check": "--no-healthcheck busybox",
    "memory": "-m 64m --memory-swap 1.5g --shm-size 32M busybox",
    "memory in bytes": "--memory 67108864 --memory-swap -1 busybox",
    "cpu": "--cpus 1.5 -c 512 --cpuset-cpus 0-1 busybox",
    "small cpu": "--cpus .01 busybox",
    "pids": "--pids-limit 50 busybox",
    "no pids limit": "--pids-limit -1 busybox",
    "ulimit": "--ulimit nofile=1024:2048 --ulimit core=0 --ulimit memlock=-1:-1 busybox",
    "storage": "--storage-opt size=10G busybox",
    "sysctl": "--sysctl net.ipv4.ip_forward=1 --sysctl kernel.shmmax=1 busybox",
    "oom": "--oom-score-adj -500 busybox",
    "stop": "--stop-signal USR1 --stop-timeout 3 busybox",
    "log": "--log-driver json-file --log-opt max-size=1m --log-opt max-file=2 busybox",
    "no log": "--log-driver none busybox",
    "runtime": "--runtime vm busybox",
    "name": "--name web busybox",
    "cidfile": "--cidfile CIDFILE busybox",
}


EXACT_SINCE = (28, 0)  # an older command line has null for some empty lists, and fields that are gone
NEWER = (
    "hosts",
    "volume",
    "capabilities",
    "all capabilities",
    "networks",
    "network priority",
    "mac",
    "mac on a network",
)  # what it refuses, or sends as it was typed
NEUTRAL: tuple[Any, ...] = (None, [], {}, "", 0, False)


@functools.cache
def docker_version() -> tuple[int, ...]:
    text = subprocess.run(["docker", "--version"], capture_output=True, text=True, check=True).stdout
    return tuple(int(part) for part in text.split()[2].split("+")[0].rstrip(",").split(".")[:2])


def cases() -> list[str]:
    """Those that the docker CLI of this machine knows; without one, all, for the account of skips."""
    old = shutil.which("docker") is not None and docker_version() < EXACT_SINCE
    return [case for case in CASES if not old or case not in NEWER]


@pytest.fixture
def recorder(short_tmp: Path) -> Iterator[Recorder]:
    with recording(short_tmp / "s") as it:
        yield it


def _create(argv: list[str], environment: dict[str, str], recorder: Recorder) -> tuple[str, dict[str, Any]]:
    """The query and the body of the create request that `argv` sends."""
    before = len(recorder.requests)
    done = subprocess.run(
        argv,
        check=False,
        env={**os.environ, "FROM_OUTSIDE": "yes", **environment},
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr.decode()
    (request,) = (r for r in recorder.requests[before:] if r.path == "/containers/create")
    return request.target.partition("?")[2], request.json()


def _comparable(body: dict[str, Any]) -> dict[str, Any]:
    for part in (body, body["HostConfig"]):
        part.update({name: sorted(part[name], key=str) for name in UNORDERED if part.get(name)})
    return body


def _flat(body: dict[str, Any]) -> dict[str, Any]:
    """One level, so that a difference is shown by its own name."""
    return {**body, "HostConfig": None, **{f"HostConfig.{k}": v for k, v in body["HostConfig"].items()}}


@pytest.mark.needs("docker")
@pytest.mark.parametrize("case", cases())
def test_same_body_as_docker(case: str, recorder: Recorder, short_tmp: Path) -> None:
    words = [w.replace("FILES", str(FILES)).replace("CIDFILE", str(short_tmp / "cid")) for w in CASES[case].split()]
    query, body = _create(["docker", "create", *words], {"DOCKER_HOST": f"unix://{recorder.path}"}, recorder)
    (short_tmp / "cid").unlink(missing_ok=True)
    our_query, ours = _create([str(AMBI), "create", *words], {"AMBI_SOCKET": str(recorder.path)}, recorder)
    ours, body = _flat(_comparable(ours)), _flat(_comparable(body))
    if docker_version() < EXACT_SINCE:
        body.pop("NetworkingConfig"), ours.pop("NetworkingConfig")  # it says nothing of the default network
        ours, body = ({k: v for k, v in it.items() if v not in NEUTRAL} for it in (ours, body))
    assert ours == body
    assert our_query == query


def test_isolation_is_the_runtime(recorder: Recorder) -> None:
    _, body = _create([str(AMBI), "create", "--isolation", "vm", "busybox"], {"AMBI_SOCKET": str(recorder.path)}, recorder)
    assert body["HostConfig"]["Runtime"] == "vm"


def test_detached_run(recorder: Recorder) -> None:
    """`run -d` attaches nothing; both start what they created and wait for nothing but the start."""
    for argv, variable in ((["docker"], "DOCKER_HOST"), ([str(AMBI)], "AMBI_SOCKET")):
        prefix = "unix://" if variable == "DOCKER_HOST" else ""
        _, body = _create([*argv, "run", "-d", "-i", "busybox"], {variable: f"{prefix}{recorder.path}"}, recorder)
        fields = ("AttachStdin", "AttachStdout", "AttachStderr", "OpenStdin", "StdinOnce")
        assert [body[name] for name in fields] == [False, False, False, True, False]
        assert recorder.requests[-1].path.endswith("/start")
