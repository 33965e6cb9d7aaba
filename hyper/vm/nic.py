"""The network of a VM: what is in its network namespace, and a tap for each interface there.

The namespace is somebody else's, and so is every interface in it. Frames go between interface and tap by redirection in
the kernel (tc), both ways, so that the guest is on the wire in the interface's place: with its MAC, MTU, addresses and
routes. The VMM has only the taps' descriptors; it stays in its own empty namespace, and a tap ends with it.

microvm has no bus on which a device could be plugged in later. So a VM gets a few network devices more than it has
interfaces: a device whose driver is not bound costs the guest nothing and cannot be seen in it, and binding it is what makes
the NIC appear. A device's own MAC, by which the guest finds it, says no more than its number: guests that go on as copies of
a template have those of the template. The link's MAC is the interface's.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from ambi.core.errors import Conflict, InvalidRequest, NotFound, Unsupported, from_os_error
from ambi.core.undo import Undo
from ambi.linux import netlink, process, tap
from hyper.guest.protocol import AddressTag, Items, NetTag, RouteTag, Value

SPARE = 4  # devices for interfaces that come later
MAX_NICS = 12  # of the 24 places that microvm has for devices; shares, disks and the agent's port need some of the others
TAP_PREFIX = "ambi-tap"
VHOST = "/dev/vhost-net"
DEVICE_MAC = b"\x02ambi"  # and a number: locally administered, never on a wire


class Nic(NamedTuple):
    """An interface of the namespace, as the guest is to have it."""

    ifindex: int
    name: str
    mac: bytes
    mtu: int
    addresses: tuple[netlink.Address, ...]
    routes: tuple[netlink.Route, ...]

    def items(self, device: bytes) -> Items:
        """The fields of NET; `device`: the MAC of the VM's device that becomes this interface."""
        items: list[tuple[int, Value]] = [
            (NetTag.MAC, device),
            (NetTag.NAME, self.name.encode("utf-8", "surrogateescape")),
            (NetTag.MTU, self.mtu),
        ]
        items += [(NetTag.ADDRESS, _address(found)) for found in self.addresses]
        items += [(NetTag.ROUTE, _route(found)) for found in self.routes]
        if device != self.mac:
            items.append((NetTag.NEW_MAC, self.mac))
        return items


class Device(NamedTuple):
    """A network device of the VM: its MAC and the descriptor of its tap, which has the index `tap` in the namespace."""

    mac: bytes
    fd: int
    tap: int


class Devices(NamedTuple):
    """Those of a machine that was saved: how many, and the number of the one that an interface had, by its name."""

    number: int
    known: dict[str, int]


