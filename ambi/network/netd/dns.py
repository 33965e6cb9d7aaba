"""DNS messages: what is asked, and answers from the table (RFC 1035; the wire format by dnslib)."""

from __future__ import annotations

import ipaddress
from typing import NamedTuple

from dnslib import AAAA, EDNS0, PTR, QTYPE, RCODE, RR, A, DNSRecord

from ambi.network.netd.names import Asker, NameTable

TTL_S = 600
_ARPA4, _ARPA6 = ".in-addr.arpa", ".ip6.arpa"
_IN = 1
_MOST_UDP = 4096
_ABOUT_TOP_LEVELS = (QTYPE.NS, QTYPE.SOA, QTYPE.DS, QTYPE.DNSKEY)  # what a validating resolver asks of a name of one label


class Question(NamedTuple):
    """A query that can be read. name: in lower case, without the last dot. record: to make answers from."""

    name: str
    kind: int
    record: DNSRecord


def parse(data: bytes) -> Question | None:
    """The one question of a standard query; None for everything else, which is not answered."""
    if len(data) < 12 or len(data) > 65535 or data[2] & 0xF8 or data[4:6] != b"\0\1":
        return None
    try:
        record = DNSRecord.parse(data)
        question = record.questions[0]
        if question.qclass != _IN:
            return None
        record.reply().pack()  # a name that can be read and not be written is no name
        return Question(str(question.qname).rstrip(".").lower(), int(question.qtype), record)
    except Exception:  # dnslib raises what it likes for bytes that are no message
        return None


def local_answer(table: NameTable, asker: Asker, question: Question) -> bytes | None:
    """The answer from the table, or None when it is to be forwarded."""
    if question.name.endswith((_ARPA4, _ARPA6)):
        return _reverse(table, asker, question)
    found = table.addresses(asker, question.name)
    if found is None:
        if question.name and "." not in question.name and question.kind not in _ABOUT_TOP_LEVELS:
            return failure(question, RCODE.NXDOMAIN)  # a name of one label is nobody's business outside
        return None
    reply = _reply(question)
    name = question.record.questions[0].qname
    for address in found:
        ip = ipaddress.ip_address(address)
        if question.kind == QTYPE.A and ip.version == 4:
            reply.add_answer(RR(name, QTYPE.A, rdata=A(address), ttl=TTL_S))
        elif question.kind == QTYPE.AAAA and ip.version == 6:
            reply.add_answer(RR(name, QTYPE.AAAA, rdata=AAAA(address), ttl=TTL_S))
    return bytes(reply.pack())


def _reverse(table: NameTable, asker: Asker, question: Question) -> bytes | None:
    address = address_of(question.name)
    name = table.name_of(asker, address) if address else None
    if name is None:
        return None
    if not name:
        return failure(question, RCODE.NXDOMAIN)
    reply = _reply(question)
    if question.kind == QTYPE.PTR:
        reply.add_answer(RR(question.record.questions[0].qname, QTYPE.PTR, rdata=PTR(name), ttl=TTL_S))
    return bytes(reply.pack())


def address_of(name: str) -> str:
    """The address that a name below in-addr.arpa or ip6.arpa means, "" for a part of one."""
    try:
        if name.endswith(_ARPA4):
            return str(ipaddress.IPv4Address(".".join(reversed(name.removesuffix(_ARPA4).split(".")))))
        digits = "".join(reversed(name.removesuffix(_ARPA6).split(".")))
        return str(ipaddress.IPv6Address(bytes.fromhex(digits))) if len(digits) == 32 else ""
    except ValueError:
        return ""


def _reply(question: Question) -> DNSRecord:
    """An empty answer; with an OPT record when the question has one (RFC 6891, 6.1.1)."""
    reply = question.record.reply(ra=1)
    if any(record.rtype == QTYPE.OPT for record in question.record.ar):
        reply.add_ar(EDNS0(udp_len=_MOST_UDP))
    return reply


def failure(question: Question, code: int) -> bytes:
    reply = _reply(question)
    reply.header.rcode = code
    return bytes(reply.pack())


def fitting(question: Question, reply: bytes) -> bytes:
    """`reply`, or an empty one that says it was cut, so that the client asks by TCP, when it is too long for UDP."""
    room = max((rr.edns_len for rr in question.record.ar if rr.rtype == QTYPE.OPT), default=512)
    if len(reply) <= max(512, min(room, _MOST_UDP)):
        return reply
    short = _reply(question)
    short.header.tc = 1
    return bytes(short.pack())


def answers(reply: bytes, query: bytes) -> bool:
    """Whether `reply` is an answer to `query`: the same id, and the same question to the letter (0x20 included)."""
    if len(reply) < 12 or reply[:2] != query[:2] or not reply[2] & 0x80:
        return False
    end = _question_end(query)
    return end > 0 and reply[4:6] == b"\0\1" and reply[12:end] == query[12:end]


def _question_end(data: bytes) -> int:
    """Where the first question ends, 0 when it cannot be told."""
    at = 12
    while at < len(data) and data[at]:
        if data[at] > 63:
            return 0
        at += data[at] + 1
    return at + 5 if at + 5 <= len(data) else 0


def refused(reply: bytes) -> bool:
    """Whether another server may know better: SERVFAIL, NOTIMP or REFUSED."""
    return reply[3] & 0x0F in (RCODE.SERVFAIL, RCODE.NOTIMP, RCODE.REFUSED)
