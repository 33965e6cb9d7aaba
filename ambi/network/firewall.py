"""What lets our packets pass beside Docker, ufw and firewalld, and takes it away again.

In netfilter a packet passes when every table lets it. Ours has decided what may enter and leave our networks; a firewall
that drops whatever it does not know needs a word from us, in its own place and by its own tool:

- iptables, which Docker and ufw use (both back-ends, IPv4 and IPv6): chains AMBI-FORWARD and AMBI-INPUT, jumped to first, by
  `iptables-restore --noflush`. Only where somebody filters: a table that is not there, or lets all pass, stays as it is.
- firewalld: accepting rules in its base chains by nftables; where it owns its table (version 2) our links in its zone
  `trusted`, by firewall-cmd.

Into the host itself only questions to our DNS pass, and answers to connections of the host to its own 127.0.0.1. A host's
own `policy drop` in tables of nftables.conf is nobody else's to change: there `iifname "ambi*" accept` and
`oifname "ambi*" accept` have to be added by hand.
"""

from __future__ import annotations

import logging
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from ambi.core.errors import AmbiError, Forbidden, NotFound
from ambi.linux.nftables import Nftables

log = logging.getLogger(__name__)

_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"
_CHAINS = {"FORWARD": "AMBI-FORWARD", "INPUT": "AMBI-INPUT"}
_COMMENT = "ambi"
_OURS = "ambi"  # all links of ours that have a name of ours begin so
_LEGACY = {"iptables": "/proc/net/ip_tables_names", "ip6tables": "/proc/net/ip6_tables_names"}
# Bridges of other engines: their instances are theirs to publish.
_OTHERS = re.compile(r"docker0|docker_gwbridge|br-[0-9a-f]{12}|(cni-)?podman[0-9]+|virbr[0-9]+|lxdbr[0-9]+|incusbr[0-9]+")


def other_bridges() -> list[str]:
    """Links of this host that are another engine's bridge, by their usual names."""
    return sorted(name for _, name in socket.if_nameindex() if _OTHERS.fullmatch(name))


