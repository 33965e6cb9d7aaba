"""Networks of real instances: addresses, names, ports, connect and disconnect, and what a kill of each process costs.

Every engine runs in a network namespace of its own (tests/harness.py), from which the test's sockets are opened too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ambi.network import namespaces
from tests.harness import EngineUnderTest

SECONDS = 30.0


class Networked(EngineUnderTest):
    """An engine whose clients' words are short."""

    def ok(self, *args: str) -> str:
        done = self.docker(*args)
        assert done.returncode == 0, (args, done.stderr.decode(), self.log())
        return done.stdout.decode().strip()

    def refused(self, *args: str) -> str:
        done = self.docker(*args)
        assert done.returncode != 0, (args, done.stdout.decode())
        return done.stderr.decode()

    def log(self) -> str:
        return (self.data / "engine.log").read_text()[-3000:]

    def inspect(self, name: str) -> Any:
        return json.loads(self.ok("inspect", name))[0]

    def address(self, name: str, network: str) -> str:
        return str(self.inspect(name)["NetworkSettings"]["Networks"][network]["IPAddress"])

    def fetch(self, address: str, port: int) -> bytes:
        """What a server of `serving` says, asked from the engine's own namespace; b"" when it cannot be reached."""

        def ask() -> bytes:
            try:
                with socket.create_connection((address, port), timeout=3) as sock:
                    return sock.recv(100)
            except OSError:
                return b""

        return namespaces.inside(self.netns, ask)

    def links(self) -> list[str]:
        def names() -> list[str]:
            return [name for _, name in socket.if_nameindex()]

        return namespaces.inside(self.netns, names)

    def table(self) -> str:
        argv = [*self.entering, "nft", "list", "ruleset"]
        return subprocess.run(argv, capture_output=True, check=True, text=True).stdout


@pytest.fixture(scope="module")
def engine(busybox_tar: Path) -> Iterator[Networked]:
    it = Networked(Path(tempfile.mkdtemp(prefix="ambi-", dir="/tmp")))
    it.start()
    it.ok("import", "-c", 'CMD ["true"]', str(busybox_tar), "busybox")
    yield it
    it.destroy()


@pytest.fixture
def clean(engine: Networked) -> Iterator[None]:
    """Nothing of the test before, and nothing afterwards but the default bridge."""
    yield
    listed = engine.ok("ps", "-aq").split()
    if listed:
        engine.ok("rm", "-f", *listed)
    engine.ok("network", "prune", "-f")


pytestmark = pytest.mark.usefixtures("clean")

SERVE = ["nc", "-ll", "-p", "80", "-e", "echo"]


def until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.2)


def serving(engine: Networked, name: str, *flags: str) -> None:
    """An instance that says its name to whoever connects to its port 80."""
    engine.ok("run", "-d", "--name", name, *flags, "busybox", *SERVE, name)
    network = next(iter(engine.inspect(name)["NetworkSettings"]["Networks"]))
    until(lambda: engine.fetch(engine.address(name, network), 80), f"{name} serves")


def connected(address: str, port: int) -> socket.socket:
    """A connection to a program that is about to listen."""
    end = time.monotonic() + SECONDS
    while True:
        try:
            return socket.create_connection((address, port), SECONDS)
        except ConnectionRefusedError:
            assert time.monotonic() < end, port
            time.sleep(0.2)


