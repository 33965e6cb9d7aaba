"""What the table gets for networks and ports, and the messages that are made by hand, as pyroute2 reads them."""

from __future__ import annotations

import errno
import os
import socket
from functools import partial

import pytest

from ambi.core.errors import AmbiError, Conflict, Forbidden, Internal, InvalidRequest, NotFound, Unsupported
from ambi.linux import nftables
from ambi.linux.nftables import Nftables
from ambi.network import announce, firewall, links, rtnl, rules
from ambi.network.model import Network, Pool, Port

NET = Network("ab" * 32, "web", "bridge", (Pool("10.1.0.0/24", "10.1.0.1"), Pool("fd01::/64", "fd01::1")))


of_port = partial(rules.of_port, loopback=False)


def holders(net: Network) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for element in rules.of_network(net, "br"):
        found.setdefault(element.holder, []).append(element.key)
    return found


@pytest.mark.parametrize(
    "options,more",
    [
        ({}, {"nat4": ["10.1.0.0/24"], "nat6": ["fd01::/64"]}),
        ({"com.docker.network.bridge.enable_ip_masquerade": "false"}, {}),
        ({"com.docker.network.bridge.gateway_mode_ipv6": "routed"}, {"nat4": ["10.1.0.0/24"], "ping6": ['"br"']}),
        (
            {"com.docker.network.bridge.gateway_mode_ipv4": "nat-unprotected"},
            {"nat4": ["10.1.0.0/24"], "nat6": ["fd01::/64"], "open4": ['"br"']},
        ),
        ({"com.docker.network.host_ipv4": "192.0.2.1"}, {"source4": ["10.1.0.0/24"], "nat6": ["fd01::/64"]}),
    ],
)
def test_elements_of_networks(options: dict[str, str], more: dict[str, list[str]]) -> None:
    base = {"bridges": ['"br"'], "same": ['"br" . "br"'], "home4": ['10.1.0.0/24 . "br"'], "home6": ['fd01::/64 . "br"']}
    assert holders(NET._replace(options=options)) == base | more


def test_internal_networks_are_not_translated() -> None:
    assert set(holders(NET._replace(internal=True))) == {"bridges", "same", "home4", "home6", "internal"}


def test_elements_of_ports() -> None:
    both = ("10.1.0.2", "fd01::2")
    assert of_port("k", Port("tcp", "", 8080, 80, both)) == [
        rules.Element("any4", "tcp . 8080", "10.1.0.2 . 80", "k"),
        rules.Element("published4", "10.1.0.2 . tcp . 80"),
        rules.Element("any6", "tcp . 8080", "fd01::2 . 80", "k"),
        rules.Element("published6", "fd01::2 . tcp . 80"),
    ]
    one = [
        rules.Element("at4", "192.0.2.1 . udp . 53", "10.1.0.2 . 53", "k"),
        rules.Element("published4", "10.1.0.2 . udp . 53"),
    ]
    assert of_port("k", Port("udp", "192.0.2.1", 53, 53, both)) == one
    assert [e.holder for e in of_port("k", Port("sctp", "::", 9, 9, both))] == ["any6", "published6"]
    assert of_port("k", Port("tcp", "127.0.0.1", 9, 9, both)) == [], "netd serves loopback"
    assert of_port("k", Port("tcp", "fd99::1", 9, 9, ("10.1.0.2",))) == []
    own = [e.holder for e in rules.of_port("k", Port("tcp", "", 8080, 80, both), loopback=True)]
    assert own == ["any4", "published4", "loop4", "any6", "published6"]
    assert rules.of_port("k", Port("tcp", "127.0.0.1", 9, 8, both), loopback=True) == [
        rules.Element("loopat4", "127.0.0.1 . tcp . 9", "10.1.0.2 . 8", "k")  # and nobody else may come to it
    ]
    assert rules.of_port("k", Port("tcp", "::1", 9, 9, both), loopback=True) == []


@pytest.mark.parametrize("key,protocol", [("a b", "tcp"), ('"', "tcp"), ("", "tcp"), ("k", "icmp"), ("k", "tcp . 1")])
def test_no_word_of_a_caller_becomes_a_rule(key: str, protocol: str) -> None:
    with pytest.raises(InvalidRequest):
        of_port(key, Port(protocol, "", 1, 1, ("10.1.0.2",)))


