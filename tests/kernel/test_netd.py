"""netd in a namespace of the test: who gets names, what is sent on, what published ports carry, and what a kill costs."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from dnslib import EDNS0, QTYPE, RCODE, RR, A, DNSRecord

from ambi.core.errors import Conflict, InvalidRequest
from ambi.core.roots import Roots
from ambi.network.host import link_of
from ambi.network.model import Network, Port
from ambi.network.netd import server
from ambi.network.netd.client import NamedEndpoint, Netd, NetworkNames
from tests.netkit import OUTSIDE4, Instance, Lab, network

pytestmark = pytest.mark.needs("root")
UDP = socket.SOCK_DGRAM


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as made:
        yield made


class Served:
    """netd in `lab.host`, with a client there."""

    def __init__(self, lab: Lab, run: Path) -> None:
        self.lab, self.roots = lab, Roots(run=run)
        self.client = Netd(self.roots)

    def publish(self, key: str, *ports: Port) -> list[Port]:
        return self.lab.host.do(self.client.publish, key, list(ports))

    def name(self, net: Network, *endpoints: NamedEndpoint) -> None:
        gateways, subnets = tuple(p.gateway for p in net.pools), tuple(p.subnet for p in net.pools)
        names = NetworkNames(net.name, link_of(net, ""), gateways, subnets, net.internal, endpoints)
        self.lab.host.do(self.client.network, net.id, names)

    @property
    def pid(self) -> int:
        return int(self.lab.host.do(lambda: self.client.pid))


@pytest.fixture
def netd(lab: Lab, tmp_path: Path) -> Iterator[Served]:
    made = Served(lab, tmp_path)
    yield made
    lab.host.do(lambda: made.client.close(stop=True))
    assert not made.roots.netd_socket.exists()


def ask(who: Instance, server: str, name: str, kind: str = "A", *, tcp: bool = False, edns: bool = False) -> DNSRecord:
    question = DNSRecord.question(name, kind)
    if edns:
        question.add_ar(EDNS0(udp_len=4096))
    reply = DNSRecord.parse(who.do(question.send, server, 53, tcp=tcp, timeout=6, ipv6=":" in server))
    assert reply.header.id == question.header.id
    return reply


def found(reply: DNSRecord) -> set[str]:
    return {str(record.rdata) for record in reply.rr}


def test_names_for_members_alone(lab: Lab, netd: Served) -> None:
    net = network("10.1.0.0/24", "fd01::/64", name="web")
    a, b, stranger = lab.instance(net), lab.instance(net), lab.instance(net)
    netd.name(net, NamedEndpoint("a", ("a",), (a.ip4, a.ip6)), NamedEndpoint("b", ("b", "db"), (b.ip4, b.ip6)))
    for gateway in ("10.1.0.1", "fd01::1"):
        for tcp in (False, True):
            assert found(ask(a, gateway, "DB.web", tcp=tcp)) == {b.ip4}
            assert found(ask(a, gateway, "db", "AAAA", tcp=tcp)) == {b.ip6}
    assert ask(a, "10.1.0.1", "b", "MX").header.rcode == RCODE.NOERROR
    for who in (stranger, lab.host):
        with who.do(socket.socket, socket.AF_INET, UDP) as sock:
            sock.settimeout(0.3)
            sock.connect(("10.1.0.1", 53))
            with pytest.raises(OSError):
                sock.send(DNSRecord.question("db").pack())
                sock.recv(512)
    for junk in (b"", b"\0", os.urandom(40), bytes(DNSRecord.question("db").reply().pack())):
        with a.do(socket.socket, socket.AF_INET, UDP) as sock:
            sock.sendto(junk, ("10.1.0.1", 53))
    lab.host.do(netd.client.network, net.id, None)
    with pytest.raises(OSError):
        ask(a, "10.1.0.1", "db", tcp=True)


def test_port_53_in_use_is_named(lab: Lab, netd: Served) -> None:
    net = network("10.1.0.0/24", name="web")
    a = lab.instance(net)
    blocking = lab.host.listen(53, "0.0.0.0")
    with pytest.raises(Conflict, match=rf"port 53 of 10\.1\.0\.1 on .* is in use by .*\(pid {os.getpid()}\)"):
        netd.name(net, NamedEndpoint("a", ("a",), (a.ip4,)))
    blocking.close()
    netd.name(net, NamedEndpoint("a", ("a",), (a.ip4,)))
    assert found(ask(a, "10.1.0.1", "a")) == {a.ip4}


class Upstream:
    """A resolver in `lab.outside` that answers by `reply(query)`, by UDP and TCP; several datagrams may be one."""

    def __init__(self, lab: Lab, stack: ExitStack, reply: Callable[[DNSRecord, bool], list[DNSRecord]]) -> None:
        self.asked: list[tuple[str, int, int]] = []  # name, id, port of the client
        self._reply = reply
        self._udp, self._tcp = lab.outside.listen(53, OUTSIDE4, UDP), lab.outside.listen(53, OUTSIDE4)
        threads = [threading.Thread(target=work) for work in (self._datagrams, self._connections)]
        for sock in (self._udp, self._tcp):
            sock.settimeout(None)
            stack.callback(sock.close)
            stack.callback(_end, sock)
        for thread in threads:
            thread.start()
            stack.push(lambda *_, thread=thread: thread.join())
        for sock in (self._udp, self._tcp):
            stack.callback(_end, sock)

    def _datagrams(self) -> None:
        while True:
            data, client = self._udp.recvfrom(4096)
            if not client or not data:
                return
            for answer in self._answers(data, client, tcp=False):
                self._udp.sendto(answer, client)

    def _connections(self) -> None:
        while True:
            try:
                connection, client = self._tcp.accept()
            except OSError:
                return
            with connection:
                data = connection.recv(4096)
                for answer in self._answers(data[2:], client, tcp=True):
                    connection.sendall(len(answer).to_bytes(2, "big") + answer)

    def _answers(self, data: bytes, client: tuple[str, int], *, tcp: bool) -> list[bytes]:
        query = DNSRecord.parse(data)
        self.asked.append((str(query.q.qname), query.header.id, client[1]))
        return [bytes(answer.pack()) for answer in self._reply(query, tcp)]


def _end(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)  # wakes who waits in it; on an unconnected datagram socket too, with an error
    except OSError:
        pass


def test_other_names_are_sent_on(lab: Lab, netd: Served) -> None:
    """To the resolvers of the instance: a dead one and one that answers; what is forged before it is passed by."""
    net = network("10.1.0.0/24", name="web")
    a = lab.instance(net)

    def reply(query: DNSRecord, tcp: bool) -> list[DNSRecord]:
        good = query.reply()
        good.add_answer(RR(query.q.qname, QTYPE.A, rdata=A("192.0.2.7"), ttl=5))
        forged = query.reply()
        forged.header.id ^= 1
        forged.add_answer(RR(query.q.qname, QTYPE.A, rdata=A("192.0.2.66"), ttl=5))
        if str(query.q.qname).startswith("long") and not tcp:
            good = query.reply()
            good.header.tc = 1
        if str(query.q.qname).startswith("broken"):
            good.header.rcode = RCODE.SERVFAIL
        return [good] if tcp else [forged, good]

    with ExitStack() as stack:
        upstream = Upstream(lab, stack, reply)
        netd.name(net, NamedEndpoint("a", ("a",), (a.ip4,), {}, ("203.0.113.1", OUTSIDE4)))
        assert found(ask(a, "10.1.0.1", "Example.com", edns=True)) == {"192.0.2.7"}
        assert found(ask(a, "10.1.0.1", "example.com", tcp=True)) == {"192.0.2.7"}
        assert ask(a, "10.1.0.1", "long.example").header.tc == 1
        assert found(ask(a, "10.1.0.1", "long.example", tcp=True)) == {"192.0.2.7"}
        assert ask(a, "10.1.0.1", "secret").header.rcode == RCODE.NXDOMAIN
        assert ask(a, "10.1.0.1", "broken.example").header.rcode == RCODE.SERVFAIL
    assert {name.lower() for name, _, _ in upstream.asked} == {"example.com.", "long.example.", "broken.example."}
    assert len({port for _, _, port in upstream.asked}) == len(upstream.asked), "a port of its own for each query"


def serve(listener: socket.socket) -> threading.Thread:
    """One client: what it has sent is read to its end, then its digest and five megabytes are the answer."""

    def work() -> None:
        connection, _ = listener.accept()
        with connection:
            digest = hashlib.sha256()
            while data := connection.recv(1 << 16):
                digest.update(data)
            connection.sendall(digest.digest() + BULK)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


BULK = os.urandom(5 << 20)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_published_port_carries_both_ways(lab: Lab, netd: Served, address: str) -> None:
    """To an instance with IPv4 alone, with the client's end told before the answer begins."""
    net = network("10.1.0.0/24")
    a = lab.instance(net)
    (port,) = netd.publish("a" * 64, Port("tcp", "", 0, 80, (a.ip4,)))
    assert port.host_port
    thread = serve(a.listen(80))
    with lab.host.do(socket.create_connection, (address, port.host_port), 10) as client:
        client.sendall(BULK)
        client.shutdown(socket.SHUT_WR)
        whole = b"".join(iter(lambda: client.recv(1 << 16), b""))
    thread.join()
    assert whole == hashlib.sha256(BULK).digest() + BULK
    lab.host.do(netd.client.unpublish, "a" * 64)
    with pytest.raises(ConnectionRefusedError):
        lab.host.do(socket.create_connection, (address, port.host_port), 5)


