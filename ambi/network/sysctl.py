"""What networks need of /proc/sys/net, in the network namespace of the calling thread."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from ambi.core.errors import Forbidden, Unsupported

log = logging.getLogger(__name__)
_NET = Path("/proc/sys/net")


def read(name: str) -> str:
    """The value of `ipv4/ip_forward`, "" when this kernel has no such thing."""
    try:
        return (_NET / name).read_text().strip()
    except OSError:
        return ""


def write(name: str, value: str) -> None:
    """Raises Unsupported (the kernel lacks it), Forbidden (/proc/sys is read-only, or we are not root)."""
    try:
        fd = os.open(_NET / name, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, value.encode())
        finally:
            os.close(fd)
    except FileNotFoundError as error:
        raise Unsupported(f"this kernel has no {_NET / name}") from error
    except OSError as error:
        raise Forbidden(
            f"cannot set {_NET / name} to {value}: {error.strerror}",
            hint=f"run the engine as root, with CAP_NET_ADMIN, or: sysctl -w net.{name.replace('/', '.')}={value}",
        ) from error


def forward_ipv4() -> None:
    """Packets are forwarded between links."""
    if read("ipv4/ip_forward") != "1":
        write("ipv4/ip_forward", "1")
        log.info("net.ipv4.ip_forward was 0 and is 1 now: networks need it")


def forward_ipv6() -> None:
    """The same for IPv6. A host that forwards ignores router advertisements with accept_ra=1, so its uplinks get 2, and go
    on to have the addresses and routes that they have."""
    if read("ipv6/conf/all/forwarding") == "1":
        return
    for name in sorted(os.listdir(_NET / "ipv6/conf")) if (_NET / "ipv6/conf").is_dir() else ():
        if name not in ("all", "lo") and read(f"ipv6/conf/{name}/accept_ra") == "1":
            write(f"ipv6/conf/{name}/accept_ra", "2")
    write("ipv6/conf/all/forwarding", "1")
    log.info("net.ipv6.conf.all.forwarding was 0 and is 1 now: networks need it")


def prepare_link(name: str, *, ipv6: bool) -> None:
    """A fresh link of ours: its IPv6 addresses work at once and come from nobody else, or there are none at all."""
    if not (_NET / "ipv6").is_dir():
        if ipv6:
            raise Unsupported("this kernel has no IPv6", hint="make the network without --ipv6")
        return
    if not ipv6:
        write(f"ipv6/conf/{name}/disable_ipv6", "1")
        return
    write(f"ipv6/conf/{name}/disable_ipv6", "0")
    write(f"ipv6/conf/{name}/accept_dad", "0")
    write(f"ipv6/conf/{name}/accept_ra", "0")


def bridge_filter() -> bool:
    """Whether packets between two ports of a bridge pass the host's IP rules."""
    return "1" in (read("bridge/bridge-nf-call-iptables"), read("bridge/bridge-nf-call-ip6tables"))