def test_names_of_links() -> None:
    assert links.link_of(NET, "") == "ambi-ababababab"
    assert links.link_of(NET._replace(name="bridge"), "") == "ambi0"
    assert links.link_of(NET._replace(name="bridge"), "c0ffee") == "ambi0-c0ffee"
    assert links.link_of(NET._replace(options={"com.docker.network.bridge.name": "lab0"}), "c0ffee") == "lab0"


def test_what_filters() -> None:
    assert firewall._filters([":FORWARD DROP [0:0]"], "FORWARD")
    assert firewall._filters([":FORWARD ACCEPT [0:0]", "-A FORWARD -j DOCKER-USER"], "FORWARD")
    assert not firewall._filters([":FORWARD ACCEPT [0:0]", "-A FORWARD -j AMBI-FORWARD", "-A INPUT -j ufw"], "FORWARD")


def decoded(message: rtnl.Message, kind: type) -> object:
    found = kind(rtnl.Rtnl._pack(message, 7))
    found.decode()
    return found


def test_messages_by_hand_are_what_pyroute2_reads() -> None:
    from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
    from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
    from pyroute2.netlink.rtnl.rtmsg import rtmsg

    made = rtnl.new_veth("vea1", master=5, mtu=1400, peer="eth0", peer_mac="02:42:0a:01:00:02", peer_netns=9)
    veth = decoded(made, ifinfmsg)
    assert (veth.get_attr("IFLA_IFNAME"), veth.get_attr("IFLA_MASTER"), veth["flags"]) == ("vea1", 5, 1)
    info = veth.get_attr("IFLA_LINKINFO")
    peer = info.get_attr("IFLA_INFO_DATA").get_attr("VETH_INFO_PEER")
    assert info.get_attr("IFLA_INFO_KIND") == "veth"
    assert (peer.get_attr("IFLA_IFNAME"), peer.get_attr("IFLA_ADDRESS")) == ("eth0", "02:42:0a:01:00:02")
    assert (peer.get_attr("IFLA_MTU"), peer.get_attr("IFLA_NET_NS_FD"), veth.get_attr("IFLA_MTU")) == (1400, 9, 1400)

    four, six = (
        decoded(rtnl.new_address(3, text, prefix), ifaddrmsg) for text, prefix in (("10.1.0.2", 24), ("fd01::2", 64))
    )
    assert (four.get_attr("IFA_LOCAL"), four.get_attr("IFA_BROADCAST"), four["prefixlen"]) == ("10.1.0.2", "10.1.0.255", 24)
    assert (six.get_attr("IFA_ADDRESS"), six["flags"], six["index"]) == ("fd01::2", 2, 3)
    route = decoded(rtnl.new_default_route(3, "fd01::1"), rtmsg)
    assert (route.get_attr("RTA_GATEWAY"), route.get_attr("RTA_OIF"), route["dst_len"]) == ("fd01::1", 3, 0)


def test_an_advertisement_has_the_right_checksum() -> None:
    frame = announce.frame("02:42:0a:01:00:02", "fd01::2")
    packet, body = frame[14:54], frame[54:]
    words = packet[8:40] + len(body).to_bytes(4, "big") + b"\0\0\0\x3a" + body
    assert sum(int.from_bytes(words[i : i + 2], "big") for i in range(0, len(words), 2)) % 0xFFFF == 0
    assert len(announce.frame("02:42:0a:01:00:02", "10.1.0.2")) == 42


def test_a_kernel_without_nftables_is_an_error_and_not_our_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPROTONOSUPPORT, os.strerror(errno.EPROTONOSUPPORT))

    monkeypatch.setattr(socket, "socket", refuse)
    with pytest.raises(Unsupported, match="this kernel has none") as caught:
        Nftables()
    assert caught.value.hint == "modprobe nfnetlink nf_tables"


@pytest.mark.parametrize(
    "said,kind",
    [
        ("Error: Could not process rule: Operation not permitted\nadd ...", Forbidden),
        ("netlink: Error: cache initialization failed: Operation not permitted", Forbidden),
        ("Error: Could not process rule: File exists\nadd element", Conflict),
        ("Error: No such file or directory; did you mean map", NotFound),
        ("Error: Could not process rule: Operation not supported", Unsupported),
        ("/dev/stdin:1:1-3: Error: syntax error", Internal),
        ("", Internal),
    ],
)
def test_errors_of_nft(said: str, kind: type[AmbiError]) -> None:
    assert type(nftables._error(said)) is kind
