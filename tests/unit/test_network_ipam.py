"""Address pools, with Docker's choices and Docker's texts."""

from __future__ import annotations

import ipaddress

import pytest

from ambi.core.errors import AmbiError, Forbidden, InvalidRequest, NotFound, Unavailable
from ambi.network import ipam
from ambi.network.model import Pool


def test_default_pools_in_dockers_order() -> None:
    used: list[str] = []
    for _ in range(31):
        used.append(ipam.choose(used).subnet)
    assert used[:2] == ["172.17.0.0/16", "172.18.0.0/16"]
    assert used[14:17] == ["172.31.0.0/16", "192.168.0.0/20", "192.168.16.0/20"]
    assert used[-1] == "192.168.240.0/20"
    with pytest.raises(
        NotFound, match=r"^could not find an available, non-overlapping IPv4 address pool among the defaults"
    ):
        ipam.choose(used)


def test_what_the_host_routes_is_skipped() -> None:
    host = ["0.0.0.0/0", "172.16.0.0/15", "172.18.4.0/24", "fd00::/8", "172.19.0.1/32"]
    assert ipam.choose(host) == Pool("172.20.0.0/16", "172.20.0.1")


def test_ula_pools_are_random() -> None:
    first, second = ipam.choose([], 6), ipam.choose([], 6)
    assert first.subnet != second.subnet
    net = ipaddress.ip_network(first.subnet)
    assert net.prefixlen == 64 and net.subnet_of(ipaddress.IPv6Network("fd00::/8")) and first.gateway == str(net[1])
    with pytest.raises(NotFound, match="IPv6"):
        ipam.choose(["fc00::/7"], 6)


@pytest.mark.parametrize(
    "asked,gateway",
    [
        (Pool("10.1.0.0/24", ""), "10.1.0.1"),
        (Pool("10.1.0.0/24", "10.1.0.254"), "10.1.0.254"),
        (Pool("10.1.0.0/24", "", "10.1.0.128/25"), "10.1.0.129"),
        (Pool("10.1.0.0/24", "", "", {"router": "10.1.0.1"}), "10.1.0.2"),
        (Pool("10.1.0.0/31", ""), "10.1.0.0"),
        (Pool("FD01:0::/64", ""), "fd01::1"),
    ],
)
def test_gateways(asked: Pool, gateway: str) -> None:
    (done,) = ipam.check([asked], ["10.2.0.0/16"])
    assert done.gateway == gateway and done.subnet == asked.subnet.lower().replace(":0::", "::")


@pytest.mark.parametrize(
    "asked,kind,text",
    [
        ([Pool("10.1.0.0", "")], InvalidRequest, "it has no prefix length"),
        ([Pool("10.1.0.5/24", "")], InvalidRequest, "it should be 10.1.0.0/24"),
        ([Pool("web", "")], InvalidRequest, "invalid subnet web"),
        ([Pool("10.1.0.0/32", "")], InvalidRequest, "no room"),
        ([Pool("10.1.0.0/24", "10.2.0.1")], InvalidRequest, "invalid gateway 10.2.0.1"),
        ([Pool("10.1.0.0/24", "here")], InvalidRequest, "invalid IP address: here"),
        ([Pool("10.1.0.0/24", "", "10.2.0.0/25")], InvalidRequest, "invalid ip-range"),
        ([Pool("10.1.0.0/24", "", "fd00::/64")], InvalidRequest, "invalid ip-range"),
        ([Pool("10.1.0.0/24", "", "", {"a": "10.2.0.1"})], InvalidRequest, "invalid auxiliary address"),
        ([Pool("10.1.0.0/24", "10.1.0.9", "", {"a": "10.1.0.9"})], Forbidden, "Address already in use"),
        ([Pool("10.9.0.0/16", "")], Forbidden, "Pool overlaps with other one on this address space"),
        ([Pool("10.1.0.0/24", ""), Pool("10.1.0.0/25", "")], Forbidden, "Pool overlaps with other one"),
    ],
)
def test_refusals(asked: list[Pool], kind: type[AmbiError], text: str) -> None:
    with pytest.raises(kind, match=text):
        ipam.check(asked, ["0.0.0.0/0", "10.9.4.0/24"])


def test_addresses_are_given_in_turn_and_not_again_at_once() -> None:
    pool = Pool("10.1.0.0/29", "10.1.0.1", "", {"router": "10.1.0.4"})
    taken: list[str] = []
    for _ in range(4):
        taken.append(ipam.allocate(pool, taken, after=taken[-1] if taken else ""))
    assert taken == ["10.1.0.2", "10.1.0.3", "10.1.0.5", "10.1.0.6"]
    with pytest.raises(Unavailable, match=r"^no available IPv4 addresses on this network's address pools"):
        ipam.allocate(pool, taken)
    assert ipam.allocate(pool, ["10.1.0.3"], after="10.1.0.3") == "10.1.0.5"
    assert ipam.allocate(pool, [], after="10.1.0.6") == "10.1.0.2"
    assert ipam.allocate(pool, [], after="192.168.0.1") == "10.1.0.2"


def test_ranges_bound_what_is_given_and_not_what_is_asked_for() -> None:
    pool = Pool("10.1.0.0/24", "10.1.0.1", "10.1.0.128/30")
    assert [ipam.allocate(pool, []), ipam.allocate(pool, [], "10.1.0.7")] == ["10.1.0.128", "10.1.0.7"]
    assert ipam.allocate(Pool("fd01::/64", "fd01::1"), []) == "fd01::2"


@pytest.mark.parametrize("wanted", ["10.2.0.1", "10.1.0.0", "10.1.0.255", "fd00::1"])
def test_addresses_outside_the_pool(wanted: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^Requested address is out of range") as caught:
        ipam.allocate(Pool("10.1.0.0/24", "10.1.0.1"), [], wanted)
    assert caught.value.hint == "choose one between 10.1.0.1 and 10.1.0.254"


@pytest.mark.parametrize("wanted", ["10.1.0.1", "10.1.0.2", "10.1.0.3"])
def test_addresses_in_use(wanted: str) -> None:
    with pytest.raises(Forbidden, match=r"^Address already in use"):
        ipam.allocate(Pool("10.1.0.0/24", "10.1.0.1", "", {"a": "10.1.0.2"}), ["10.1.0.3"], wanted)


def test_macs() -> None:
    assert ipam.mac(["fd01::2", "172.17.0.2"]) == "02:42:ac:11:00:02"
    made = {ipam.mac(["fd01::2"]) for _ in range(50)}
    assert len(made) == 50
    assert all(int(mac[:2], 16) & 3 == 2 for mac in made), "locally administered, of one host"


@pytest.mark.parametrize(
    "subnet,private",
    [
        ("10.0.0.0/8", True), ("172.31.0.0/16", True), ("192.168.4.0/24", True), ("fd00::/8", True),
        ("172.32.0.0/16", False), ("127.0.0.0/24", False), ("224.0.0.0/24", False), ("0.0.0.0/1", False),
        ("2001:db8::/64", False),
    ],
)  # fmt: skip
def test_private_subnets(subnet: str, private: bool) -> None:
    assert ipam.is_private(subnet) is private


def test_which_network_holds_addresses() -> None:
    pools = (Pool("10.1.0.0/24", "10.1.0.1"), Pool("fd01::/64", "fd01::1"))
    assert ipam.holds(pools, {"10.1.0.2"}) and ipam.holds(pools, {"10.1.0.2", "fd01::2"})
    assert not ipam.holds(pools, {"10.1.0.2", "10.2.0.2"}) and not ipam.holds(pools, set())