def test_the_default_bridge_and_the_others_know_each_other_by_address_and_by_name(engine: Networked) -> None:
    engine.ok("network", "create", "--label", "a=b", "web")
    serving(engine, "one", "--network", "web", "--network-alias", "db")
    serving(engine, "two", "--network", "web")
    shown = json.loads(engine.ok("network", "inspect", "web"))[0]
    assert {row["Name"] for row in shown["Containers"].values()} == {"one", "two"} and shown["Labels"] == {"a": "b"}
    short = engine.inspect("two")["Id"][:12]
    for name in ("db", "one", "one.web", engine.address("one", "web")):
        assert engine.ok("exec", "two", "nc", "-w", "3", name, "80") == "one"
    assert engine.ok("exec", "one", "nc", "-w", "3", short, "80") == "two"
    networks = engine.inspect("one")["NetworkSettings"]["Networks"]
    assert networks["web"]["Aliases"][0] == "db" and networks["web"]["DNSNames"][:2] == ["one", "db"]
    plain = engine.ok("run", "--rm", "busybox", "sh", "-c", "ip -o -4 addr show eth0; ip route; cat /etc/hosts")
    assert "default via 172.17.0.1" in plain and plain.splitlines()[-1].startswith("172.17.0.")
    assert "has active endpoints" in engine.refused("network", "rm", "web")
    assert "already exists" in engine.refused("network", "create", "web")
    assert "pre-defined network" in engine.refused("network", "rm", "bridge")


def test_none_host_and_the_namespace_of_another(engine: Networked) -> None:
    serving(engine, "one")
    alone = engine.ok("run", "--rm", "--network", "none", "busybox", "ip", "-o", "link")
    assert len(alone.splitlines()) == 1 and "LOOPBACK,UP" in alone
    host = engine.ok("run", "--rm", "--network", "host", "busybox", "ls", "/sys/class/net")
    assert set(host.split()) == set(engine.links())
    script = "nc -w 3 127.0.0.1 80; cat /etc/hosts"
    said = engine.ok("run", "--rm", "--network", "container:one", "busybox", "sh", "-c", script)
    assert said.startswith("one") and engine.address("one", "bridge") in said
    assert engine.inspect("one")["NetworkSettings"]["IPAddress"] == engine.address("one", "bridge")
    engine.ok("stop", "-t", "0", "one")
    assert "non running container" in engine.refused("run", "--rm", "--network", "container:one", "busybox")
    assert "network nope not found" in engine.refused("run", "--rm", "--network", "nope", "busybox")
    for mode in ("host", "container:one"):
        assert "not possible for a VM" in engine.refused("create", "--runtime", "vm", "--network", mode, "busybox")


def test_fixed_addresses_are_remembered_and_others_are_free_again(engine: Networked) -> None:
    engine.ok("network", "create", "--subnet", "10.77.0.0/29", "small")
    engine.ok("run", "-d", "--name", "fixed", "--network", "small", "--ip", "10.77.0.5", "busybox", "sleep", "300")
    assert engine.address("fixed", "small") == "10.77.0.5"
    assert "Address already in use" in engine.refused("run", "--rm", "--network", "small", "--ip", "10.77.0.5", "busybox")
    for _ in range(8):  # more than there are addresses
        assert "10.77.0." in engine.ok("run", "--rm", "--network", "small", "busybox", "ip", "-o", "-4", "addr")
    engine.ok("stop", "-t", "0", "fixed")
    assert engine.inspect("fixed")["NetworkSettings"]["Networks"]["small"]["IPAddress"] == ""
    engine.ok("start", "fixed")
    assert engine.address("fixed", "small") == "10.77.0.5"
    assert "Pool overlaps" in engine.refused("network", "create", "--subnet", "10.77.0.0/24", "other")
    assert "out of range" in engine.refused("run", "--rm", "--network", "small", "--ip", "10.77.0.0", "busybox")


