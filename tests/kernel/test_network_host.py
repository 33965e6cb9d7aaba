"""What the kernel does with networks, NICs and ports that NetworkHost has made, in namespaces of the test."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ambi.core.errors import Conflict, InvalidRequest, Unsupported
from ambi.network import links, sysctl
from ambi.network.host import NetworkHost, link_of
from ambi.network.model import Network, Port
from tests.netkit import HOST4, HOST6, OUTSIDE4, OUTSIDE6, Host, Instance, Lab, network

UDP = socket.SOCK_DGRAM
ROOT = Path(__file__).parents[2]


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as made:
        yield made


def names(lab: Lab) -> set[str]:
    return {name for _, name in lab.host.do(socket.if_nameindex)}


def nft(lab: Lab, *command: str) -> str:
    return lab.host.do(subprocess.run, ["nft", *command], check=True, capture_output=True, text=True).stdout


def described(lab: Lab, net: Network) -> dict[str, Any]:
    """What `ip` says about the bridge of `net`."""
    argv = ["ip", "-j", "-d", "address", "show", "dev", link_of(net, "")]
    found: list[dict[str, Any]] = json.loads(lab.host.do(subprocess.check_output, argv))
    return found[0]


def test_traffic_of_two_networks(lab: Lab) -> None:
    """Within a network, to the host, out behind the host's address; never into another network or in from outside."""
    one, two = network("10.1.0.0/24", "fd01::/64", name="one"), network("10.2.0.0/24", "fd02::/64", name="two")
    a, b, c = lab.instance(one), lab.instance(one), lab.instance(two)
    at_a, at_host, at_outside = a.listen(80), lab.host.listen(70), lab.outside.listen(90)
    lab.route_from_outside("10.1.0.0/24")
    lab.route_from_outside("fd01::/64")

    for target, seen in ((a.ip4, b.ip4), (a.ip6, b.ip6)):
        assert b.reach(at_a, target, 80) == seen
        assert lab.host.reach(at_a, target, 80)
        assert c.dead(target, 80), "networks must be apart"
        assert lab.outside.dead(target, 80), "nothing is published"
    assert a.reach(at_host, "10.1.0.1", 70) == a.ip4
    assert a.reach(at_host, "fd01::1", 70) == a.ip6
    assert a.reach(at_outside, OUTSIDE4, 90) == HOST4
    assert a.reach(at_outside, OUTSIDE6, 90) == HOST6


@pytest.mark.parametrize("bridge_filter", ["0", "1"])
def test_published_ports(lab: Lab, bridge_filter: str) -> None:
    """From outside and the host with the client's address, from the same and another network; then no more.

    Where bridges obey the IP rules, a packet that is diverted back into its own network is bridged and never routed.
    """
    for family in ("ip", "ip6"):
        lab.host.do(sysctl.write, f"bridge/bridge-nf-call-{family}tables", bridge_filter)
    one, two = network("10.1.0.0/24", "fd01::/64", name="one"), network("10.2.0.0/24", "fd02::/64", name="two")
    server, mate, other = lab.instance(one), lab.instance(one), lab.instance(two)
    tcp, udp = server.listen(80), server.listen(53, kind=UDP)
    targets = (server.ip4, server.ip6)
    ports = [Port("tcp", "", 8080, 80, targets), Port("udp", "", 5353, 53, targets), Port("tcp", HOST4, 8081, 80, targets)]
    lab.host.net.publish("server", ports)

    for at, outside, near, away in ((HOST4, OUTSIDE4, HOST4, other.ip4), (HOST6, OUTSIDE6, HOST6, other.ip6)):
        assert lab.outside.reach(tcp, at, 8080) == outside
        assert lab.outside.reach(udp, at, 5353) == outside
        assert lab.host.reach(tcp, at, 8080) == near
        assert other.reach(tcp, at, 8080) == away
        gateway = one.pools[":" in at].gateway
        assert mate.reach(tcp, at, 8080) == gateway, "its answer must come back through the host"
        assert server.reach(tcp, at, 8080) == gateway
        assert server.reach(tcp, gateway, 8080) == gateway
    assert lab.outside.reach(tcp, HOST4, 8081) == OUTSIDE4
    assert lab.outside.dead(HOST6, 8081), "published on one IPv4 address only"
    assert server.dead("10.1.0.1", 8081)
    lab.route_from_outside("10.1.0.0/24")
    assert lab.outside.reach(tcp, server.ip4, 80) == OUTSIDE4, "what is published may be reached directly"

    lab.host.net.publish("server", ports)  # again: nothing to do
    with pytest.raises(Conflict, match="8080"):
        lab.host.net.publish("other", [Port("tcp", "", 8090, 80, (other.ip4,)), Port("tcp", "", 8080, 80, (other.ip4,))])
    assert "8090" not in nft(lab, "list", "table", "inet", "ambi"), "all or none"
    lab.host.net.unpublish("server")
    lab.host.net.unpublish("server")
    assert lab.outside.dead(HOST4, 8080) and lab.outside.dead(HOST4, 8081) and lab.outside.dead(server.ip4, 80)


