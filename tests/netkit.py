"""Network namespaces of a test: a host with a `NetworkHost`, a neighbour outside, instances, and TCP and UDP between them.

Everything happens in threads that have entered a namespace; sockets stay in the one in which they were made, so plain calls
from the test's own thread use them. No process is started, and the machine's own network is never touched.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

from ambi.network import ipam, namespaces, sysctl
from ambi.network.host import NetworkHost
from ambi.network.model import Address, Network, Nic, Pool

T = TypeVar("T")
HOST4, OUTSIDE4, HOST6, OUTSIDE6 = "10.99.0.1", "10.99.0.2", "fd99::1", "fd99::2"


def network(*subnets: str, name: str = "web", driver: str = "bridge", internal: bool = False, **options: str) -> Network:
    """A network as the engine resolves it; `_` in the name of an option stands for `.`, after `com.docker.network.`."""
    pools = ipam.check([Pool(text, "") for text in subnets], [])
    spelled = {
        key if key in ("parent", "macvlan_mode", "ipvlan_mode") else spell(key): value for key, value in options.items()
    }
    return Network(secrets.token_hex(32), name, driver, pools, internal=internal, options=spelled)


def spell(key: str) -> str:
    if key == "mtu":
        return "com.docker.network.driver.mtu"
    return "com.docker.network.host_ipv4" if key == "host_ipv4" else f"com.docker.network.bridge.{key}"


class Place:
    """A network namespace."""

    def __init__(self, fd: int, stack: ExitStack) -> None:
        self.fd, self._stack = fd, stack

    def do(self, work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """`work` in a thread that is in this namespace."""
        return namespaces.inside(self.fd, lambda: work(*args, **kwargs))

    def listen(self, port: int, address: str = "", kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
        """A socket bound here, to IPv4 and IPv6 without an address."""

        def bind() -> socket.socket:
            family = socket.AF_INET if "." in address else socket.AF_INET6
            made = self._stack.enter_context(socket.socket(family, kind))
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(bool(address)))
            made.bind((address or "::", port))
            if kind == socket.SOCK_STREAM:
                made.listen(8)
            made.settimeout(5)
            return made

        return self.do(bind)

    def reach(self, server: socket.socket, address: str, port: int, seconds: float = 2) -> str | None:
        """Connect from here to `address`; the address that `server` sees as the client's, None when nothing comes through.

        Both ends exchange a byte each way, so None also means that the answer did not come back.
        """
        family = socket.AF_INET if "." in address else socket.AF_INET6
        with self.do(socket.socket, family, server.type) as client:
            client.settimeout(seconds)
            try:
                client.connect((address, port))
                client.send(b"?")
                if server.type == socket.SOCK_DGRAM:
                    server.settimeout(seconds)
                    data, peer = server.recvfrom(9)
                    server.sendto(b"!", peer)
                else:
                    connection, peer = server.accept()
                    with connection:
                        data = connection.recv(9)
                        connection.send(b"!")
                assert data == b"?"
                assert client.recv(9) == b"!"
            except (TimeoutError, OSError):
                return None
        return str(peer[0]).removeprefix("::ffff:")

    def dead(self, address: str, port: int, kind: socket.SocketKind = socket.SOCK_STREAM, seconds: float = 0.4) -> bool:
        """Whether a connection from here gets no answer at all, or a refusal, within `seconds`."""
        with self.do(socket.socket, socket.AF_INET if "." in address else socket.AF_INET6, kind) as client:
            client.settimeout(seconds)
            try:
                client.connect((address, port))
                client.send(b"?")
                client.recv(9)
            except (TimeoutError, OSError):
                return True
        return False


class Instance(Place):
    """A namespace with NICs; `nic` is the latest."""

    nic: Nic

    @property
    def ip4(self) -> str:
        return next(a.address for a in self.nic.addresses if a.family == 4)

    @property
    def ip6(self) -> str:
        return next(a.address for a in self.nic.addresses if a.family == 6)


class Host(Place):
    """The namespace in which a NetworkHost works. Its methods are called through `net`."""

    def __init__(self, fd: int, stack: ExitStack, tag: str = "") -> None:
        super().__init__(fd, stack)
        self.net = _InPlace(self, self.do(NetworkHost, tag))
        stack.callback(self.net.close)


class _InPlace:
    def __init__(self, place: Place, target: NetworkHost) -> None:
        self._place, self._target = place, target

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._target, name)
        return lambda *args, **kwargs: self._place.do(method, *args, **kwargs)


class Lab(ExitStack):
    """A host, `lab.host`, whose `up0` has the neighbour `lab.outside`; both have routes to each other only."""

    def __init__(self) -> None:
        super().__init__()
        self.host = Host(self._namespace(), self)
        self.outside = Place(self._namespace(), self)
        self._taken: dict[str, list[str]] = {}
        self.host.do(self._uplink)
        self.outside.do(self._address, "up0", ((OUTSIDE4, 24), (OUTSIDE6, 64)))

    def _namespace(self) -> int:
        fd = namespaces.new()
        self.callback(os.close, fd)
        return fd

    def _uplink(self) -> None:
        from pyroute2 import IPRoute

        with IPRoute() as route:
            route.link("add", ifname="up0", kind="veth", peer={"ifname": "up0", "net_ns_fd": self.outside.fd})
        self._address("up0", ((HOST4, 24), (HOST6, 64)))

    @staticmethod
    def _address(link: str, addresses: tuple[tuple[str, int], ...]) -> None:
        from pyroute2 import IPRoute

        sysctl.prepare_link(link, ipv6=True)  # link-local addresses work at once, as on an uplink that has been up for long
        with IPRoute() as route:
            index = route.link_lookup(ifname=link)[0]
            for text, prefix in addresses:
                route.addr("add", index=index, address=text, prefixlen=prefix, **({"flags": 2} if ":" in text else {}))
            route.link("set", index=index, state="up")

    def route_from_outside(self, subnet: str) -> None:
        """The neighbour sends packets for `subnet` to the host."""
        from pyroute2 import IPRoute

        def add() -> None:
            with IPRoute() as route:
                route.route("add", dst=subnet, gateway=HOST6 if ":" in subnet else HOST4)

        self.outside.do(add)

    def instance(self, *networks: Network, host: Host | None = None) -> Instance:
        """An instance on `networks`, which are made; the first one has its default route."""
        made = Instance(self._namespace(), self)
        for number, net in enumerate(networks):
            self.plug(made, net, f"eth{number}", default_route=number == 0, host=host)
        return made

    def plug(
        self, instance: Instance, net: Network, name: str, *, default_route: bool = False, host: Host | None = None
    ) -> Nic:
        place = host or self.host
        place.net.ensure(net)
        taken = self._taken.setdefault(net.id, [])
        addresses = []
        for pool in net.pools:
            text = ipam.allocate(pool, taken)
            taken.append(text)
            prefix = int(pool.subnet.partition("/")[2])
            addresses.append(Address(6 if ":" in text else 4, text, prefix, pool.gateway))
        link = f"vea{secrets.token_hex(6)}" if net.driver == "bridge" else ""
        mtu = int(net.options.get("com.docker.network.driver.mtu", "1500"))
        instance.nic = Nic(net.id, name, ipam.mac(a.address for a in addresses), mtu, tuple(addresses), link, default_route)
        place.net.plug(instance.fd, net, instance.nic)
        return instance.nic