def test_ports_are_published_named_and_free_again(engine: Networked) -> None:
    serving(engine, "one", "-p", "8080:80", "-p", "127.0.0.1:8100-8110:80", "-P", "--expose", "90")
    gateway = "172.17.0.1"
    ports = engine.inspect("one")["NetworkSettings"]["Ports"]
    assert {(b["HostIp"], b["HostPort"]) for b in ports["80/tcp"]} == {
        ("0.0.0.0", "8080"),
        ("::", "8080"),
        ("127.0.0.1", "8100"),
    }
    assert int(ports["90/tcp"][0]["HostPort"]) > 1024
    assert engine.fetch(gateway, 8080) == engine.fetch("127.0.0.1", 8080) == engine.fetch("::1", 8080) == b"one\n"
    assert engine.fetch("127.0.0.1", 8100) == b"one\n" and engine.fetch(gateway, 8100) == b""
    assert "8080->80/tcp" in engine.ok("ps") and engine.ok("port", "one", "90").count(":") >= 2
    said = engine.refused("run", "--rm", "--name", "late", "-p", "8080:80", "busybox")
    assert "driver failed programming external connectivity on endpoint late (" in said
    assert "Bind for 0.0.0.0:8080 failed: port is already allocated (by container one)" in said
    with namespaces.inside(engine.netns, lambda: socket.create_server(("127.0.0.1", 8099))):
        said = engine.refused("run", "--rm", "-p", "8099:80", "busybox")
    assert "port is already allocated" in said and f"pid {os.getpid()}" in said
    engine.ok("stop", "-t", "0", "one")
    engine.ok("run", "--rm", "-p", "8080:80", "-p", "8100:80", "busybox", "true")
    assert engine.fetch(gateway, 8080) == b""


def test_processes_of_another_container(engine: Networked) -> None:
    """`--pid container:NAME`, also of one that shares itself: seen and signalled, and gone with the first one's init."""
    engine.ok("run", "-d", "--name", "one", "busybox", "sleep", "1234")
    engine.ok("run", "-d", "--name", "two", "--pid", "container:one", "busybox", "sleep", "1235")
    seen = engine.ok("run", "--rm", "--pid", "container:two", "busybox", "ps", "-o", "pid,args")
    assert re.search(r"^ +1 sleep 1234$", seen, re.MULTILINE) and "sleep 1235" in seen
    assert "sleep 1234" in engine.ok("exec", "two", "ps", "-o", "args")
    engine.ok("rm", "-f", "two")
    assert engine.ok("exec", "one", "ps", "-o", "args").count("sleep") == 1
    engine.ok("run", "-d", "--name", "two", "--pid", "container:one", "busybox", "sleep", "1235")
    engine.ok("kill", "one")
    assert engine.ok("wait", "two") == "137"
    assert "cannot join PID of a non running container" in engine.refused("start", "two")
    assert "No such container" in engine.refused("run", "--rm", "--pid", "container:nobody", "busybox", "true")


def test_a_link_on_the_default_bridge_is_known_by_variables(engine: Networked) -> None:
    ports = ("--expose", "5432", "--expose", "53/udp")
    engine.ok("run", "-d", "--name", "server", *ports, "-e", "PW=a=b", "busybox", "sleep", "1000")
    address = engine.inspect("server")["NetworkSettings"]["IPAddress"]
    link = ("--link", "server:my-db")
    engine.ok("run", "-d", "--name", "client", *link, "-e", "MY_DB_ENV_PW=own", "busybox", "sleep", "1000")
    for argv in (["exec", "client", "env"], ["run", "--rm", "--name", "client2", *link, "busybox", "env"]):
        seen = engine.ok(*argv).splitlines()
        assert f"MY_DB_PORT=udp://{address}:53" in seen and f"MY_DB_PORT_5432_TCP=tcp://{address}:5432" in seen
        assert f"MY_DB_PORT_5432_TCP_ADDR={address}" in seen and "MY_DB_PORT_53_UDP_PROTO=udp" in seen
        assert f"MY_DB_NAME=/{'client' if argv[0] == 'exec' else 'client2'}/my-db" in seen
        assert ("MY_DB_ENV_PW=own" if argv[0] == "exec" else "MY_DB_ENV_PW=a=b") in seen
    engine.ok("rm", "-f", "server")
    assert "MY_DB_PORT" not in engine.ok("exec", "client", "env")


