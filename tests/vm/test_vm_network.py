"""A VM on networks: in a namespace with NICs that somebody else made, over which it must be what a container would be."""

from __future__ import annotations

import hashlib
import itertools
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import pytest

from ambi.core.deadline import Deadline
from ambi.core.errors import Conflict, InvalidRequest, NotFound
from ambi.core.model import Status
from ambi.core.plan import LaunchPlan
from ambi.network.model import Nic
from hyper.guest.protocol import Items, Type
from tests import driverkit, netkit

pytestmark = pytest.mark.needs("qemu")
BULK = 3_000_000
SOON = 20.0
T = TypeVar("T")
MAC = bytes.fromhex("02000000beef")  # of no device
NUMBERS = itertools.count(1)


class Connected(NamedTuple):
    """A running VM whose namespace is `place`; its first network has IPv4 and IPv6."""

    lab: netkit.Lab
    place: netkit.Instance
    running: driverkit.Running
    nic: Nic

    def guest(self, *args: str) -> str:
        done = self.running.exec([*args])
        assert done.code == 0, done
        return done.out.decode()

    def plug(self, name: str, *, default_route: bool = False) -> Nic:
        """A NIC on a fresh network, made in the namespace."""
        number = next(NUMBERS)
        net = netkit.network(f"10.81.{number}.0/24", name=f"net{number}")
        return self.lab.plug(self.place, net, name, default_route=default_route)


@pytest.fixture(scope="module")
def rig(busybox_tar: Path) -> Iterator[driverkit.Rig]:
    with driverkit.vm_rig(busybox_tar) as it:
        yield it


@pytest.fixture(scope="module")
def lab() -> Iterator[netkit.Lab]:
    with netkit.Lab() as lab:
        yield lab


def plan_in(rig: driverkit.Rig, place: netkit.Instance) -> LaunchPlan:
    plan = rig.plan(["sleep", "100000"])
    for entry in plan.config["linux"]["namespaces"]:
        if entry["type"] == "network":
            entry["path"] = f"/proc/{os.getpid()}/fd/{place.fd}"
    return plan


@pytest.fixture(scope="module")
def vm(rig: driverkit.Rig, lab: netkit.Lab) -> Iterator[Connected]:
    place = lab.instance(netkit.network("10.80.0.0/24", "fd80::/64", mtu="1400"))
    with rig.started_plan(plan_in(rig, place)) as running:
        yield Connected(lab, place, running, place.nic)


def names_in(place: netkit.Place) -> set[str]:
    return {name for _, name in place.do(socket.if_nameindex)}


def test_guest_has_what_the_interface_has(vm: Connected) -> None:
    assert vm.guest("cat", "/sys/class/net/eth0/address").strip() == vm.nic.mac
    assert vm.guest("cat", "/sys/class/net/eth0/mtu").strip() == "1400"
    assert vm.guest("ls", "/sys/class/net").split() == ["eth0", "lo"]
    shown = vm.guest("ip", "addr", "show", "dev", "eth0")
    for address in vm.nic.addresses:
        assert f"{address.address}/{address.prefix} " in shown
        family = "-6" if address.family == 6 else "-4"
        assert f"default via {address.gateway} dev eth0" in vm.guest("ip", family, "route")