class Network:
    """The namespace of one VM. `nics` are those that are there at the start, `devices` what QEMU is to have."""

    __slots__ = ("_joined", "_route", "devices", "nics")

    def __init__(self, path: str, undo: Undo, saved: Devices | None = None) -> None:
        """Make the taps and join them. Closing is `undo`'s; the devices' descriptors are to be closed with `close_taps`.

        saved: those of a machine that goes on: as many, and each interface joined to the one that the guest knows it by.
        Raises NotFound, InvalidRequest (it is our own), Unsupported (no taps, too many interfaces), Forbidden.
        """
        self._joined: dict[str, tuple[Device, int]] = {}  # name of an interface -> its device, its index
        self.devices: list[Device] = []
        try:
            self._route, reserved = _enter(path)
        except OSError as error:
            raise from_os_error(f"cannot use the network namespace {path}", error) from error
        undo.add("close the network namespace", self.close)
        try:
            self.nics = self._interfaces()
            self._make_taps(reserved, saved.number if saved else len(self.nics) + SPARE)
            for nic, device in zip(self.nics, self._places(saved), strict=True):
                self._join(nic, device)
        except OSError as error:
            raise from_os_error("cannot connect the virtual machine to its network", error) from error
        finally:
            for fd in reserved[len(self.devices) :]:
                os.close(fd)

    def _make_taps(self, reserved: list[int], wanted: int) -> None:
        """A device for each interface, then the spare ones."""
        most = min(wanted, MAX_NICS)
        if len(self.nics) > most:
            raise Unsupported(
                f"this virtual machine has at most {most} network interfaces, not {len(self.nics)}",
                hint="disconnect it from some: ambi network disconnect NETWORK NAME",
            )
        for number, fd in enumerate(reserved[:wanted]):
            tap.make(fd, f"{TAP_PREFIX}{number}")
            self.devices.append(Device(device_mac(number), fd, 0))
        indices = {link.name: link.ifindex for link in self._route.links()}
        self.devices = [device._replace(tap=indices[f"{TAP_PREFIX}{number}"]) for number, device in enumerate(self.devices)]

    def _interfaces(self) -> tuple[Nic, ...]:
        """Every Ethernet interface but our taps."""
        links = [link for link in self._route.links() if link.arp_type == netlink.ARPHRD_ETHER and link.kind != "tun"]
        addresses, routes = (self._route.addresses(), self._route.routes()) if links else ([], [])
        return tuple(
            Nic(
                link.ifindex, link.name, link.mac, link.mtu,
                tuple(found for found in addresses if found.ifindex == link.ifindex),
                tuple(found for found in routes if found.ifindex == link.ifindex),
            )
            for link in sorted(links)
        )  # fmt: skip

    def _places(self, saved: Devices | None) -> list[Device]:
        """The device of each interface of the start."""
        known = {name: number for name, number in (saved.known if saved else {}).items() if number < len(self.devices)}
        there = {nic.name for nic in self.nics}
        kept = {number for name, number in known.items() if name in there}
        left = sorted(set(known.values()) - kept)  # of interfaces that are gone: the last to be used
        free = iter([n for n in range(len(self.devices)) if n not in kept and n not in left] + left)
        return [self.devices[known[nic.name] if nic.name in known else next(free)] for nic in self.nics]

    def known(self) -> dict[str, int]:
        """The number of the device of each interface, by its name."""
        return {name: device.mac[-1] for name, (device, _) in self._joined.items()}

    def _join(self, nic: Nic, device: Device) -> None:
        self._route.set_link(device.tap, mtu=nic.mtu)
        self._route.redirect(nic.ifindex, device.tap)
        self._route.redirect(device.tap, nic.ifindex)
        self._joined[nic.name] = (device, nic.ifindex)

    def requests(self) -> list[Items]:
        """NET for each interface of the start."""
        return [nic.items(self._joined[nic.name][0].mac) for nic in self.nics]

    def plug(self, name: str) -> Items:
        """Join the interface `name`; the fields of NET that tell the guest. Raises NotFound, Conflict (no device left)."""
        try:
            nic = next((nic for nic in self._interfaces() if nic.name == name), None)
            if nic is None:
                raise NotFound(f"the network namespace of the virtual machine has no interface {name}")
            known = self._joined.get(name)
            if known and known[1] == nic.ifindex:
                return nic.items(known[0].mac)
            used = {device.mac for device, _ in self._joined.values()}
            free = known[0] if known else next((device for device in self.devices if device.mac not in used), None)
            if free is None:
                raise Conflict(
                    f"the virtual machine has no network device left for {name}",
                    hint="restart it: it then has a device for each of its networks, and new spare ones",
                )
            self._join(nic, free)
            return nic.items(free.mac)
        except OSError as error:
            raise from_os_error(f"cannot connect {name} to the virtual machine", error) from error

    def unplug(self, name: str) -> bytes | None:
        """Part the interface `name` from the VM: the MAC of its device, for UNPLUG; None when it had none."""
        known = self._joined.pop(name, None)
        if known is None:
            return None
        device, index = known
        for link in (index, device.tap):
            try:
                self._route.stop_redirecting(link)
            except OSError:  # the interface is gone, and its redirections with it
                pass
        return device.mac

    def close_taps(self) -> None:
        """Let go of the descriptors that QEMU has inherited; a tap lives as long as one of both does."""
        for device in self.devices:
            if device.fd >= 0:
                os.close(device.fd)
        self.devices = [device._replace(fd=-1) for device in self.devices]

    def close(self) -> None:
        """Part the interfaces and let go of the namespace. Idempotent."""
        for name in tuple(self._joined):
            self.unplug(name)
        self.close_taps()
        self._route.close()


def device_mac(number: int) -> bytes:
    """The own MAC of a VM's network device."""
    return DEVICE_MAC + bytes((number,))


def path_of(config: dict[str, object]) -> str | None:
    """The path of the network namespace that config.json asks for; None for a VM with `lo` alone."""
    linux = config.get("linux")
    for entry in (linux.get("namespaces") or ()) if isinstance(linux, dict) else ():
        if entry.get("type") == "network":
            return entry.get("path") or None
    return None


def open_vhost() -> int | None:
    """A descriptor of the kernel's own virtio-net back-end, for one NIC; None where there is none."""
    try:
        return os.open(VHOST, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None


def _enter(path: str) -> tuple[netlink.Netlink, list[int]]:
    """A netlink socket of the namespace, and descriptors for taps in it.

    Both belong to the namespace in which they were opened, so this thread, the only one of a shim, is there for these few
    calls and for nothing else.
    """
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    there = -1
    reserved: list[int] = []
    try:
        there = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if os.path.samestat(os.fstat(there), os.fstat(own)):
            raise InvalidRequest(
                "a virtual machine has a kernel of its own: it cannot use the host's network namespace",
                hint="run it as a container: --isolation container",
            )
        process.setns(there, process.CLONE_NEWNET)
        try:
            route = netlink.Netlink()
            reserved += [tap.reserve() for _ in range(MAX_NICS)]
        except OSError as error:
            for fd in reserved:
                os.close(fd)
            raise _no_taps(error) from error
        finally:
            process.setns(own, process.CLONE_NEWNET)
        return route, reserved
    finally:
        os.close(own)
        if there >= 0:
            os.close(there)


def _no_taps(error: OSError) -> Exception:
    if error.filename == "/dev/net/tun":
        return Unsupported(
            f"virtual machines with a network need /dev/net/tun: {error.strerror}", hint="modprobe tun; ls -l /dev/net/tun"
        )
    return error


def _address(found: netlink.Address) -> Items:
    return ((AddressTag.FAMILY, found.family), (AddressTag.ADDRESS, found.address), (AddressTag.PREFIX, found.prefix))


def _route(found: netlink.Route) -> Items:
    items: list[tuple[int, Value]] = [
        (RouteTag.FAMILY, found.family),
        (RouteTag.DESTINATION, found.destination),
        (RouteTag.PREFIX, found.prefix),
    ]
    if found.gateway:
        items.append((RouteTag.GATEWAY, found.gateway))
    if found.metric:
        items.append((RouteTag.METRIC, found.metric))
    return items