def test_datagrams_come_back_from_where_they_went(lab: Lab, netd: Served) -> None:
    net = network("10.1.0.0/24", "fd01::/64")
    a = lab.instance(net)
    (port,) = netd.publish("a", Port("udp", "", 0, 53, (a.ip4, a.ip6)))
    at_a = a.listen(53, kind=UDP)
    for address in ("127.0.0.1", "127.0.0.2", "::1"):
        assert lab.host.reach(at_a, address, port.host_port), "a connected socket hears only whom it has written to"


def test_a_client_that_does_not_read_costs_nothing(lab: Lab, netd: Served) -> None:
    """Neither processor time nor, with many small segments, more than what the sockets hold; and others are served."""
    net = network("10.1.0.0/24")
    a = lab.instance(net)
    (port,) = netd.publish("a", Port("tcp", "127.0.0.1", 0, 80, (a.ip4,)))
    listener = a.listen(80)
    slow = lab.host.do(socket.create_connection, ("127.0.0.1", port.host_port), 10)
    connection, _ = listener.accept()
    with slow, connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            while True:
                connection.send(b"x" * 100)
        before = _cpu_ticks(netd.pid)
        time.sleep(0.6)
        spent = _cpu_ticks(netd.pid) - before
        assert spent < 15, "60 ticks are a process that spins"
        thread = serve(listener)
        with lab.host.do(socket.create_connection, ("127.0.0.1", port.host_port), 10) as client:
            client.shutdown(socket.SHUT_WR)
            assert client.recv(32)
            while client.recv(1 << 16):
                pass
        thread.join()


