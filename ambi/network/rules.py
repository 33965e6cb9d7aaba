"""The nftables table `inet ambi`: address translation, isolation of networks, published ports.

The rules never change; networks and ports are elements of sets and maps, so a start without ports changes nothing and a
publish adds an element. Every change is one transaction.

What passes, in Docker's terms:
- within a network all, and between two networks nothing, but for published ports;
- out of a network all, behind the host's address unless masquerading is off (`internal`: nothing in or out);
- into a network what answers, and what is published: by the host's address, or directly by the instance's. Unlike Docker
  before version 28, a neighbour that routes to an instance's address reaches no port that is not published;
- on its way through the host the client's address is kept, but where an answer would not come back through the host:
  between two instances of one network by the host's address.
A connection of the host to its own 127.0.0.1 is diverted like others where the bridge passes it (see `loopback`), and seen
as one of the bridge's address. Where it does not, and on ::1, netd serves.
"""

from __future__ import annotations

import ipaddress
import re
import threading
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from ambi.core.errors import Conflict, InvalidRequest, NotFound
from ambi.linux.nftables import Nftables
from ambi.network.model import Network, Port

_SETS = {
    "bridges": "type ifname",
    "same": "type ifname . ifname",  # (BRIDGE, BRIDGE): nft cannot compare two names
    "internal": "type ifname",
    "others": "type ifname",  # bridges of other engines, whose instances are theirs to publish
    "open4": "type ifname",  # every port may be reached directly
    "open6": "type ifname",
    "ping4": "type ifname",  # routed: instances answer pings
    "ping6": "type ifname",
    "home4": "type ipv4_addr . ifname; flags interval",  # subnet and its bridge
    "home6": "type ipv6_addr . ifname; flags interval",
    "nat4": "type ipv4_addr; flags interval",
    "nat6": "type ipv6_addr; flags interval",
    "published4": "type ipv4_addr . inet_proto . inet_service",
    "published6": "type ipv6_addr . inet_proto . inet_service",
}
_MAPS = {
    "source4": "type ipv4_addr : ipv4_addr; flags interval",  # subnet to the address it leaves with
    "any4": "type inet_proto . inet_service : ipv4_addr . inet_service",
    "any6": "type inet_proto . inet_service : ipv6_addr . inet_service",
    "at4": "type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service",
    "loop4": "type inet_proto . inet_service : ipv4_addr . inet_service",  # any4 and at4, for 127.0.0.0/8
    "loopat4": "type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service",
    "at6": "type ipv6_addr . inet_proto . inet_service : ipv6_addr . inet_service",
}
ANSWER_MARK = 0x616D6269  # of answers to connections from 127.0.0.1: see loopback
_CHAINS = f"""
chain answers {{
    type filter hook prerouting priority dstnat + 10; policy accept;
    iifname @bridges ip daddr 127.0.0.0/8 ct direction reply ct status dnat meta mark set {ANSWER_MARK:#x}
}}
chain divert {{
    dnat ip to ip daddr . meta l4proto . th dport map @at4
    dnat ip6 to ip6 daddr . meta l4proto . th dport map @at6
    fib daddr type != local return
    meta nfproto ipv4 dnat ip to meta l4proto . th dport map @any4
    meta nfproto ipv6 dnat ip6 to meta l4proto . th dport map @any6
}}
chain own {{
    dnat ip to ip daddr . meta l4proto . th dport map @loopat4
    dnat ip to meta l4proto . th dport map @loop4
}}
chain prerouting {{
    type nat hook prerouting priority dstnat; policy accept;
    meta l4proto {{ tcp, udp, sctp }} jump divert
}}
chain output {{
    type nat hook output priority -100; policy accept;
    meta l4proto != {{ tcp, udp, sctp }} return
    ip daddr 127.0.0.0/8 goto own
    ip6 daddr ::1 return
    jump divert
}}
chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    ct status dnat ip saddr . oifname @home4 masquerade
    ct status dnat ip6 saddr . oifname @home6 masquerade
    ip saddr 127.0.0.0/8 oifname @bridges masquerade
    oifname @bridges return
    snat ip to ip saddr map @source4
    ip saddr @nat4 masquerade
    ip6 saddr @nat6 masquerade
}}
chain inward {{
    ct status dnat accept
    iifname @bridges drop
    ip daddr . meta l4proto . th dport @published4 accept
    ip6 daddr . meta l4proto . th dport @published6 accept
    meta nfproto ipv4 oifname @open4 accept
    meta nfproto ipv6 oifname @open6 accept
    icmp type echo-request oifname @ping4 accept
    icmpv6 type echo-request oifname @ping6 accept
    drop
}}
chain forward {{
    type filter hook forward priority filter; policy accept;
    iifname != @bridges oifname != @bridges accept
    iifname . oifname @same accept
    ct state established,related accept
    iifname @internal drop
    oifname @internal drop
    oifname @others ct status != dnat drop
    oifname @bridges goto inward
}}
"""
_KEY = re.compile(r"[0-9A-Za-z][0-9A-Za-z_.-]{0,127}")
_PROTOCOLS = ("tcp", "udp", "sctp")