@pytest.mark.parametrize("bridge_filter", ["0", "1"])
def test_ports_on_the_hosts_own_loopback(lab: Lab, bridge_filter: str) -> None:
    """Without a proxy, and it opens the host's loopback to nobody on the bridge, not even when our rules are flushed."""
    lab.host.do(sysctl.write, "bridge/bridge-nf-call-iptables", bridge_filter)
    one = network("10.1.0.0/24", "fd01::/64", name="one")
    server, mate = lab.instance(one), lab.instance(one)
    tcp, udp, second = server.listen(80), server.listen(53, kind=UDP), server.listen(81)
    bridge = link_of(one, "")
    way = f"ipv4/conf/{bridge}/route_localnet"
    assert lab.host.do(sysctl.read, way) == "0", "nothing is published"
    targets = (server.ip4, server.ip6)
    ports = [
        Port("tcp", "", 8080, 80, targets),
        Port("udp", "", 5353, 53, targets),
        Port("tcp", "127.0.0.1", 8081, 81, targets),
    ]
    lab.host.net.publish("server", ports)
    assert lab.host.do(sysctl.read, way) == "1"
    for address in ("127.0.0.1", "127.0.0.9"):
        assert lab.host.reach(tcp, address, 8080) == lab.host.reach(udp, address, 5353) == "10.1.0.1"
    assert lab.host.reach(second, "127.0.0.1", 8081) == "10.1.0.1"
    lab.route_from_outside("10.1.0.0/24")
    assert lab.host.dead("127.0.0.9", 8081) and lab.outside.dead(HOST4, 8081) and lab.outside.dead(server.ip4, 81)

    hosts, heard = lab.host.listen(70, "127.0.0.1"), lab.host.listen(71, "10.1.0.1", kind=UDP)
    tagged = lab.host.listen(72, "127.0.0.1", kind=UDP)
    bridge_mac = described(lab, one)["address"]
    mate.do(_send_loopback_to, "10.1.0.1")
    for flushed in (False, True):
        if flushed:
            nft(lab, "flush", "ruleset")
        assert mate.dead("127.0.0.1", 70)
        assert not _hears(mate, heard), "a packet whose sender says to be the host itself"
        for tags in TAGS:
            assert not _hears_frame(mate, bridge_mac, tagged, tags), f"a frame with {len(tags) // 4} tags"
    lab.host.do(subprocess.run, ["tc", "qdisc", "delete", "dev", bridge, "ingress"], check=True)
    assert mate.reach(hosts, "127.0.0.1", 70) and _hears(mate, heard), "else this test shows nothing"
    assert all(_hears_frame(mate, bridge_mac, tagged, tags) for tags in TAGS), "nor this"

    lab.host.do(subprocess.run, ["ip", "link", "delete", bridge], check=True)
    lab.host.net.ensure(one)
    lab.host.net.publish("mate", [Port("tcp", "", 8082, 80, (mate.ip4,))])
    assert lab.host.reach(tcp, "127.0.0.1", 8080) == "10.1.0.1", "healed"
    assert mate.dead("127.0.0.1", 70)
    after = Host(lab.host.fd, lab)
    after.net.unpublish("mate")
    after.net.sweep([one], ["server"])
    assert lab.host.reach(second, "127.0.0.1", 8081) == "10.1.0.1"
    after.net.unpublish("server")
    assert lab.host.dead("127.0.0.1", 8080) and lab.host.dead("127.0.0.1", 8081)