@pytest.mark.parametrize("family", [4, 6])
def test_tcp_both_ways_keeps_every_byte(vm: Connected, family: int) -> None:
    """Both directions of a bulk transfer: partial checksums and large segments survive the way to the tap and back."""
    address = next(a for a in vm.nic.addresses if a.family == family)
    content = bytes(range(251)) * (BULK // 251)
    with vm.lab.host.listen(9000, address.gateway) as server:
        sum_in_guest = f"nc {address.gateway} 9000 < /dev/null | md5sum"
        reader = vm.running.start_exec(["sh", "-c", sum_in_guest])
        feed(vm, server, content)
        assert reader.finish().out.split()[0].decode() == hashlib.md5(content).hexdigest()
        sender = vm.running.start_exec(["sh", "-c", f"head -c {BULK} /dev/zero | nc {address.gateway} 9000"])
        assert drink(vm, server) == BULK
        assert sender.finish().code == 0


def feed(vm: Connected, server: socket.socket, content: bytes) -> None:
    """Serve one connection with `content` while the driver's loop turns."""
    connection = accept(vm, server)
    with connection:
        left = memoryview(content)
        while left:
            try:
                left = left[connection.send(left[: 1 << 16]) :]
            except BlockingIOError:
                vm.running.loop.step(Deadline.after(0.02))


def drink(vm: Connected, server: socket.socket) -> int:
    """How many zeros one connection brings."""
    taken = 0
    with accept(vm, server) as connection:
        while True:
            try:
                data = connection.recv(1 << 16)
            except BlockingIOError:
                vm.running.loop.step(Deadline.after(0.02))
                continue
            assert not data.strip(b"\0")
            taken += len(data)
            if not data:
                return taken


def accept(vm: Connected, server: socket.socket) -> socket.socket:
    server.setblocking(False)
    connection = turning(vm, server.accept, BlockingIOError)[0]
    connection.setblocking(False)
    return connection


def turning(vm: Connected, work: Callable[[], T], *not_yet: type[OSError]) -> T:
    """What `work` returns once it does not raise one of `not_yet` any more; the driver's loop turns meanwhile."""
    by = Deadline.after(SOON)
    while True:
        try:
            return work()
        except not_yet:
            assert not by.expired()
            vm.running.loop.step(Deadline.after(0.02))


@pytest.mark.parametrize("family", [4, 6])
def test_a_neighbour_reaches_a_server_in_the_guest(vm: Connected, family: int) -> None:
    address = next(a.address for a in vm.nic.addresses if a.family == family)
    server = vm.running.start_exec(["sh", "-c", "echo answer | nc -l -p 80"])

    def connect() -> socket.socket:
        return vm.lab.host.do(socket.create_connection, (address, 80), 1)

    with turning(vm, connect, ConnectionRefusedError) as client:  # refused: it does not listen yet
        client.settimeout(SOON)
        assert client.recv(100) == b"answer\n"
    server.finish()


def test_interfaces_come_and_go_while_it_runs(vm: Connected) -> None:
    created = vm.running.created
    nic = vm.plug("eth1")
    created.plug_nic("eth1", Deadline.after(SOON))  # type: ignore[attr-defined]
    created.plug_nic("eth1", Deadline.after(SOON))  # type: ignore[attr-defined]  # once more is no error
    assert vm.guest("cat", "/sys/class/net/eth1/address").strip() == nic.mac
    assert "1 packets received" in vm.guest("ping", "-c", "1", nic.addresses[0].gateway)
    created.unplug_nic("eth1", Deadline.after(SOON))  # type: ignore[attr-defined]
    created.unplug_nic("eth1", Deadline.after(SOON))  # type: ignore[attr-defined]
    assert vm.guest("ls", "/sys/class/net").split() == ["eth0", "lo"]
    vm.lab.host.net.unplug(vm.place.fd, nic)
    with pytest.raises(NotFound, match="eth1"):
        created.plug_nic("eth1", Deadline.after(SOON))  # type: ignore[attr-defined]
    again = vm.plug("eth1")
    created.plug_nic("eth1", Deadline.after(SOON))  # type: ignore[attr-defined]
    assert "1 packets received" in vm.guest("ping", "-c", "1", again.addresses[0].gateway)


def test_an_interface_too_many_is_refused_and_the_rest_works(vm: Connected) -> None:
    created, plugged = vm.running.created, []
    with pytest.raises(Conflict, match="no network device left for eth") as raised:
        for number in range(20, 40):
            vm.plug(f"eth{number}")
            plugged.append(f"eth{number}")
            created.plug_nic(plugged[-1], Deadline.after(SOON))  # type: ignore[attr-defined]
    assert raised.value.hint and len(plugged) > 3
    for name in plugged:
        created.unplug_nic(name, Deadline.after(SOON))  # type: ignore[attr-defined]
    assert "1 packets received" in vm.guest("ping", "-c", "1", vm.nic.addresses[0].gateway)


@pytest.mark.parametrize(
    "items",
    [
        (),
        ((1, b"short"),),
        ((1, MAC), (2, b"a name that is too long")),
        ((1, MAC), (4, ((1, 4), (2, b"12345"), (3, 8)))),
        ((1, MAC), (4, ((1, 4), (2, b"1234"), (3, 33)))),
        ((1, MAC), (5, ((1, 6), (2, bytes(16)), (3, 0), (4, b"1234")))),
        ((1, MAC), (7, 1)),
    ],
)
def test_damaged_words_change_nothing(vm: Connected, items: Items) -> None:
    link = vm.running.created._link  # type: ignore[attr-defined]
    with pytest.raises(InvalidRequest, match="NET"):
        link.wait(link.request(Type.NET, items), Deadline.after(SOON), "the agent")
    with pytest.raises(NotFound, match="02:00:00:00:be:ef"):
        link.wait(link.request(Type.NET, ((1, MAC),)), Deadline.after(SOON), "the agent")
    link.wait(link.request(Type.UNPLUG, ((1, MAC),)), Deadline.after(SOON), "the agent")
    assert "eth0" in vm.guest("ls", "/sys/class/net").split()


def test_paused_it_stands_still_and_its_agent_answers(vm: Connected) -> None:
    created = vm.running.created
    counting = vm.running.start_exec(["sh", "-c", "while :; do echo; usleep 10000; done"])
    vm.running.init.until(lambda: counting.out)
    created.pause(Deadline.after(SOON))  # type: ignore[attr-defined]
    created.pause(Deadline.after(SOON))  # type: ignore[attr-defined]
    assert created.state() is Status.PAUSED
    used = created.usage().cpu_ns
    with pytest.raises(Conflict, match="paused"):
        vm.running.exec(["true"])
    assert {"sleep", "sh"} <= {row["command"].split()[0] for row in created.processes()}
    assert created.usage().cpu_ns == used
    created.resume(Deadline.after(SOON))  # type: ignore[attr-defined]
    assert created.state() is Status.RUNNING
    have = len(counting.out)
    vm.running.init.until(lambda: len(counting.out) > have)
    counting.process.signal(signal.SIGKILL)
    counting.finish()


def test_a_namespace_outlives_a_vm_that_was_killed(rig: driverkit.Rig, lab: netkit.Lab) -> None:
    """Its taps are gone with its VMM, and the next VM there is on the network."""
    place = lab.instance(netkit.network("10.82.0.0/24"))
    with rig.started_plan(plan_in(rig, place)) as running:
        assert len(names_in(place)) > 2
        os.kill(running.created._parts.monitor.child.pid, signal.SIGKILL)  # type: ignore[attr-defined]
        assert running.init.finish().code == 137
        running.created._parts.network._joined.clear()  # type: ignore[attr-defined]  # as if the shim were killed as well
    assert names_in(place) == {"lo", "eth0"}
    with rig.started_plan(plan_in(rig, place)) as running:
        done = running.exec(["ping", "-c", "1", place.nic.addresses[0].gateway])
        assert b"1 packets received" in done.out
    assert names_in(place) == {"lo", "eth0"}