class Firewall:
    """Our rules in the firewalls of others, in the namespace of the thread that calls. Safe between threads.

    Nothing here raises: a network works without it where nobody filters, and a firewall that refuses us is logged.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._nft: Nftables | None = None

    def apply(self, custom: Iterable[str]) -> None:
        """Our rules are there; custom: links of ours whose name does not begin with `ambi`."""
        names = [_OURS, *sorted(custom)]
        with self._lock:
            _guarded(self._each_iptables, lambda program: _apply_iptables(program, names))
            _guarded(lambda: _apply_firewalld(self._tables(), names))

    def remove(self) -> None:
        """Our rules are gone, and nothing else."""
        with self._lock:
            _guarded(self._each_iptables, _remove_iptables)
            _guarded(lambda: _remove_firewalld(self._tables()))
        self.close()

    def close(self) -> None:
        with self._lock:
            if self._nft is not None:
                self._nft.close()
                self._nft = None

    def polled(self) -> bool:
        """Whether rules here can change without a message of the kernel: those of the old iptables."""
        return any(_legacy(family) for family in _LEGACY)

    def _tables(self) -> Nftables:
        if self._nft is None:
            self._nft = Nftables()
        return self._nft

    def _each_iptables(self, work: Callable[[str], None]) -> None:
        """Do `work` with each iptables program whose back-end has a filter table; none is made by looking."""
        rows = [row["chain"] for row in self._tables().query("list chains") if "chain" in row]
        for program, family in (("iptables", "ip"), ("ip6tables", "ip6")):
            if any((c["family"], c["table"], c["name"]) == (family, "filter", "FORWARD") for c in rows):
                _guarded(work, f"{program}-nft")
            if _legacy(program):
                _guarded(work, f"{program}-legacy")


def _legacy(family: str) -> bool:
    try:
        return "filter" in Path(_LEGACY[family]).read_text().split()
    except OSError:
        return False


def _guarded(work: Callable[..., None], *args: object) -> None:
    try:
        work(*args)
    except (AmbiError, OSError) as error:
        log.warning("firewall: %s", error)


def _run(argv: list[str], given: str = "") -> str:
    """Output of a program. Raises NotFound, Forbidden (with what it says)."""
    import subprocess

    program = shutil.which(argv[0], path=_PATH)
    if program is None:
        raise NotFound(
            f"there is no {argv[0]}, but its rules are", hint=f"install what has {argv[0]}: apt-get install iptables"
        )
    done = subprocess.run([program, *argv[1:]], input=given, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise Forbidden(f"{' '.join(argv)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def _wanted(names: list[str], *, ipv4: bool) -> dict[str, list[str]]:
    """The rules of our chain for each built-in one. The first name is a prefix.

    Many a rule set refuses what comes for 127.0.0.0/8 by any link but `lo`: answers to connections of the host to its own
    published ports do.
    """
    rules: dict[str, list[str]] = {chain: [] for chain in _CHAINS}
    for name in (f"{names[0]}+", *names[1:]):
        rules["FORWARD"] += [f"-A AMBI-FORWARD -i {name} -j ACCEPT", f"-A AMBI-FORWARD -o {name} -j ACCEPT"]
        for protocol in ("tcp", "udp"):
            rules["INPUT"].append(f"-A AMBI-INPUT -i {name} -p {protocol} -m {protocol} --dport 53 -j ACCEPT")
        if ipv4:
            state = "-m conntrack --ctstate RELATED,ESTABLISHED"
            rules["INPUT"].append(f"-A AMBI-INPUT -d 127.0.0.0/8 -i {name} {state} -j ACCEPT")
    return rules


def _apply_iptables(program: str, names: list[str]) -> None:
    there = _run([f"{program}-save", "-t", "filter"]).splitlines()
    lines = []
    for chain, rules in _wanted(names, ipv4=program.startswith("iptables")).items():
        ours, jump = _CHAINS[chain], f"-A {chain} -j {_CHAINS[chain]}"
        if not _filters(there, chain):
            continue
        if jump not in there or rules != [line for line in there if line.startswith(f"-A {ours} ")]:
            lines += [f":{ours} - [0:0]", *rules]
            lines += [] if jump in there else [f"-I {chain} -j {ours}"]
    if lines:
        _run([f"{program}-restore", "--noflush", "-w"], "\n".join(["*filter", *lines, "COMMIT", ""]))
        log.info("firewall: our packets pass %s now", program)


def _filters(lines: Iterable[str], chain: str) -> bool:
    """Whether a built-in chain can drop what passes: by its policy, or by any rule that is not ours."""
    return any(
        line.startswith(f":{chain} DROP") or (line.startswith(f"-A {chain} ") and not line.endswith(_CHAINS[chain]))
        for line in lines
    )


def _remove_iptables(program: str) -> None:
    there = _run([f"{program}-save", "-t", "filter"]).splitlines()
    jumps = [f"-D {line[3:]}" for line in there if line in {f"-A {chain} -j {ours}" for chain, ours in _CHAINS.items()}]
    chains = [ours for ours in _CHAINS.values() if any(line.startswith(f":{ours} ") for line in there)]
    if jumps or chains:
        lines = ["*filter", *jumps, *(f"-F {name}" for name in chains), *(f"-X {name}" for name in chains), "COMMIT", ""]
        _run([f"{program}-restore", "--noflush", "-w"], "\n".join(lines))


def _firewalld_rules(nft: Nftables) -> dict[str, list[tuple[int, str]]] | None:
    """Handles and comments of our rules in each base chain of firewalld; None when it does not run."""
    found: dict[str, list[tuple[int, str]]] = {"filter_FORWARD": [], "filter_INPUT": []}
    try:
        for chain, rows in found.items():
            for row in nft.query(f"list chain inet firewalld {chain}"):
                comment = row.get("rule", {}).get("comment", "")
                if comment.startswith(_COMMENT):
                    rows.append((row["rule"]["handle"], comment))
    except NotFound:
        return None
    return found


def _apply_firewalld(nft: Nftables, names: list[str]) -> None:
    there = _firewalld_rules(nft)
    if there is None:
        return
    wanted: dict[str, list[str]] = {"filter_FORWARD": [], "filter_INPUT": []}
    for name in (f"{names[0]}*", *names[1:]):
        wanted["filter_FORWARD"] += [f'iifname "{name}" accept', f'oifname "{name}" accept']
        wanted["filter_INPUT"].append(f'iifname "{name}" meta l4proto {{ tcp, udp }} th dport 53 accept')
    comment = f"{_COMMENT} {' '.join(names)}"
    if all([c for _, c in there[chain]] == [comment] * len(rules) for chain, rules in wanted.items()):
        return
    lines = _deletions(there)
    for chain, rules in wanted.items():
        lines += [f'insert rule inet firewalld {chain} {rule} comment "{comment}"' for rule in rules]
    try:
        nft.run("\n".join(lines))
        log.info("firewall: our packets pass firewalld now")
    except Forbidden:  # version 2 owns its table
        trust([f"{names[0]}+", *names[1:]])


def trust(links: Iterable[str]) -> None:
    """Put `links` in firewalld's zone `trusted` until it is reloaded, by its own tool."""
    for link in links:
        _run(["firewall-cmd", "--zone=trusted", f"--change-interface={link}"])


def _deletions(there: dict[str, list[tuple[int, str]]]) -> list[str]:
    return [f"delete rule inet firewalld {chain} handle {handle}" for chain, rows in there.items() for handle, _ in rows]


def _remove_firewalld(nft: Nftables) -> None:
    there = _firewalld_rules(nft)
    if there is None:
        return
    lines = _deletions(there)
    if lines:
        nft.run("\n".join(lines))
    elif shutil.which("firewall-cmd", path=_PATH) and _owned(nft):
        for link in _run(["firewall-cmd", "--zone=trusted", "--list-interfaces"]).split():
            if link.startswith(_OURS):
                _run(["firewall-cmd", "--zone=trusted", f"--remove-interface={link}"])


def _owned(nft: Nftables) -> bool:
    """Whether firewalld keeps its table for itself."""
    return any("owner" in row.get("table", {}).get("flags", ()) for row in nft.query("list table inet firewalld"))
