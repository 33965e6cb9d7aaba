"""What is asked of networks and ports, read, checked and resolved: no kernel, no process."""

from typing import Any

import pytest

from ambi.api import network_shapes
from ambi.core.errors import AmbiError, Forbidden, InvalidRequest
from ambi.core.model import Isolation
from ambi.engine import endpoints, linkenv, ports
from ambi.engine.addressing import Addresses
from ambi.engine.netstate import Endpoint, decode
from ambi.engine.types import CreateSpec
from ambi.network.model import Network, Pool, Port

NET = Network("n" * 64, "web", "bridge", (Pool("10.9.0.0/24", "10.9.0.1"),), asked={"Config": [{"Subnet": "10.9.0.0/24"}]})


def spec(config: dict[str, Any] | None = None, networks: dict[str, Any] | None = None, **host: Any) -> CreateSpec:
    return CreateSpec(config or {}, host, {"EndpointsConfig": networks or {}})


@pytest.mark.parametrize(
    "asked,names",
    [
        (spec(), ["bridge"]),
        (spec(NetworkMode="default", networks={"default": {"MacAddress": ""}}), ["bridge"]),
        (spec(NetworkMode="web"), ["web"]),
        (spec(NetworkMode="web", networks={"web": {}, "b": {}, "a": None}), ["web", "a", "b"]),
        (spec(NetworkMode="web", networks={"web": {}, "b": {"GwPriority": 1}}), ["b", "web"]),
        (spec(NetworkMode="none"), []),
        (spec(NetworkMode="host"), []),
        (spec(NetworkMode="container:x"), []),
    ],
)
def test_which_networks_an_instance_is_on_and_in_which_order(asked: CreateSpec, names: list[str]) -> None:
    endpoints.check(asked, Isolation.CONTAINER)
    assert [endpoint.name for endpoint in endpoints.asked_for(asked)] == names


def test_what_flags_say_goes_to_the_first_network() -> None:
    asked = spec(
        {"MacAddress": "02:00:00:00:00:05"}, NetworkMode="web", Links=["db:x"], networks={"web": {"Aliases": ["a"]}}
    )
    (first,) = endpoints.asked_for(asked)
    assert first.asked == {"MacAddress": "02:00:00:00:00:05", "Aliases": ["a"], "Links": ["db:x"]}
    assert endpoints.split_link("/db:/web/x") == ("db", "x") and endpoints.split_link("db") == ("db", "db")


