"""What `doctor` says about networks: looks, and changes nothing."""

from __future__ import annotations

from typing import Literal, NamedTuple

from ambi.core.errors import AmbiError
from ambi.linux.nftables import Nftables
from ambi.network import sysctl

_HANDLED = {("ip", "filter"), ("ip6", "filter"), ("inet", "firewalld")}  # by ambi.network.firewall


class Finding(NamedTuple):
    """state: `ok`, `warning` or `problem`; hint: what to do, "" for nothing."""

    name: str
    state: Literal["ok", "warning", "problem"]
    detail: str
    hint: str = ""


def checks() -> list[Finding]:
    """Rules, forwarding and foreign firewalls, in the namespace of the calling thread."""
    try:
        nft = Nftables()
        try:
            chains = [row["chain"] for row in nft.query("list chains") if "chain" in row]
        finally:
            nft.close()
    except AmbiError as error:
        return [Finding("nftables", "problem", error.message, error.hint or "")]
    return [Finding("nftables", "ok", "usable"), _forwarding(), *_closed(chains)]


def _forwarding() -> Finding:
    words = []
    for family, name in (("IPv4", "ipv4/ip_forward"), ("IPv6", "ipv6/conf/all/forwarding")):
        state = {"1": "on", "0": "off until a network needs it"}.get(sysctl.read(name), "not in this kernel")
        words.append(f"{family} {state}")
    if sysctl.bridge_filter():
        words.append("bridged packets pass the host's IP rules")
    return Finding("forwarding", "ok", "; ".join(words))


def _closed(chains: list[dict[str, str]]) -> list[Finding]:
    """Base chains that drop what is forwarded, in tables that we have no way of being let through by ourselves."""
    found = []
    for chain in chains:
        table = (chain["family"], chain["table"])
        if chain.get("hook") == "forward" and chain.get("policy") == "drop" and table not in _HANDLED:
            where = f"{chain['family']} {chain['table']} {chain['name']}"
            hint = f"nft insert rule {where} iifname 'ambi*' accept; nft insert rule {where} oifname 'ambi*' accept"
            found.append(Finding("firewall", "warning", f"the chain {where} drops what is forwarded", hint))
    return found
