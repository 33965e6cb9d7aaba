"""The small files of ours in an instance: /etc/hosts, /etc/hostname, /etc/resolv.conf."""

from __future__ import annotations

import os
from pathlib import Path

from ambi.core.errors import InvalidRequest
from ambi.core.plan import LaunchPlan
from ambi.core.words import is_address
from ambi.engine.body import Body
from ambi.engine.netnames import Names
from ambi.engine.types import CreateSpec

_LOCALHOST = """\
127.0.0.1\tlocalhost
::1\tlocalhost ip6-localhost ip6-loopback
fe00::0\tip6-localnet
ff00::0\tip6-mcastprefix
ff02::1\tip6-allnodes
ff02::2\tip6-allrouters
"""
_LIMIT = 1 << 20


def build(config: Body, host: Body, net: Names | None = None) -> dict[str, str]:
    """Path inside to content. net: None while nothing is known of the networks, to check the rest."""
    if net is not None and net.whole:
        return net.whole
    net = net or Names(gateway="0.0.0.0")
    shared = host.text("NetworkMode") == "host"
    hosts = (_read("/etc/hosts") if shared else None) or _LOCALHOST
    return {
        "/etc/hostname": config.text("Hostname") + "\n",  # without the domain, as Docker has it
        "/etc/hosts": hosts + _own_hosts(config, net) + "".join(_extra_host(x, net) for x in host.strings("ExtraHosts")),
        "/etc/resolv.conf": _own_resolv(host, net) if net.servers else _resolv(host),
    }


def changed(data_dir: Path, spec: CreateSpec, net: Names, known: dict[str, str] | None) -> dict[str, str]:
    """Those of our files of a running instance that say something else now, path to content; none that it brought itself.

    known: what has been written since its start. None: nobody knows; then all of them are returned.
    """
    made = build(Body("Config", spec.config), Body("HostConfig", spec.host), net)
    there = {str(file.path): file.content for file in LaunchPlan.load(data_dir).files}
    was = {} if known is None else {**there, **known}
    return {path: made[path] for path in there if path in made and made[path] != was.get(path)}


def write(data_dir: Path, files: dict[str, str]) -> None:
    """Write `files` of a running container anew, in place: they are mounted in it. Raises OSError. What the instance itself
    has written into them is lost, as with Docker."""
    for number, file in enumerate(LaunchPlan.load(data_dir).files):
        if (text := files.get(str(file.path))) is not None:
            flags = os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(f"{data_dir}/files/{number}", flags), "w", encoding="utf-8") as output:
                output.write(text)


def _own_hosts(config: Body, net: Names) -> str:
    """The lines of its own addresses and of what it is linked to."""
    host, domain = config.text("Hostname"), config.text("Domainname")
    names = f"{host}.{domain} {host}" if domain else host
    return "".join(f"{address}\t{words}\n" for address, words in [*((a, names) for a in net.own), *net.links])


def _own_resolv(host: Body, net: Names) -> str:
    """For a network whose gateway answers: it knows the servers, the search domains and options are the host's."""
    _resolv(host)  # the same checks
    search, options = host.strings("DnsSearch"), host.strings("DnsOptions")
    lines = (_read("/etc/resolv.conf") or "").splitlines()
    kept = [line for line in lines if line.startswith("search ") and not search]
    kept += [line for line in lines if line.startswith("options ") and not options]
    made = [f"nameserver {server}" for server in net.servers]
    if search and search != ["."]:
        made.append("search " + " ".join(search))
    if not any("ndots:" in word for word in [*options, *kept]):
        options = [*options, "ndots:0"]
    if options:
        made.append("options " + " ".join(options))
    return "\n".join(made + kept) + "\n"


def _extra_host(item: str, net: Names) -> str:
    """A line of /etc/hosts of Docker's `NAME:ADDRESS` (or `NAME=ADDRESS`)."""
    separator = "=" if "=" in item else ":"
    name, _, address = item.partition(separator)
    address = address.strip("[]")
    if address == "host-gateway":
        address = net.gateway
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