def _send_loopback_to(gateway: str) -> None:
    """Make this namespace one whose packets for 127.0.0.0/8 go to `gateway` by eth0, with any address as theirs."""
    sysctl.write("ipv4/conf/eth0/route_localnet", "1")
    subprocess.run(["ip", "address", "delete", "127.0.0.1/8", "dev", "lo"], check=True)
    subprocess.run(["ip", "route", "add", "127.0.0.0/8", "via", gateway, "dev", "eth0"], check=True)
    subprocess.run(["ip", "address", "add", "127.0.0.5/32", "dev", "eth0"], check=True)


TAGS = (b"", b"\x81\0\0\0", b"\x81\0\0\0" * 2, b"\x88\xa8\0\0\x81\0\0\0")  # of VLAN 0: as good as none


def _hears_frame(mate: Instance, bridge_mac: str, heard: socket.socket, tags: bytes) -> bool:
    """Whether a datagram for `heard`, at an address of 127.0.0.0/8, comes through in a frame of `mate` with `tags`."""
    heard.settimeout(0.3)
    address, port = heard.getsockname()
    source, target = socket.inet_aton(mate.ip4), socket.inet_aton(address)
    head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 29, 0, 0, 64, socket.IPPROTO_UDP, 0, source, target)
    total = sum(struct.unpack(">10H", head))
    total = (total & 0xFFFF) + (total >> 16)
    packet = head[:10] + struct.pack(">H", ~total & 0xFFFF) + head[12:] + struct.pack(">HHHHc", 9, port, 9, 0, b"?")
    macs = bytes.fromhex((bridge_mac + mate.nic.mac).replace(":", ""))
    with mate.do(socket.socket, socket.AF_PACKET, socket.SOCK_RAW) as wire:
        wire.bind(("eth0", 0))
        wire.send(macs + tags + b"\x08\0" + packet)
        try:
            return heard.recv(9) == b"?"
        except TimeoutError:
            return False


def _hears(mate: Instance, heard: socket.socket) -> bool:
    """Whether a datagram from 127.0.0.5 of `mate` comes through."""
    heard.settimeout(0.4)
    with mate.do(socket.socket, socket.AF_INET, UDP) as client:
        client.bind(("127.0.0.5", 0))
        client.sendto(b"?", heard.getsockname())
        try:
            return heard.recv(9) == b"?"
        except TimeoutError:
            return False


def test_a_udp_client_follows_the_port(lab: Lab) -> None:
    """A client that never falls silent reaches the instance that has the port now, not the one that had it."""
    one = network("10.1.0.0/24", "fd01::/64", name="one")
    places = [lab.instance(one), lab.instance(one)]
    servers = [place.listen(53, kind=UDP) for place in places]
    for at, family in ((HOST4, socket.AF_INET), (HOST6, socket.AF_INET6)):
        with lab.outside.do(socket.socket, family, UDP) as client:
            for place, server in zip(places, servers, strict=True):
                lab.host.net.publish("key", [Port("udp", "", 5353, 53, (place.ip4, place.ip6))])
                client.sendto(b"?", (at, 5353))
                assert server.recv(9) == b"?"
                lab.host.net.unpublish("key")