def test_shared_memory_of_another_container(engine: Networked) -> None:
    """`--ipc container:NAME`: its namespace and its /dev/shm, also of one that shares itself; they outlive the first one."""
    look = ["sh", "-c", "cat /dev/shm/word; readlink /proc/self/ns/ipc; df /dev/shm | tail -n 1"]
    engine.ok("run", "-d", "--name", "one", "--ipc", "shareable", "--shm-size", "8m", "busybox", "sleep", "1000")
    engine.ok("exec", "one", "sh", "-c", "echo word > /dev/shm/word")
    seen = engine.ok("exec", "one", *look)
    assert seen.startswith("word\nipc:") and "8192" in seen
    engine.ok("run", "-d", "--name", "two", "--ipc", "container:one", "busybox", "sleep", "1000")
    assert engine.ok("exec", "two", *look) == seen
    assert engine.ok("run", "--rm", "--ipc", "container:two", "busybox", *look) == seen
    assert engine.inspect("two")["HostConfig"]["IpcMode"] == "container:one"
    mounts = os.readlink(f"/proc/{engine.inspect('one')['State']['Pid']}/ns/mnt")
    shim = engine.shims()[engine.inspect("two")["Id"]]
    kept = {os.readlink(fd) for fd in Path(f"/proc/{shim}/fd").iterdir()}
    assert mounts not in kept, "it would keep the root of the first"
    engine.ok("rm", "-f", "one")
    assert engine.ok("exec", "two", *look) == seen

    engine.ok("run", "-d", "--name", "one", "busybox", "sleep", "1000")
    assert "non-shareable IPC" in engine.refused("run", "--rm", "--ipc", "container:one", "busybox", "true")
    engine.ok("create", "--name", "quiet", "--ipc", "shareable", "busybox")
    assert "non running container" in engine.refused("run", "--rm", "--ipc", "container:quiet", "busybox")
    assert "No such container" in engine.refused("run", "--rm", "--ipc", "container:nobody", "busybox", "true")
    refused = engine.refused("run", "--rm", "--ipc", "container:two", "--sysctl", "kernel.shmmax=1", "busybox", "true")
    assert "not allowed with the ipc namespace of another container" in refused
    for mode in ("shareable", "container:two"):
        assert "not possible for a VM" in engine.refused("run", "--rm", "--runtime", "vm", "--ipc", mode, "busybox", "true")


def test_connect_and_disconnect_while_it_runs(engine: Networked) -> None:
    engine.ok("network", "create", "front")
    engine.ok("network", "create", "--internal", "back")
    serving(engine, "one", "--network", "front", "-p", "8080:80")
    serving(engine, "two", "--network", "back")
    engine.ok("network", "connect", "--alias", "again", "back", "one")
    assert engine.ok("exec", "two", "nc", "-w", "3", "again", "80") == "one"
    assert engine.address("one", "back") in engine.ok("exec", "one", "cat", "/etc/hosts")
    assert "already exists in network" in engine.refused("network", "connect", "back", "one")
    engine.ok("network", "connect", "bridge", "one")
    engine.ok("network", "disconnect", "front", "one")
    assert "default via 172.17.0.1" in engine.ok("exec", "one", "ip", "route")  # by the one that leads out
    assert engine.fetch("127.0.0.1", 8080) == b"one\n"  # so do the ports
    assert engine.ok("exec", "one", "ls", "/sys/class/net").split() == ["eth1", "eth2", "lo"]
    engine.ok("network", "rm", "front")
    engine.ok("restart", "-t", "0", "one")
    assert set(engine.inspect("one")["NetworkSettings"]["Networks"]) == {"back", "bridge"}
    engine.ok("stop", "-t", "0", "one")
    for network in ("back", "bridge"):
        engine.ok("network", "disconnect", network, "one")
    assert "not connected" in engine.refused("network", "disconnect", "back", "one")
    engine.ok("start", "one")
    assert engine.ok("exec", "one", "ls", "/sys/class/net") == "lo"