def _cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_ports_that_are_taken(lab: Lab, netd: Served) -> None:
    with lab.host.listen(8080, "127.0.0.1"):
        with pytest.raises(Conflict, match=rf"0\.0\.0\.0:8080/tcp is in use by .*\(pid {os.getpid()}\)"):
            netd.publish("a", Port("tcp", "", 8081, 80, ("10.1.0.2",)), Port("tcp", "", 8080, 80, ("10.1.0.2",)))
        assert lab.host.dead("127.0.0.1", 8081), "all or nothing"
        lab.host.listen(8080, "::1").close()
    (port,) = netd.publish("a", Port("tcp", "", 8080, 80, ("10.1.0.2",)))
    assert netd.publish("a", port._replace(targets=("10.1.0.3",))) == [port._replace(targets=("10.1.0.3",))]
    with pytest.raises(Conflict, match="in use by instance a"):
        netd.publish("b", Port("tcp", "127.0.0.1", 8080, 80, ("10.1.0.2",)))
    (sctp,) = netd.publish("a", Port("sctp", "", 0, 80, ("10.1.0.2",)))
    with pytest.raises(Conflict, match="in use by instance a"):
        netd.publish("b", sctp)
    with pytest.raises(InvalidRequest, match=r"192\.0\.2\.1 is no address of this host"):
        netd.publish("b", Port("udp", "192.0.2.1", 53, 53, ("10.1.0.2",)))
    with pytest.raises(InvalidRequest, match="protocol dccp"):
        netd.publish("b", Port("dccp", "", 1, 1, ()))


def test_it_outlives_the_engine_and_comes_back_when_killed(lab: Lab, netd: Served) -> None:
    net = network("10.1.0.0/24", name="web")
    a = lab.instance(net)
    netd.name(net, NamedEndpoint("a", ("a",), (a.ip4,)))
    (port,) = netd.publish("a", Port("tcp", "", 0, 80, (a.ip4,)))
    first, at_a = netd.pid, a.listen(80)

    netd.client.close()  # as when the engine ends
    assert found(ask(a, "10.1.0.1", "a")) == {a.ip4}
    assert lab.host.reach(at_a, "127.0.0.1", port.host_port)
    netd.client = Netd(netd.roots)
    assert netd.pid == first
    assert netd.publish("a", port) == [port], "told again by the next engine"
    netd.name(net, NamedEndpoint("a", ("a", "again"), (a.ip4,)))

    os.kill(first, signal.SIGKILL)
    for _ in range(50):
        if lab.host.reach(at_a, "127.0.0.1", port.host_port):
            break
        time.sleep(0.2)  # nobody calls: it is started by who watches
    assert found(ask(a, "10.1.0.1", "again")) == {a.ip4}
    assert netd.pid != first
    lab.host.do(netd.client.keep, [], [])
    assert lab.host.dead("127.0.0.1", port.host_port)


def test_what_it_may_and_what_it_takes(lab: Lab, netd: Served) -> None:
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{netd.pid}/status").read_text().splitlines())
    assert "0" not in status["Uid"].split() + status["Gid"].split()
    assert status["Seccomp"] == "2" and status["NoNewPrivs"] == "1"
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) & int(status["CapPrm"], 16)
    assert int(status["CapEff"], 16).bit_count() <= 4
    text = Path(f"/proc/{netd.pid}/smaps_rollup").read_text()
    assert int(text.partition("Pss:")[2].split()[0]) < 15 << 10


def test_it_ends_when_there_is_nothing_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "IDLE_S", 0.05)
    server.Server(Roots(run=tmp_path)).run()
