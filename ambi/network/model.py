"""The nouns of networks. Values only; addresses are text in their shortest form, as `ipaddress` prints them."""

from __future__ import annotations

from typing import Any, NamedTuple

DEFAULT_NETWORK = "bridge"  # the network of an instance that asks for none, as Docker calls it


class Pool(NamedTuple):
    """One pool of addresses of a network: Docker's IPAM.Config entry.

    subnet: `172.18.0.0/16`. gateway: an address in it. range: where addresses are taken from, "" for all of the subnet.
    reserved: addresses that are never given (Docker's AuxiliaryAddresses), name to address.
    """

    subnet: str
    gateway: str
    range: str = ""
    reserved: dict[str, str] = {}


class Network(NamedTuple):
    """One network, complete: what `create` has resolved.

    id: 64 hexadecimal digits. driver: `bridge`, `macvlan`, `ipvlan`, `host` or `null`. options: Docker's driver options
    (`com.docker.network.bridge.name`, `com.docker.network.driver.mtu`, `parent`, ...), verbatim.
    created_ns: wall clock. asked: the client's IPAM object, verbatim, for inspect.
    """

    id: str
    name: str
    driver: str
    pools: tuple[Pool, ...] = ()
    internal: bool = False
    ipv6: bool = False
    attachable: bool = False
    options: dict[str, str] = {}
    labels: dict[str, str] = {}
    created_ns: int = 0
    asked: dict[str, Any] = {}

    @property
    def builtin(self) -> bool:
        return self.name in (DEFAULT_NETWORK, "host", "none")


class Address(NamedTuple):
    """An address of a NIC. gateway: where its default route would go, "" for none. family: 4 or 6."""

    family: int
    address: str
    prefix: int
    gateway: str = ""


class Nic(NamedTuple):
    """An instance's interface on one network.

    name: inside, `eth0`. host_link: the other end's name on the host, at most 15 characters, "" for macvlan and ipvlan.
    default_route: whether the default routes go this way; one NIC of an instance has them. extra: addresses on the link that
    the user gave (`--link-local-ip`) and that no names or ports lead to.
    """

    network: str
    name: str
    mac: str
    mtu: int
    addresses: tuple[Address, ...]
    host_link: str
    default_route: bool
    extra: tuple[Address, ...] = ()


class Port(NamedTuple):
    """One published port. host_ip: "" for every address of the host. protocol: `tcp`, `udp`, `sctp`.

    targets: the instance's addresses on the network that publishes, IPv4 and IPv6.
    """

    protocol: str
    host_ip: str
    host_port: int
    port: int
    targets: tuple[str, ...]
