"""Names on networks, and what is answered and what is sent on."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from dnslib import EDNS0, QTYPE, RCODE, DNSQuestion, DNSRecord

from ambi.network.netd import dns
from ambi.network.netd.names import Asker, NamedEndpoint, NameTable, NetworkNames
from ambi.network.netd.resolvers import HostResolvers, Resolvers, parse
from tests.fuzz.mutate import mutated


@pytest.fixture
def table() -> NameTable:
    made = NameTable()
    web = NamedEndpoint("i-web", ("web", "Front", "0123456789ab"), ("10.1.0.2", "fd01::2"), {"db": "i-two"}, ("9.9.9.9",))
    one = NamedEndpoint("i-one", ("one", "front"), ("10.1.0.3",))
    two = NamedEndpoint("i-two", ("two",), ("10.1.0.4",))
    made.put("n1", NetworkNames("mynet", "br1", ("10.1.0.1",), ("10.1.0.0/24", "fd01::/64"), False, (web, one, two)))
    far = NamedEndpoint("i-far", ("far", "a.dotted.name"), ("10.2.0.9",))
    back = NamedEndpoint("i-web", ("web",), ("10.2.0.2",))
    made.put("n2", NetworkNames("inner", "br2", ("10.2.0.1",), ("10.2.0.0/24",), True, (far, back)))
    return made


def asker(table: NameTable, address: str, network: str = "n1") -> Asker:
    found = table.asker(network, address)
    assert found is not None
    return found


def ask(table: NameTable, who: Asker, name: str, kind: str = "A") -> DNSRecord | None:
    question = dns.parse(bytes(DNSRecord(q=DNSQuestion(name, getattr(QTYPE, kind))).pack()))
    assert question is not None
    reply = dns.local_answer(table, who, question)
    return None if reply is None else DNSRecord.parse(reply)


def addresses(table: NameTable, who: Asker, name: str, kind: str = "A") -> set[str] | None:
    reply = ask(table, who, name, kind)
    return None if reply is None else {str(record.rdata) for record in reply.rr}


def test_strangers_are_nobody(table: NameTable) -> None:
    assert table.asker("n1", "10.1.0.99") is None
    assert table.asker("n1", "10.2.0.9") is None, "an address of another network"
    assert table.asker("gone", "10.1.0.2") is None


def test_who_sees_what(table: NameTable) -> None:
    """Names of all networks of who asks, by any spelling, and of no others; private links."""
    web, one, far = asker(table, "10.1.0.2"), asker(table, "10.1.0.3"), asker(table, "10.2.0.9", "n2")
    assert addresses(table, one, "TWO.") == {"10.1.0.4"}
    assert addresses(table, one, "two.MyNet") == {"10.1.0.4"}
    assert addresses(table, one, "0123456789ab") == {"10.1.0.2"}
    assert addresses(table, one, "front") == {"10.1.0.2", "10.1.0.3"}
    assert addresses(table, web, "web") == {"10.1.0.2", "10.2.0.2"}
    assert addresses(table, web, "far") == addresses(table, web, "a.dotted.name") == {"10.2.0.9"}
    assert addresses(table, web, "db") == {"10.1.0.4"}
    for name in ("db", "far"):
        reply = ask(table, one, name)
        assert reply is not None and reply.header.rcode == RCODE.NXDOMAIN
    assert addresses(table, far, "web.inner") == {"10.2.0.2"}
    assert ask(table, far, "web.mynet") is None
    assert web.servers == ("9.9.9.9",) and not web.internal and far.internal


def test_no_data_is_not_no_name(table: NameTable) -> None:
    who = asker(table, "10.1.0.2")
    for kind, expected in (("AAAA", set()), ("MX", set()), ("A", {"10.1.0.4"})):
        reply = ask(table, who, "two", kind)
        assert reply is not None and reply.header.rcode == RCODE.NOERROR
        assert {str(record.rdata) for record in reply.rr} == expected
        assert all(record.ttl == 600 for record in reply.rr)
    assert addresses(table, who, "web", "AAAA") == {"fd01::2"}


def test_single_labels_stay_here(table: NameTable) -> None:
    who = asker(table, "10.1.0.2")
    for kind in ("A", "AAAA", "MX", "SRV", "TXT", "ANY"):
        reply = ask(table, who, "secret", kind)
        assert reply is not None and reply.header.rcode == RCODE.NXDOMAIN
    for name, kind in (("com", "DS"), (".", "NS"), ("example.com", "A"), ("nothing.mynet", "A")):
        assert ask(table, who, name, kind) is None


def test_reverse(table: NameTable) -> None:
    who = asker(table, "10.1.0.3")
    for name, expected in (("2.0.1.10.in-addr.arpa", "web.mynet."), ("3.0.1.10.in-addr.arpa.", "one.mynet.")):
        reply = ask(table, who, name, "PTR")
        assert reply is not None and str(reply.rr[0].rdata) == expected
    six = "2." + "0." * 27 + "1.0.d.f.ip6.arpa"
    assert dns.address_of(six) == "fd01::2"
    reply = ask(table, who, six, "PTR")
    assert reply is not None and str(reply.rr[0].rdata) == "web.mynet."
    reply = ask(table, who, "77.0.1.10.in-addr.arpa", "PTR")
    assert reply is not None and reply.header.rcode == RCODE.NXDOMAIN, "nobody outside knows who is in our subnets"
    for name in ("8.8.8.8.in-addr.arpa", "0.1.10.in-addr.arpa", "9.0.2.10.in-addr.arpa", "x.ip6.arpa"):
        assert ask(table, who, name, "PTR") is None


def test_dropped_networks_answer_nothing(table: NameTable) -> None:
    table.drop("n2")
    assert addresses(table, asker(table, "10.1.0.2"), "web") == {"10.1.0.2"}
    with pytest.raises(ValueError, match="nonsense"):
        table.put("n3", NetworkNames("x", "br", (), ("nonsense",)))


def test_what_does_not_fit_a_datagram() -> None:
    """Who says that it takes more than 512 bytes gets more; who does not is told to come by TCP."""
    table = NameTable()
    rows = [NamedEndpoint(f"i{n}", ("many",), (f"10.1.0.{n}",)) for n in range(1, 101)]
    table.put("n", NetworkNames("net", "br", (), ("10.1.0.0/24",), False, tuple(rows)))
    who = asker(table, "10.1.0.7", "n")
    plain = dns.parse(bytes(DNSRecord.question("many").pack()))
    extended = DNSRecord.question("many")
    extended.add_ar(EDNS0(udp_len=4096))
    wide = dns.parse(bytes(extended.pack()))
    assert plain is not None and wide is not None
    whole = dns.local_answer(table, who, plain)
    assert whole is not None
    cut = DNSRecord.parse(dns.fitting(plain, whole))
    assert cut.header.tc == 1 and not cut.rr
    reply = dns.local_answer(table, who, wide)
    assert reply is not None
    fits = DNSRecord.parse(dns.fitting(wide, reply))
    assert len(fits.rr) == 100 and fits.ar[0].rtype == QTYPE.OPT
    orders = {str(DNSRecord.parse(dns.local_answer(table, who, plain) or b"").rr[0].rdata) for _ in range(50)}
    assert len(orders) > 1, "shuffled"


def test_only_answers_to_the_question_count() -> None:
    query = bytes(DNSRecord.question("ExAmple.com").pack())
    good = bytearray(DNSRecord.parse(query).reply().pack())
    assert dns.answers(bytes(good), query)
    for place, value in ((0, good[0] ^ 1), (2, good[2] & 0x7F), (13, good[13] ^ 0x20), (5, 2)):
        wrong = bytearray(good)
        wrong[place] = value
        assert not dns.answers(bytes(wrong), query)
    assert not dns.answers(bytes(good[:20]), query)


def test_resolv_conf(tmp_path: Path) -> None:
    text = "# x\nnameserver 10.0.0.1\nnameserver fe80::1%eth0\nnameserver bad\noptions timeout:1 attempts:3 ndots:x rotate\n"
    assert parse(text) == Resolvers(("10.0.0.1", "fe80::1%eth0"), 1.0, 3)
    assert parse("options timeout:0 attempts:99\n") == Resolvers((), 1.0, 5)
    path = tmp_path / "resolv.conf"
    known = HostResolvers(str(path))
    assert known.now().servers == ()
    path.write_text("nameserver 1.1.1.1\n")
    assert known.now().servers == ("1.1.1.1",)
    path.write_text("nameserver 1.1.1.1\nnameserver 2.2.2.2\n")
    assert known.now().servers == ("1.1.1.1", "2.2.2.2")
    path.unlink()
    assert known.now().servers == ()


def _good() -> list[bytes]:
    extended = DNSRecord.question("web.mynet", "AAAA")
    extended.add_ar(EDNS0(udp_len=1232))
    return [bytes(record.pack()) for record in (
        DNSRecord.question("web"), DNSRecord.question("2.0.1.10.in-addr.arpa", "PTR"), extended,
        DNSRecord.question("x" * 63 + "." + "y" * 63 + ".example.com", "MX"), DNSRecord.question("web").reply(),
    )]  # fmt: skip


SEEDS: tuple[int, ...] = ()  # that once failed


def test_damaged_messages_raise_nothing(table: NameTable) -> None:
    """Twenty thousand of them; what can be read has an answer that can be read, or is sent on."""
    who, good = asker(table, "10.1.0.2"), _good()
    answered = 0
    for seed in (*SEEDS, *range(20_000)):
        data = mutated(good, seed)
        dns.answers(data, good[0])
        dns.answers(good[0], data)
        question = dns.parse(data)
        if question is not None:
            reply = dns.local_answer(table, who, question) or dns.failure(question, RCODE.SERVFAIL)
            DNSRecord.parse(dns.fitting(question, reply))
            answered += 1
    assert 1_000 < answered < 20_000
    assert dns.parse(random.Random(1).randbytes(65536)) is None