def test_events_in_dockers_order(engine: Networked) -> None:
    since = str(time.time())
    engine.ok("network", "create", "web")
    engine.ok("run", "--rm", "--network", "web", "busybox", "true")
    engine.ok("network", "rm", "web")
    lines = engine.ok("events", "--since", since, "--until", str(time.time()), "--format", "{{.Type}} {{.Action}}")
    found = [line for line in lines.splitlines() if line != "container attach"]
    assert found == [
        "network create", "container create", "network connect", "container start", "container die", "network disconnect",
        "container destroy", "network destroy",
    ]  # fmt: skip


def test_twenty_at_once_have_twenty_addresses_and_leave_nothing(engine: Networked) -> None:
    engine.ok("network", "create", "many")
    before = engine.table()
    environment = {**os.environ, "DOCKER_HOST": f"unix://{engine.socket}"}
    argv = ["docker", "run", "-d", "--network", "many", "busybox", "sleep", "300"]
    started = [subprocess.Popen(argv, env=environment, stdout=subprocess.DEVNULL) for _ in range(20)]
    assert [process.wait(SECONDS) for process in started] == [0] * 20
    members = json.loads(engine.ok("network", "inspect", "many"))[0]["Containers"].values()
    assert len({row["IPv4Address"] for row in members}) == len({row["MacAddress"] for row in members}) == 20
    assert engine.table() == before  # a start without ports changes no rule
    engine.ok("rm", "-f", *engine.ok("ps", "-q").split())
    until(lambda: not any(name.startswith("vea") for name in engine.links()), f"veths are left: {engine.links()}")