class Element(NamedTuple):
    """One element: of which set or map, its key as nft writes it, what a map has for it, and the instance it is for."""

    holder: str
    key: str
    value: str = ""
    owner: str = ""

    def text(self) -> str:
        comment = f' comment "{self.owner}"' if self.owner else ""
        return self.key + comment + (f" : {self.value}" if self.value else "")


def of_network(network: Network, link: str) -> list[Element]:
    """What the table has for a bridge network whose bridge is `link`."""
    name = f'"{link}"'
    found = [Element("bridges", name), Element("same", f"{name} . {name}")]
    families = {pool.subnet: ipaddress.ip_network(pool.subnet).version for pool in network.pools}
    found += [Element(f"home{family}", f"{subnet} . {name}") for subnet, family in families.items()]
    if network.internal:
        return [*found, Element("internal", name)]
    masquerade = network.options.get("com.docker.network.bridge.enable_ip_masquerade", "true") != "false"
    for family in (4, 6):
        mode = network.options.get(f"com.docker.network.bridge.gateway_mode_ipv{family}", "nat")
        if mode == "routed":
            found.append(Element(f"ping{family}", name))
        elif mode == "nat-unprotected":
            found.append(Element(f"open{family}", name))
        if mode == "routed" or not masquerade:
            continue
        source = network.options.get("com.docker.network.host_ipv4", "") if family == 4 else ""
        for subnet in (subnet for subnet, version in families.items() if version == family):
            found.append(Element("source4", subnet, source) if source else Element(f"nat{family}", subnet))
    return found


def of_port(key: str, port: Port, *, loopback: bool) -> list[Element]:
    """What the table has for a published port; nothing without a target of its family. loopback: the target's bridge passes
    what goes to 127.0.0.0/8; else there is nothing for a port of such an address, nor ever for one of ::1."""
    if not _KEY.fullmatch(key) or port.protocol not in _PROTOCOLS:
        raise InvalidRequest(f"cannot publish {port.protocol} port {port.port} of '{key}'")
    where = ipaddress.ip_address(port.host_ip) if port.host_ip else None
    if where is not None and where.is_loopback and not (loopback and where.version == 4):
        return []
    found = []
    for text in port.targets:
        target = ipaddress.ip_address(text)
        if where is not None and where.version != target.version:
            continue
        service, to = f"{port.protocol} . {port.host_port}", f"{target} . {port.port}"
        if where is not None and where.is_loopback:
            found.append(Element("loopat4", f"{where} . {service}", to, key))
            continue
        holder, head = ("any", service) if where is None or where.is_unspecified else ("at", f"{where} . {service}")
        found.append(Element(f"{holder}{target.version}", head, to, key))
        found.append(Element(f"published{target.version}", f"{target} . {port.protocol} . {port.port}"))
        if loopback and holder == "any" and target.version == 4:
            found.append(Element("loop4", service, to, key))
    return found