@pytest.mark.parametrize(
    "asked,text",
    [
        (spec(NetworkMode="host", networks={"web": {}}), "cannot attach both user-defined and non-user-defined"),
        (spec(NetworkMode="host", Links=["a"]), "host type networking can't be used with links"),
        (spec(NetworkMode="container:"), "invalid container format"),
        (spec({"Hostname": "h"}, NetworkMode="container:x"), "hostname and the network mode"),
        (spec(NetworkMode="container:x", PortBindings={"80/tcp": []}), "port publishing and the container type"),
        (spec(networks={"bridge": {"IPAMConfig": {"IPv4Address": "10.0.0.1"}}}), "on user defined networks only"),
        (spec(networks={"bridge": {"Aliases": ["a"]}}), "only supported for user-defined networks"),
        (spec(NetworkMode="w", networks={"w": {"IPAMConfig": {"IPv4Address": "10.0.0"}}}), "invalid IPv4 address: 10.0.0"),
        (spec(NetworkMode="w", networks={"w": {"IPAMConfig": {"IPv6Address": "10.0.0.1"}}}), "invalid IPv6 address"),
        (spec(NetworkMode="w", networks={"w": {"IPAMConfig": {"LinkLocalIPs": ["169.254.1"]}}}), "link-local IP address"),
        (spec(NetworkMode="w", networks={"w": {"Aliases": [""]}}), "cannot be a network alias"),
        (spec(NetworkMode="w", networks={"w": {"MacAddress": "01:00:00:00:00:00"}}), "not a valid mac address"),
        (spec(NetworkMode="w", networks={"w": {"Links": [":"]}}), "bad format for links"),
        (spec(NetworkMode="w", networks={"w": {"Future": 1}}), "Future is not supported"),
        (spec(NetworkMode="w", networks={"w": 3}), "must be an object"),
    ],
)
def test_what_can_never_be_is_refused_in_dockers_words(asked: CreateSpec, text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        endpoints.check(asked, Isolation.CONTAINER)
    assert text in caught.value.message


@pytest.mark.parametrize("mode", ["host", "container:x"])
def test_a_vm_has_no_namespace_of_others(mode: str) -> None:
    with pytest.raises(InvalidRequest, match=f"--network {mode} is not possible for a VM"):
        endpoints.check(spec(NetworkMode=mode), Isolation.VM)


def bound(**bindings: Any) -> list[tuple[str, int, str, list[int]]]:
    found = ports.wanted(spec(PortBindings={key.replace("_", "/"): value for key, value in bindings.items()}))
    return [(w.protocol, w.port, w.host_ip, [w.host_ports[0], w.host_ports[-1]]) for w in found]


def test_port_bindings() -> None:
    assert bound(**{"80_tcp": [{"HostPort": "8080"}, {"HostIp": "127.0.0.1", "HostPort": ""}]}) == [
        ("tcp", 80, "", [8080, 8080]),
        ("tcp", 80, "127.0.0.1", [0, 0]),
    ]
    assert bound(**{"53_udp": [{"HostIp": "::1", "HostPort": "7000-7005"}]}) == [("udp", 53, "::1", [7000, 7005])]
    assert bound(**{"80": None}) == [("tcp", 80, "", [0, 0])]
    assert bound(**{"90-91_sctp": [{"HostPort": "190-191"}]}) == [("sctp", 90, "", [190, 190]), ("sctp", 91, "", [191, 191])]


def test_publish_all_takes_what_is_exposed_and_not_bound() -> None:
    asked = spec({"ExposedPorts": {"80/tcp": {}, "90-91/udp": {}}}, PublishAllPorts=True, PortBindings={"80/tcp": [{}]})
    assert [(w.port, w.protocol, list(w.host_ports)) for w in ports.wanted(asked)] == [
        (80, "tcp", [0]), (90, "udp", [0]), (91, "udp", [0]),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "key,entry",
    [
        ("80/ftp", {}), ("0/tcp", {}), ("65536/tcp", {}), ("9-8/tcp", {}), ("a", {}), ("80/tcp", {"HostIp": "nope"}),
        ("80/tcp", {"HostPort": "x"}), ("80/tcp", {"HostPort": "70000"}), ("80/tcp", {"HostPort": 80}), ("²/tcp", {}),
    ],
)  # fmt: skip
def test_bad_ports_are_refused(key: str, entry: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        ports.wanted(spec(PortBindings={key: [entry]}))


def test_how_ports_are_shown() -> None:
    asked = spec({"ExposedPorts": {"80/tcp": {}, "90/tcp": {}}})
    published = (Port("tcp", "", 8080, 80, ("10.9.0.2",)), Port("tcp", "127.0.0.1", 81, 80, ("10.9.0.2",)))
    both = [{"HostIp": "0.0.0.0", "HostPort": "8080"}, {"HostIp": "::", "HostPort": "8080"}]
    shown = {"80/tcp": [*both, {"HostIp": "127.0.0.1", "HostPort": "81"}], "90/tcp": None}
    assert ports.port_map(asked, published) == shown
    rows = ports.port_list(asked, published)
    assert rows[0] == {"IP": "0.0.0.0", "PrivatePort": 80, "PublicPort": 8080, "Type": "tcp"} and len(rows) == 4
    assert rows[-1] == {"PrivatePort": 90, "Type": "tcp"}


def given(asked: dict[str, Any], *others: Endpoint, own: tuple[Endpoint, ...] = (), net: Network = NET) -> Endpoint:
    return Addresses().give(Endpoint(net.name, asked), net, others, own, "e" * 64)


def test_addresses_are_given_one_after_another_and_fixed_ones_are_kept_for_who_has_them() -> None:
    first = given({})
    assert first.nic is not None and first.nic.name == "eth0" and first.nic.default_route
    assert (first.nic.addresses[0].address, first.nic.addresses[0].gateway) == ("10.9.0.2", "10.9.0.1")
    assert first.nic.mac == "02:42:0a:09:00:02" and first.nic.host_link.startswith("vea") and len(first.nic.host_link) == 15
    stopped = Endpoint("web", {"IPAMConfig": {"IPv4Address": "10.9.0.3"}}, NET.id)
    second = given({}, first, stopped, own=(first,))
    assert second.nic is not None and second.nic.name == "eth1" and not second.nic.default_route
    assert second.nic.addresses[0].address == "10.9.0.4"
    again = decode("web", second.encode(0))
    assert again == second
    fixed = given({"IPAMConfig": {"IPv4Address": "10.9.0.3"}, "MacAddress": "02-00-00-00-00-AA"}, first)
    assert fixed.nic is not None and fixed.nic.addresses[0].address == "10.9.0.3" and fixed.nic.mac == "02:00:00:00:00:aa"


@pytest.mark.parametrize(
    "asked,kind,text",
    [
        ({"IPAMConfig": {"IPv4Address": "10.9.0.2"}}, Forbidden, "Address already in use"),
        ({"IPAMConfig": {"IPv4Address": "10.8.0.2"}}, InvalidRequest, "no configured subnet contains IP address 10.8.0.2"),
        ({"IPAMConfig": {"IPv6Address": "fd00::2"}}, InvalidRequest, "has no IPv6 subnet"),
        ({"MacAddress": "02:42:0a:09:00:02"}, Forbidden, "already in use"),
    ],
)
def test_addresses_that_cannot_be_given(asked: dict[str, Any], kind: type[AmbiError], text: str) -> None:
    with pytest.raises(kind) as caught:
        given(asked, given({}))
    assert text in caught.value.message


def test_a_fixed_address_needs_a_subnet_of_the_users() -> None:
    with pytest.raises(InvalidRequest, match="user configured subnets"):
        given({"IPAMConfig": {"IPv4Address": "10.9.0.9"}}, net=NET._replace(asked={}))


def test_an_internal_network_has_no_way_out() -> None:
    made = given({}, net=NET._replace(internal=True))
    assert made.nic is not None and not made.nic.default_route and made.nic.addresses[0].gateway == ""


def test_a_network_as_docker_shows_it() -> None:
    shown = network_shapes.network(NET, [])
    assert shown["IPAM"] == {
        "Driver": "default",
        "Options": {},
        "Config": [{"Subnet": "10.9.0.0/24", "Gateway": "10.9.0.1"}],
    }
    assert shown["Containers"] == {} and shown["Options"] == {} and shown["Scope"] == "local" and not shown["Internal"]


def test_variables_of_a_link() -> None:
    ports = ["80/udp", "90/tcp", "80/tcp"]
    found = linkenv.variables("web", "my-db", "10.0.0.2", ports, ["A=b=c", "PATH=/", "BARE"])
    assert found[:2] == ["MY_DB_PORT=tcp://10.0.0.2:80", "MY_DB_PORT_80_TCP=tcp://10.0.0.2:80"]
    assert "MY_DB_PORT_80_UDP_PROTO=udp" in found
    assert found[-2:] == ["MY_DB_NAME=/web/my-db", "MY_DB_ENV_A=b=c"]
    assert linkenv.variables("web", "x", "10.0.0.2", [], []) == ["X_NAME=/web/x"]