def test_networks_outlive_the_engine_and_netd(engine: Networked) -> None:
    engine.ok("network", "create", "web")
    serving(engine, "one", "--network", "web", "-p", "8080:80")
    serving(engine, "two", "--network", "web")
    sink = ["sh", "-c", "nc -l -p 9 | sha256sum"]
    engine.ok("run", "-d", "--name", "sink", "--network", "web", "-p", "127.0.0.1:8109:9", "busybox", *sink)
    before = engine.inspect("one")["NetworkSettings"]
    transfer = namespaces.inside(engine.netns, lambda: connected("127.0.0.1", 8109))
    half = os.urandom(1 << 20) * 100
    transfer.sendall(half)
    engine.kill()
    assert engine.fetch("172.18.0.1", 8080) == engine.fetch("127.0.0.1", 8080) == b"one\n"
    engine.start()
    assert engine.inspect("one")["NetworkSettings"] == before
    assert engine.ok("exec", "two", "nc", "-w", "3", "one", "80") == "one"
    assert "already allocated" in engine.refused("run", "--rm", "-p", "8080:80", "busybox")
    engine.ok("run", "--rm", "--network", "web", "busybox", "nc", "-w", "3", "two", "80")
    (netd,) = (pid for pid in engine._leftover() if b"netd" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(netd, signal.SIGKILL)
    assert engine.fetch("127.0.0.1", 8080) == b"one\n", "no process is in the way"
    with transfer:
        transfer.sendall(half)
    engine.ok("wait", "sink")
    assert engine.ok("logs", "sink").split()[0] == hashlib.sha256(half + half).hexdigest()
    until(lambda: engine.fetch("::1", 8080) == b"one\n", "netd serves again")
    assert engine.ok("exec", "two", "nc", "-w", "3", "one", "80") == "one"


def test_a_killed_shim_leaves_neither_link_nor_name_nor_port(engine: Networked) -> None:
    engine.ok("network", "create", "--subnet", "10.78.0.0/24", "web")
    serving(engine, "one", "--network", "web", "--ip", "10.78.0.9", "-p", "8080:80")
    os.kill(engine.shims()[engine.inspect("one")["Id"]], signal.SIGKILL)
    engine.ok("wait", "one")
    engine.ok("run", "--rm", "--network", "web", "--ip", "10.78.0.9", "-p", "8080:80", "busybox", "true")
    look = engine.docker("run", "--rm", "--network", "web", "busybox", "nslookup", "one")
    assert look.returncode != 0
    until(lambda: not any(name.startswith("vea") for name in engine.links()), "a veth is left")
    engine.ok("network", "rm", "web")


def test_a_namespace_that_somebody_holds_answers_for_nobody(engine: Networked) -> None:
    """As whoever has entered it to look does: the next run has the address, and the same MAC."""
    engine.ok("network", "create", "--subnet", "10.77.5.0/24", "held")
    serving(engine, "web", "--stop-signal", "KILL", "--network", "held", "--ip", "10.77.5.9")
    held = [os.open(f"/proc/{engine.inspect('web')['State']['Pid']}/ns/net", os.O_RDONLY)]
    try:
        engine.ok("restart", "web")
        held.append(os.open(f"/proc/{engine.inspect('web')['State']['Pid']}/ns/net", os.O_RDONLY))
        until(lambda: engine.fetch("10.77.5.9", 80), "the new run serves")
        assert all(engine.fetch("10.77.5.9", 80) == b"web\n" for _ in range(20))
        left = {name for name in engine.links() if name.startswith("vea")}
        assert len(left) == 1
        engine.ok("kill", "web")
        until(lambda: not left & set(engine.links()), "it goes by itself")

        engine.ok("start", "web")
        held.append(os.open(f"/proc/{engine.inspect('web')['State']['Pid']}/ns/net", os.O_RDONLY))
        left = {name for name in engine.links() if name.startswith("vea")}
        shim = engine.shims()[engine.inspect("web")["Id"]]
        engine.kill()
        os.kill(shim, signal.SIGKILL)
        engine.start()
        until(lambda: not left & set(engine.links()), "a new engine sees to it")
    finally:
        for fd in held:
            os.close(fd)


def test_a_start_that_fails_leaves_nothing(engine: Networked) -> None:
    engine.ok("network", "create", "web")
    engine.refused("run", "--name", "bad", "--network", "web", "-p", "8080:80", "busybox", "/no/such/program")
    assert json.loads(engine.ok("network", "inspect", "web"))[0]["Containers"] == {}
    engine.ok("run", "--rm", "-p", "8080:80", "busybox", "true")
    until(lambda: not any(name.startswith("vea") for name in engine.links()), "a veth is left")
    engine.ok("network", "rm", "web")


def test_the_end_of_an_idle_engine_takes_everything_away(engine: Networked) -> None:
    engine.ok("network", "create", "web")
    assert len(engine.links()) >= 2 and "table inet ambi" in engine.table()
    assert engine.process is not None
    os.kill(engine.process.pid, signal.SIGTERM)
    engine.process.wait(SECONDS)
    assert engine.links() == ["lo"] and engine.table() == ""
    assert not [pid for pid in engine._leftover() if b"netd" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    engine.start()
    assert "172." in engine.ok("run", "--rm", "--network", "web", "busybox", "ip", "-o", "-4", "addr")


@pytest.mark.needs("qemu")
def test_a_vm_is_on_networks_as_a_container_is(engine: Networked) -> None:
    engine.ok("network", "create", "--ipv6", "--subnet", "172.18.0.0/16", "--subnet", "fd18::/64", "web")
    engine.ok("network", "create", "other")
    serving(engine, "one", "--network", "web")
    serving(engine, "vm", "--runtime", "vm", "--network", "web", "--network-alias", "db", "-p", "8080:80")
    assert engine.ok("exec", "vm", "nc", "-w", "3", "one", "80") == "one"
    assert engine.ok("exec", "one", "nc", "-w", "3", "db", "80") == "vm"
    assert engine.fetch("127.0.0.1", 8080) == engine.fetch("172.18.0.1", 8080) == b"vm\n"
    assert engine.fetch("fd18::1", 8080) == engine.fetch("::1", 8080) == b"vm\n"
    for here, there in (("one", "vm"), ("vm", "one")):
        address = engine.inspect(there)["NetworkSettings"]["Networks"]["web"]["GlobalIPv6Address"]
        assert "1 packets received" in engine.ok("exec", here, "ping", "-c", "1", address)
        assert engine.ok("exec", here, "nc", "-w", "3", address, "80") == there
        assert engine.fetch(address, 80).decode().strip() == there
    engine.ok("network", "connect", "other", "vm")
    address = engine.address("vm", "other")
    until(lambda: engine.fetch(address, 80) == b"vm\n", "the VM answers on its second network")
    engine.ok("network", "disconnect", "web", "vm")
    assert engine.ok("exec", "vm", "ls", "/sys/class/net").split() == ["eth1", "lo"]
    assert engine.fetch("127.0.0.1", 8080) == b"vm\n"


@pytest.mark.parametrize("runtime", ["container", "vm"])
def test_from_no_network_to_one_and_back(engine: Networked, runtime: str) -> None:
    """As with Docker after leaving `none`; its small files say what is so, and nothing that was."""
    engine.ok("network", "create", "web")
    serving(engine, "one", "--network", "web")
    engine.ok("run", "-d", "--name", "it", "--runtime", runtime, "--network", "none", "busybox", *SERVE, "it")
    files = ["cat", "/etc/hosts", "/etc/resolv.conf"]
    before = engine.ok("exec", "it", *files)
    assert engine.ok("exec", "it", "ls", "/sys/class/net") == "lo"
    engine.ok("network", "disconnect", "none", "it")
    engine.ok("network", "connect", "--alias", "db", "--link-local-ip", "169.254.7.7", "web", "it")
    assert "inet 169.254.7.7/16" in engine.ok("exec", "it", "ip", "address", "show", "eth0")
    address = engine.address("it", "web")
    until(lambda: engine.fetch(address, 80) == b"it\n", "it answers")
    said = engine.ok("exec", "it", *files)
    assert f"{address}\t{engine.inspect('it')['Config']['Hostname']}" in said and "nameserver 172.18.0.1" in said
    assert engine.ok("exec", "it", "nc", "-w", "3", "one", "80") == "one"
    assert engine.ok("exec", "one", "nc", "-w", "3", "db", "80") == "it"
    assert "169.254" not in said + engine.ok("exec", "one", "nslookup", "db", "172.18.0.1"), "nobody is led to it"
    assert engine.ok("ps", "-q", "--filter", "network=web").split()[0] == engine.inspect("it")["Id"][:12]
    engine.ok("network", "disconnect", "web", "it")
    assert engine.ok("exec", "it", "ls", "/sys/class/net") == "lo"
    assert engine.ok("exec", "it", *files) == before
    assert list(engine.inspect("it")["NetworkSettings"]["Networks"]) == ["none"]


def test_networks_that_come_and_go_at_once(engine: Networked) -> None:
    """Their bridges are made and removed behind the answers: in the end each is as its network is."""
    engine.ok("network", "create", "first")
    for _ in range(5):
        ids = [engine.ok("network", "create", name) for name in ("one", "two")]
        engine.ok("network", "rm", "one")
        serving(engine, "web", "--network", "two")
        engine.ok("rm", "-f", "web")
        engine.ok("network", "rm", "two")
    stays = engine.ok("network", "create", "stays")
    until(lambda: f"ambi-{stays[:10]}" in engine.links(), "its bridge")
    until(lambda: not {f"ambi-{id[:10]}" for id in ids} & set(engine.links()), "those that are removed have gone")
    bridges = {name for name in engine.links() if name.startswith("ambi-")}
    assert bridges == {f"ambi-{stays[:10]}", f"ambi-{engine.ok('network', 'inspect', '-f', '{{.Id}}', 'first')[:10]}"}