class Rules:
    """The table of one run root, as it should be and as it is. Safe between threads."""

    def __init__(self, tag: str) -> None:
        self.table = f"ambi-{tag}" if tag else "ambi"
        self._nft: Nftables | None = None
        self._lock = threading.RLock()
        self._networks: dict[str, list[Element]] = {}
        self._ports: dict[str, list[Element]] = {}
        self._there: dict[tuple[str, str], Element] = {}  # what the kernel has
        self._shape = b""  # what the table without its elements looks like

    def network(self, network_id: str, elements: list[Element]) -> None:
        """The table is there and has `elements` for this network, and nothing else for it."""
        with self._lock:
            self._open()
            before = self._networks.get(network_id, [])
            if before != elements:
                self._networks[network_id] = elements
                self._settle(before)

    def others(self, links: Iterable[str]) -> None:
        """What `links` (bridges of other engines) lead to is reached by published ports only."""
        self.network("", [Element("others", f'"{link}"') for link in links])

    def forget_network(self, network_id: str) -> None:
        with self._lock:
            if self._adopt():
                self._settle(self._networks.pop(network_id, []))

    def publish(self, key: str, ports: Sequence[Port], *, loopback: bool = False) -> None:
        """Raises Conflict when another instance has one of them; then none of `ports` is published. loopback: as for
        `of_port`."""
        wanted = [element for port in ports for element in of_port(key, port, loopback=loopback)]
        with self._lock:
            self._open()
            for element in wanted:
                there = self._there.get((element.holder, element.key))
                if element.value and there is not None and there != element:
                    raise Conflict(f"host port {element.key} is published by {there.owner[:12]} already")
            before = self._ports.get(key, [])
            self._ports[key] = before + [element for element in wanted if element not in before]
            try:
                self._settle()
            except BaseException:
                self._ports[key] = before
                raise

    def unpublish(self, key: str) -> list[int]:
        """The UDP ports of the host that it had."""
        with self._lock:
            if not self._adopt():
                return []
            gone = self._ports.pop(key, [])
            self._settle(gone)
        return [int(e.key.rpartition(" ")[2]) for e in gone if e.owner and "udp" in e.key]

    def keep_only(self, networks: Collection[str], keys: Collection[str]) -> None:
        """Forget every other network and instance, and what the kernel has for nobody that is known."""
        with self._lock:
            if not self._adopt():
                return
            self._networks = {name: value for name, value in self._networks.items() if name in networks or not name}
            self._ports = {name: value for name, value in self._ports.items() if name in keys}
            self._settle(list(self._there.values()))

    def heal(self) -> bool:
        """Make the table again if somebody changed or removed it, with all its elements; True when that was so."""
        with self._lock:
            if self._nft is None or not self._shape or self._look() == self._shape:
                return False
            self._rebuild()
            return True

    def close(self) -> None:
        """Forget everything here; the kernel keeps it."""
        with self._lock:
            self._networks, self._ports, self._there, self._shape = {}, {}, {}, b""
            if self._nft is not None:
                self._nft.close()
                self._nft = None

    def close_down(self) -> None:
        """Remove the table. The next call makes it again."""
        with self._lock:
            self._networks, self._ports, self._there, self._shape = {}, {}, {}, b""
            nft, self._nft = self._nft or Nftables(), None
            try:
                nft.run(f"delete table inet {self.table}")
            except NotFound:
                pass
            finally:
                nft.close()

    def another(self) -> bool:
        """Whether this host has the table of another run root of ours."""
        nft = Nftables()
        try:
            tables = [row["table"]["name"] for row in nft.query("list tables inet") if "table" in row]
        finally:
            nft.close()
        return any(re.fullmatch("ambi(-.*)?", name) and name != self.table for name in tables)

    # what follows is called with the lock held

    def _open(self) -> None:
        """The table is there."""
        if not self._adopt():
            self._rebuild()

    def _adopt(self) -> bool:
        """Whether the table is there; one of an engine that was here before becomes ours, in our shape."""
        if self._nft is not None:
            return bool(self._shape)
        nft = Nftables()
        try:
            self._read(nft.query(f"list table inet {self.table}"))
        except NotFound:
            self._nft = nft
            return False
        except BaseException:
            nft.close()
            raise
        self._nft = nft
        self._rebuild()
        return True

    def _read(self, rows: Iterable[dict[str, Any]]) -> None:
        """Take over the elements of a listed table."""
        for element in _elements(rows):
            self._there[element.holder, element.key] = element
            if element.owner and element.holder.startswith("loop"):
                self._ports.setdefault(element.owner, []).append(element)
            elif element.owner:
                target, _, port = element.value.rpartition(" . ")
                passes = f"{target} . {element.key.split(' . ')[-2]} . {port}"
                self._ports.setdefault(element.owner, []).extend(
                    [element, Element(f"published{element.holder[-1]}", passes)]
                )

    def _rebuild(self) -> None:
        self._run(f"table inet {self.table}\ndelete table inet {self.table}\n" + text(self.table, self._there.values()))
        self._shape = self._look()

    def _look(self) -> bytes:
        assert self._nft is not None
        try:
            return self._nft.show(f"list table inet {self.table}")
        except NotFound:
            return b""

    def _settle(self, dropped: Collection[Element] = ()) -> None:
        """Make the kernel have what is wanted, and no longer those of `dropped` that nobody wants.

        What an engine before this one left there stays until `keep_only` says who is still there.
        """
        wanted = {(e.holder, e.key): e for rows in (*self._networks.values(), *self._ports.values()) for e in rows}
        gone = {(e.holder, e.key) for e in dropped} - wanted.keys()
        new = {place: e for place, e in wanted.items() if self._there.get(place) != e}
        lines = [
            f"delete element inet {self.table} {holder} {{ {key} }}"
            for holder, key in (*gone, *new)
            if (holder, key) in self._there
        ]
        lines += [f"add element inet {self.table} {e.holder} {{ {e.text()} }}" for e in new.values()]
        before = self._there
        self._there = {place: e for place, e in before.items() if place not in gone} | new
        if not lines:
            return
        try:
            self._run("\n".join(lines))
        except (NotFound, Conflict):  # somebody else was in our table: make it as it should be
            self._rebuild()
        except BaseException:
            self._there = before
            raise

    def _run(self, command: str) -> None:
        assert self._nft is not None
        self._nft.run(command)