def test_an_address_with_another_mac_is_found_at_once(lab: Lab) -> None:
    one = network("10.1.0.0/24", "fd01::/64", name="one")
    mate, before, after = lab.instance(one), lab.instance(one), lab.instance()
    server = before.listen(80)
    for address in (before.ip4, before.ip6):
        assert mate.reach(server, address, 80) and lab.host.reach(server, address, 80)
    lab.host.net.unplug(before.fd, before.nic)
    lab.host.net.plug(after.fd, one, before.nic._replace(mac="02:00:00:00:00:07"))
    server = after.listen(80)
    for address in (before.ip4, before.ip6):
        assert mate.reach(server, address, 80, 0.5) and lab.host.reach(server, address, 80, 0.5)


def test_options_of_a_bridge(lab: Lab) -> None:
    """Internal, no ICC, no masquerading, routed IPv6, an MTU and a name of the user's."""
    inner = network("10.3.0.0/24", name="inner", internal=True)
    a, b = lab.instance(inner), lab.instance(inner)
    at_a, at_outside = a.listen(80), lab.outside.listen(90)
    assert b.reach(at_a, a.ip4, 80) == b.ip4
    assert a.dead(OUTSIDE4, 90) and b.do(sysctl.read, "ipv6/conf/eth0/disable_ipv6") == "1"

    lab.host.do(sysctl.write, "bridge/bridge-nf-call-iptables", "0")
    apart = network("10.4.0.0/24", name="apart", enable_icc="false")
    c, d = lab.instance(apart), lab.instance(apart)
    at_c = c.listen(80)
    assert d.dead(c.ip4, 80)
    assert c.reach(at_outside, OUTSIDE4, 90) == HOST4
    lab.host.net.publish("c", [Port("tcp", "", 8080, 80, (c.ip4,))])
    assert d.reach(at_c, HOST4, 8080) == "10.4.0.1", "what is published is for everybody"

    plain = network("10.5.0.0/24", "fd05::/64", name="plain", enable_ip_masquerade="false", mtu="1400")
    plain = plain._replace(options={**plain.options, "com.docker.network.bridge.name": "lab-br0"})
    lab.route_from_outside("10.5.0.0/24")
    lab.route_from_outside("fd05::/64")
    e = lab.instance(plain)
    assert "lab-br0" in names(lab)
    assert e.reach(at_outside, OUTSIDE4, 90) == e.ip4
    assert e.reach(at_outside, OUTSIDE6, 90) == e.ip6
    show = e.do(subprocess.run, ["ip", "link", "show", "eth0"], check=True, capture_output=True, text=True).stdout
    assert "mtu 1400" in show and e.nic.mac in show

    routed = network("10.6.0.0/24", "fd06::/64", name="routed", gateway_mode_ipv6="routed", host_ipv4=HOST4)
    lab.route_from_outside("fd06::/64")
    f = lab.instance(routed)
    at_f = f.listen(80)
    assert f.reach(at_outside, OUTSIDE6, 90) == f.ip6
    assert f.reach(at_outside, OUTSIDE4, 90) == HOST4
    assert lab.outside.dead(f.ip6, 80)
    lab.host.net.publish("f", [Port("tcp", "", 8085, 80, (f.ip6,))])
    assert lab.outside.reach(at_f, f.ip6, 80) == OUTSIDE6


def test_second_nic_comes_and_goes(lab: Lab) -> None:
    one, two = network("10.1.0.0/24", name="one"), network("10.2.0.0/24", name="two")
    a, b = lab.instance(one), lab.instance(two)
    at_b = b.listen(80)
    assert a.dead(b.ip4, 80)
    nic = lab.plug(a, two, "eth1")
    assert a.reach(at_b, b.ip4, 80) == nic.addresses[0].address
    counted = lab.host.net.counters(nic)
    assert counted["tx_packets"] >= 4 and counted["rx_bytes"] > 200 and counted["tx_errors"] == 0
    for _ in range(2):
        lab.host.net.unplug(a.fd, nic)
        assert a.dead(b.ip4, 80) and nic.host_link not in names(lab)
    assert lab.host.net.counters(nic) == {}


