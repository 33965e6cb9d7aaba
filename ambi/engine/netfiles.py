"""The small files of ours in an instance: /etc/hosts, /etc/hostname, /etc/resolv.conf."""

from __future__ import annotations

from ambi.core.errors import InvalidRequest
from ambi.core.words import is_address
from ambi.engine.body import Body

_LOCALHOST = """\
127.0.0.1\tlocalhost
::1\tlocalhost ip6-localhost ip6-loopback
fe00::0\tip6-localnet
ff00::0\tip6-mcastprefix
ff02::1\tip6-allnodes
ff02::2\tip6-allrouters
"""
_LIMIT = 1 << 20


def build(config: Body, host: Body) -> dict[str, str]:
    """Path inside to content."""
    shared = host.text("NetworkMode") == "host"
    hosts = (_read("/etc/hosts") if shared else None) or _LOCALHOST
    return {
        "/etc/hostname": config.text("Hostname") + "\n",  # without the domain, as Docker has it
        "/etc/hosts": hosts + "".join(_extra_host(item) for item in host.strings("ExtraHosts")),
        "/etc/resolv.conf": _resolv(host),
    }


def _extra_host(item: str) -> str:
    """A line of /etc/hosts of Docker's `NAME:ADDRESS` (or `NAME=ADDRESS`)."""
    separator = "=" if "=" in item else ":"
    name, _, address = item.partition(separator)
    address = address.strip("[]")
    if address == "host-gateway":
        raise InvalidRequest(
            "--add-host with host-gateway is not supported yet", hint="give the address: --add-host NAME:IP"
        )
    if not name or not is_address(address) or any(c.isspace() for c in name):
        raise InvalidRequest(f'bad format for add-host: "{item}"', hint="--add-host NAME:IP")
    return f"{address}\t{name}\n"


def _resolv(host: Body) -> str:
    servers, search, options = host.strings("Dns"), host.strings("DnsSearch"), host.strings("DnsOptions")
    for server in servers:
        if not is_address(server):
            raise InvalidRequest(f"--dns: {server} is not an IP address", hint="for example --dns 192.0.2.53")
    for word in search + options:
        if not word or any(c.isspace() for c in word):
            raise InvalidRequest(f"--dns-search or --dns-option: '{word}' is not one word")
    text = _read("/etc/resolv.conf") or ""
    if not (servers or search or options):
        return text
    lines = [line for line in text.splitlines() if line.partition(" ")[0] in ("nameserver", "search", "options")]
    own = {"nameserver": servers, "search": search, "options": options}
    kept = [line for line in lines if not own[line.partition(" ")[0]]]
    made = [f"nameserver {x}" for x in servers]
    if search and search != ["."]:
        made.append("search " + " ".join(search))
    if options:
        made.append("options " + " ".join(options))
    return "\n".join(made + kept) + "\n"


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(_LIMIT)
    except OSError:
        return None