def text(table: str, elements: Iterable[Element]) -> str:
    """The whole table as nft reads it."""
    content: dict[str, list[str]] = {}
    for element in elements:
        content.setdefault(element.holder, []).append(element.text())
    lines = [f"table inet {table} {{"]
    for word, holders in (("set", _SETS), ("map", _MAPS)):
        for name, kind in holders.items():
            inside = f"; elements = {{ {', '.join(content[name])} }}" if name in content else ""
            lines.append(f"{word} {name} {{ {kind}{inside}; }}")
    return "\n".join(lines) + _CHAINS + "}\n"


def _elements(rows: Iterable[dict[str, Any]]) -> Iterable[Element]:
    """The elements of sets and maps in the JSON of `list table`."""
    for row in rows:
        found = row.get("set") or row.get("map")
        if not found or found["name"] not in (*_SETS, *_MAPS):
            continue
        for entry in found.get("elem", ()):
            key, value = (entry[0], _word(entry[1])) if "map" in row else (entry, "")
            owner = ""
            if isinstance(key, dict) and "elem" in key:
                owner, key = key["elem"].get("comment", ""), key["elem"]["val"]
            word = _word(key)
            if not word or ("map" in row and not value):
                continue  # not ours: the next rebuilding leaves it out
            kinds = [found["type"]] if isinstance(found["type"], str) else found["type"]
            parts = zip(kinds, word.split(" . "), strict=False)
            word = " . ".join(f'"{part}"' if kind == "ifname" else part for kind, part in parts)
            yield Element(found["name"], word, value, owner)


def _word(value: Any) -> str:
    """One key or value of libnftables-json(5) as nft's own words, "" for kinds that we never make."""
    if isinstance(value, dict):
        if "concat" in value:
            return " . ".join(_word(part) for part in value["concat"])
        if "prefix" in value:
            return f"{_word(value['prefix']['addr'])}/{value['prefix']['len']}"
        return ""
    return str(value)
