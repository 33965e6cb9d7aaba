"""Our packets flow beside the real Docker, ufw and firewalld, in either order of start and after they reload; what we put
into their rules goes with us, and theirs stay.

Each runs in the network namespace of the test's host, with private copies of the files that it writes.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ambi.network import checks, firewall, sysctl
from ambi.network.model import Port
from tests.netkit import HOST4, OUTSIDE4, OUTSIDE6, Instance, Lab, network
from tests.peers import Dockerd

pytestmark = pytest.mark.needs("iptables")


class Scene:
    """Two instances on one network, one of which publishes port 8080, and somebody outside."""

    def __init__(self, lab: Lab, before: Scene | None = None) -> None:
        self.lab = lab
        self.net = network("10.1.0.0/24", "fd01::/64", name="one", host_ipv4=HOST4)
        self.a, self.b = lab.instance(self.net), lab.instance(self.net)
        self.server = self.a.listen(80)
        self.outside = before.outside if before else lab.outside.listen(90)
        self.dns = before.dns if before else lab.host.listen(53, "10.1.0.1")
        lab.host.net.publish("a", [Port("tcp", "", 8080, 80, (self.a.ip4, self.a.ip6))])

    def blocked(self) -> list[str]:
        """What does not get through now."""
        ways: dict[str, Callable[[], object]] = {
            "out": lambda: self.a.reach(self.outside, OUTSIDE4, 90, 0.5),
            "out, IPv6": lambda: self.a.reach(self.outside, OUTSIDE6, 90, 0.5),
            "in": lambda: self.lab.outside.reach(self.server, HOST4, 8080, 0.5),
            "between": lambda: self.b.reach(self.server, self.a.ip4, 80, 0.5),
            "DNS": lambda: self.a.reach(self.dns, "10.1.0.1", 53, 0.5),
        }
        return [name for name, way in ways.items() if way() is None]

    def flows(self) -> None:
        """Everything gets through, at the latest when our watch has seen what others did."""
        end = time.monotonic() + 10
        while blocked := self.blocked():
            assert time.monotonic() < end, (blocked, rules(self.lab))
            time.sleep(0.2)


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as made:
        yield made
        made.host.net.close_down()


def run(lab: Lab, *argv: str) -> str:
    done = lab.host.do(subprocess.run, argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, (argv, done.stdout, done.stderr)
    return str(done.stdout)


def rules(lab: Lab, without: str = "inet ambi") -> list[str]:
    """Every rule of this host but those of our own table, without counters."""
    tables = [line for line in run(lab, "nft", "list", "tables").splitlines() if without not in line]
    text = "".join(run(lab, "nft", "list", *line.split()) for line in tables)
    words = [re.sub(r"packets [0-9]+ bytes [0-9]+", "", line) for line in text.splitlines()]
    return [line for line in words if line.strip()]


@pytest.mark.needs("dockerd")
def test_docker(lab: Lab) -> None:
    """Docker sets the policy DROP when it is the first to need forwarding; its containers stay its own."""
    lab.host.do(sysctl.write, "ipv4/ip_forward", "0")
    peer = Dockerd()
    peer.options = ("--bip=10.7.0.1/24", "--ip6tables", "--experimental", "--fixed-cidr-v6=fd07::/64", "--ipv6")
    lab.host.do(peer.__enter__)
    try:
        peer.docker("info", check=True)  # answered once its rules are there
        before = rules(lab)
        assert "policy drop" in "".join(before)
        scene = Scene(lab)
        scene.flows()
        theirs = Instance(lab._namespace(), lab)
        argv = "ip link add dk0 type veth peer name eth0 netns /proc/self/fd/{fd}; ip link set dk0 master docker0 up"
        lab.host.do(subprocess.run, argv.format(fd=theirs.fd), shell=True, check=True, pass_fds=[theirs.fd])
        argv = "ip address add 10.7.0.9/24 dev eth0; ip link set eth0 up; ip route add default via 10.7.0.1"
        theirs.do(subprocess.run, argv, shell=True, check=True)
        at_theirs = theirs.listen(80)
        assert lab.host.reach(at_theirs, "10.7.0.9", 80)
        assert scene.a.dead("10.7.0.9", 80), "what Docker does not publish is not open to our instances"
        assert theirs.dead(scene.a.ip4, 81)
        lab.host.net.close_down()
        assert rules(lab) == before
        # the other order, and a reload
        scene = Scene(lab, scene)
        os.kill(peer.process.pid, signal.SIGHUP)  # type: ignore[union-attr]
        run(lab, "iptables", "-F", "FORWARD")
        scene.flows()
    finally:
        peer.__exit__(None, None, None)


@pytest.fixture
def private_etc(tmp_path: Path) -> Iterator[Callable[..., list[str]]]:
    """What starts a command with a copy of a directory of /etc over it, the same copy each time."""

    def prefix(name: str) -> list[str]:
        copy = tmp_path / name
        if not copy.exists():
            shutil.copytree(f"/etc/{name}", copy)
            (tmp_path / "run").mkdir()
        mounts = f"mount --bind {copy} /etc/{name} && mount --bind {tmp_path}/run /run && "
        return ["unshare", "--mount", "sh", "-c", mounts + 'exec "$@"', "sh"]

    yield prefix


@pytest.mark.needs("ufw")
def test_ufw(lab: Lab, private_etc: Callable[..., list[str]]) -> None:
    """First we, then ufw, which drops all that it does not know, and its reload; then the other order."""
    ufw = [*private_etc("ufw"), "ufw"]
    scene = Scene(lab)
    scene.flows()
    run(lab, *ufw, "--force", "enable")
    assert "policy drop" in "".join(rules(lab))
    scene.flows()
    run(lab, *ufw, "reload")
    scene.flows()
    lab.host.net.close_down()
    assert "ambi" not in "".join(rules(lab)).lower()
    before = rules(lab)
    Scene(lab, scene).flows()
    lab.host.net.close_down()
    assert rules(lab) == before


@pytest.mark.needs("firewalld")
def test_firewalld(lab: Lab, private_etc: Callable[..., list[str]], tmp_path: Path) -> None:
    """First firewalld, which rejects what passes between its zones, then we, and its reload; then its start beside us."""
    inside = private_etc("firewalld")
    script = (
        "mkdir -p /run/dbus && dbus-daemon --system --nofork --nopidfile & bus=$!; trap 'kill $daemon $bus; wait' TERM;"
        "while [ ! -S /run/dbus/system_bus_socket ]; do sleep 0.1; done;"
        "firewalld --nofork --nopid & daemon=$!; wait $daemon"
    )
    started: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        with open(tmp_path / "log", "ab") as log:
            started.append(lab.host.do(subprocess.Popen, [*inside, "sh", "-c", script], stdout=log, stderr=log))
        end = time.monotonic() + 30
        state = [*inside, "firewall-cmd", "--state"]
        while lab.host.do(subprocess.run, state, capture_output=True).returncode != 0:
            assert time.monotonic() < end and started[-1].poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.2)

    def stop() -> None:
        started[-1].terminate()
        started.pop().wait(30)

    try:
        start()
        before = rules(lab)
        scene = Scene(lab)
        scene.flows()
        run(lab, *inside, "firewall-cmd", "--reload")
        scene.flows()
        lab.host.net.close_down()
        assert rules(lab) == before
        run(lab, *inside, sys.executable, "-c", "from ambi.network.firewall import trust; trust(['ambi+', 'lab-br0'])")
        zone = run(lab, *inside, "firewall-cmd", "--zone=trusted", "--list-interfaces")
        assert sorted(zone.split()) == ["ambi+", "lab-br0"], "the way into a firewalld that owns its table"
        stop()
        scene = Scene(lab, scene)
        start()
        scene.flows()
    finally:
        if started:
            stop()


def test_nothing_is_done_where_nobody_filters(lab: Lab) -> None:
    """Not even a table is made; one whose FORWARD lets all pass stays as it is."""
    scene = Scene(lab)
    scene.flows()
    assert rules(lab) == []
    run(lab, "iptables", "-P", "FORWARD", "ACCEPT")
    run(lab, "iptables", "-A", "OUTPUT", "-j", "ACCEPT")
    before = rules(lab)
    lab.host.net.close_down()
    Scene(lab, scene).flows()
    assert rules(lab) == before


def test_a_custom_bridge_passes(lab: Lab) -> None:
    run(lab, "iptables", "-P", "FORWARD", "DROP")
    net = network("10.4.0.0/24")
    net = net._replace(options={"com.docker.network.bridge.name": "lab-br0"})
    a = lab.instance(net)
    assert a.reach(lab.outside.listen(90), OUTSIDE4, 90) == HOST4
    lab.host.net.close_down()
    assert run(lab, "iptables", "-S").split("\n")[:3] == ["-P INPUT ACCEPT", "-P FORWARD DROP", "-P OUTPUT ACCEPT"]


def test_other_engines_bridges_are_known_by_name(lab: Lab) -> None:
    for name in ("docker0", "br-0123456789ab", "br-lan", "virbr0", "eth7"):
        run(lab, "ip", "link", "add", name, "type", "bridge")
    assert lab.host.do(firewall.other_bridges) == ["br-0123456789ab", "docker0", "virbr0"]


def test_what_doctor_says(lab: Lab) -> None:
    """Nothing is made by looking; a chain that would drop our packets is named with the command that opens it."""
    found = lab.host.do(checks.checks)
    assert [(f.name, f.state) for f in found] == [("nftables", "ok"), ("forwarding", "ok")] and rules(lab) == []
    scene = Scene(lab)
    run(lab, "nft", "add", "table", "inet", "own")
    run(lab, "nft", "add chain inet own forward { type filter hook forward priority 0; policy drop; }")
    (warning,) = [f for f in lab.host.do(checks.checks) if f.state == "warning"]
    assert warning.detail == "the chain inet own forward drops what is forwarded"
    assert "out" in scene.blocked()
    run(lab, "sh", "-c", warning.hint)
    scene.flows()