def test_a_failed_plug_leaves_nothing(lab: Lab) -> None:
    one = network("10.1.0.0/24", name="one")
    a = lab.instance(one)
    before = names(lab)
    with pytest.raises(Conflict, match="cannot join network 'one' as eth0"):
        lab.plug(a, one, "eth0")
    wrong = a.nic._replace(name="eth1", host_link="veaffffffffffff", default_route=True)
    with pytest.raises(Conflict):  # the namespace has a default route
        lab.host.net.plug(a.fd, one, wrong)
    assert names(lab) == before
    assert [name for _, name in a.do(socket.if_nameindex)] == ["lo", "eth0"]


def test_heals_what_others_take_away(lab: Lab) -> None:
    """A bridge deleted by hand, addresses removed, rules flushed: `ensure` and `publish` put back what they need."""
    one = network("10.1.0.0/24", "fd01::/64", name="one")
    a, b = lab.instance(one), lab.instance(one)
    at_a = a.listen(80)
    lab.host.net.publish("a", [Port("tcp", "", 8080, 80, (a.ip4,))])
    lab.host.do(subprocess.run, ["ip", "link", "delete", link_of(one, "")], check=True)
    assert b.dead(a.ip4, 80)
    lab.host.net.ensure(one)
    assert b.reach(at_a, a.ip4, 80) == b.ip4
    assert lab.host.reach(at_a, a.ip6, 80)
    nft(lab, "flush", "ruleset")
    lab.host.net.publish("b", [Port("tcp", "", 8081, 80, (b.ip4,))])
    assert lab.outside.reach(at_a, HOST4, 8080) == OUTSIDE4


def test_a_network_whose_making_nobody_waits_for(lab: Lab) -> None:
    """Certain is what differs from a network of before by names and private subnets alone; `create` makes what `ensure`
    makes."""
    four, both = network("10.1.0.0/24", name="four"), network("10.2.0.0/24", "fd02::/64", name="both")
    for first in (four, both):
        assert not lab.host.net.certain(first), "nothing like it has been made yet"
        lab.host.net.ensure(first)
    new = network("10.8.0.0/24", "fd08::/64", name="new")
    assert lab.host.net.certain(new)
    for key, value in (("bridge.name", "lab0"), ("driver.mtu", "1400")):
        assert not lab.host.net.certain(new._replace(options={f"com.docker.network.{key}": value}))
    assert not lab.host.net.certain(new._replace(internal=True))
    assert not lab.host.net.certain(network("127.3.0.0/24", name="loop"))

    lab.host.net.create(new)
    made, like = described(lab, new), described(lab, both)
    assert made["ifalias"] == f"ambi {new.id}"
    assert (made["flags"], made["mtu"]) == (like["flags"], like["mtu"])
    assert [made["linkinfo"]["info_data"][key] for key in ("stp_state", "forward_delay")] == [0, 0]
    assert {(a["local"], a["prefixlen"]) for a in made["addr_info"] if a["scope"] == "global"} == {
        ("10.8.0.1", 24), ("fd08::1", 64)
    }  # fmt: skip
    assert not lab.host.net.certain(new), "its link is there"
    a, b = lab.instance(new), lab.instance(new)
    at_a = a.listen(80)
    assert (b.reach(at_a, a.ip4, 80), b.reach(at_a, a.ip6, 80)) == (b.ip4, b.ip6)


def test_who_waits_for_a_network_does_not_make_it_again(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a start does whose network is on its way."""
    one = network("10.1.0.0/24", name="one")
    made: list[str] = []
    asked = threading.Semaphore(0)
    make, is_ready = links.ensure_bridge, NetworkHost._is_ready

    def slow(*args: Any) -> int:
        made.append(one.name)
        second.start()
        for _ in range(3):  # twice by the first, and once by the second, which waits for it now
            assert asked.acquire(timeout=10)
        return make(*args)

    def counted(self: NetworkHost, net: Network) -> bool:
        found = is_ready(self, net)
        asked.release()
        return found

    monkeypatch.setattr(links, "ensure_bridge", slow)
    monkeypatch.setattr(NetworkHost, "_is_ready", counted)
    second = threading.Thread(target=lambda: lab.host.net.ensure(one))
    lab.host.net.ensure(one)
    second.join()
    assert made == ["one"]


def test_another_engine_takes_over(lab: Lab) -> None:
    """After a kill -9: what is in the kernel stays in force, and what nobody needs any more goes, twice if need be."""
    one, two = network("10.1.0.0/24", name="one"), network("10.2.0.0/24", name="two")
    a, c = lab.instance(one), lab.instance(two)
    at_a = a.listen(80)
    lab.host.net.publish("a", [Port("tcp", "", 8080, 80, (a.ip4,))])
    lab.host.net.publish("c", [Port("tcp", "", 8081, 80, (c.ip4,))])
    foreign = Host(lab.host.fd, lab, "abc123")
    third = network("10.3.0.0/24", name="third")
    d = lab.instance(third, host=foreign)

    lab.host.net.close()  # what the end of its process does
    after = Host(lab.host.fd, lab)
    after.net.unpublish("nobody")
    assert lab.outside.reach(at_a, HOST4, 8080) == OUTSIDE4
    for _ in range(2):
        after.net.sweep([one], ["a"])
        assert link_of(two, "") not in names(lab) and c.nic.host_link not in names(lab)
        rules = nft(lab, "list", "table", "inet", "ambi")
        assert "8081" not in rules and "10.2.0.0" not in rules
        assert lab.outside.reach(at_a, HOST4, 8080) == OUTSIDE4
    after.net.ensure(one)
    after.net.remove(one)
    after.net.remove(one)
    assert d.nic.host_link in names(lab), "another run root's links are not ours"
    after.net.close_down()
    assert "table inet ambi-abc123" in nft(lab, "list", "tables") and "table inet ambi\n" not in nft(lab, "list", "tables")
    foreign.net.close_down()
    after.net.unpublish("nobody")
    after.net.sweep([one], [])
    after.net.remove(one)
    assert nft(lab, "list", "tables") == "" and names(lab) == {"lo", "up0"}
    after.net.close_down()


def test_names_that_others_have(lab: Lab) -> None:
    one, two = network("10.1.0.0/24", name="one"), network("10.2.0.0/24", name="two")

    def occupy(name: str, kind: str) -> None:
        subprocess.run(["ip", "link", "add", name, "type", *kind.split()], check=True)

    lab.host.do(occupy, link_of(one, ""), "veth")
    with pytest.raises(Conflict, match="is no bridge, but veth"):
        lab.host.net.ensure(one)
    lab.host.do(occupy, "theirs", "bridge")
    mine = two._replace(options={"com.docker.network.bridge.name": "theirs"})
    a, b = lab.instance(mine), lab.instance(mine)
    at_a = a.listen(80)
    assert b.reach(at_a, a.ip4, 80) == b.ip4
    lab.host.net.remove(mine)
    assert "theirs" in names(lab), "a bridge that the user brought stays"
    shown = lab.host.do(subprocess.run, ["ip", "address", "show", "theirs"], check=True, capture_output=True, text=True)
    assert "10.2.0.1" not in shown.stdout
    for bad in ("a/b", "x" * 16, "up0 drop", '"'):
        with pytest.raises(InvalidRequest, match="invalid link name"):
            lab.host.net.ensure(two._replace(options={"com.docker.network.bridge.name": bad}))
    with pytest.raises(InvalidRequest, match="mtu"):
        lab.host.net.ensure(two._replace(options={"com.docker.network.driver.mtu": "tall"}))


def test_forwarding_is_switched_on_when_needed(lab: Lab) -> None:
    """And an uplink that has its address by router advertisements goes on to listen to them."""
    lab.host.do(sysctl.write, "ipv4/ip_forward", "0")
    lab.host.do(sysctl.write, "ipv6/conf/up0/accept_ra", "1")
    lab.host.net.ensure(network("10.1.0.0/24", name="inner", internal=True))

    def read(name: str) -> str:
        return lab.host.do(sysctl.read, name)

    assert (read("ipv4/ip_forward"), read("ipv6/conf/all/forwarding")) == ("0", "0")
    lab.host.net.ensure(network("10.2.0.0/24", name="four"))
    assert (read("ipv4/ip_forward"), read("ipv6/conf/all/forwarding")) == ("1", "0")
    lab.host.net.ensure(network("fd01::/64", name="six"))
    assert (read("ipv6/conf/all/forwarding"), read("ipv6/conf/up0/accept_ra")) == ("1", "2")


@pytest.mark.parametrize("internal", [False, True])
def test_without_the_right_to_change_networks(lab: Lab, internal: bool) -> None:
    """The error names the network, and nothing is half made."""
    script = (
        "from tests.netkit import network; from ambi.network.host import NetworkHost\n"
        "from ambi.core.errors import AmbiError\n"
        f"try: NetworkHost().ensure(network('10.1.0.0/24', name='one', internal={internal}))\n"
        "except AmbiError as error: print(type(error).__name__, error, error.hint)"
    )
    argv = ["setpriv", "--bounding-set", "-net_admin", sys.executable, "-c", script]
    done = lab.host.do(subprocess.run, argv, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("Forbidden "), (done.stdout, done.stderr)
    assert "CAP_NET_ADMIN" in done.stdout
    assert names(lab) == {"lo", "up0"} and nft(lab, "list", "tables") == ""


def test_routes_of_the_host(lab: Lab) -> None:
    one = network("10.1.0.0/24", "fd01::/64")
    lab.host.net.ensure(one)
    assert {"10.99.0.0/24", "fd99::/64", "10.1.0.0/24", "fd01::/64"} == set(lab.host.net.routes())


def test_children_of_a_link(lab: Lab) -> None:
    """macvlan and ipvlan where the kernel has them, else an error that names the module."""
    for number, driver in enumerate(("macvlan", "ipvlan")):
        net = network(f"10.99.{number + 1}.0/24", name=driver, driver=driver, parent="up0")
        try:
            a = lab.instance(net)
        except Unsupported as error:
            assert f"this kernel has no {driver}" in error.message
            assert error.hint and f"modprobe {driver}" in error.hint
            continue
        b = lab.instance(net)
        at_a = a.listen(80)
        assert b.reach(at_a, a.ip4, 80) == b.ip4
        for place in (b, a, b):  # a link has children of one kind only
            lab.host.net.unplug(place.fd, place.nic)
        assert b.dead(a.ip4, 80)
    with pytest.raises(InvalidRequest, match="macvlan_mode"):
        lab.host.net.ensure(network("10.9.0.0/24", driver="macvlan", parent="up0", macvlan_mode="flat"))


def test_the_tests_own_namespace_is_untouched(lab: Lab) -> None:
    before = os.readlink("/proc/thread-self/ns/net")
    lab.instance(network("10.1.0.0/24"))
    assert os.readlink("/proc/thread-self/ns/net") == before
    assert not [name for _, name in socket.if_nameindex() if name.startswith(("ambi-", "vea"))]
    assert links.link_of(network("10.1.0.0/24", name="bridge"), "") == "ambi0"
