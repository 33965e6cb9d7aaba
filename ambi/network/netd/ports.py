"""The listening side of published ports: each is bound here, so that nobody else takes it, and served for whom nft does not
divert: ::1 above all, and 127.0.0.1 where the kernel cannot do it.
"""

from __future__ import annotations

import errno
import os
import random
import socket
from typing import NamedTuple

from ambi.core.errors import AmbiError, Conflict, Forbidden, InvalidRequest, from_os_error
from ambi.core.loop import Loop
from ambi.network.model import Port
from ambi.network.netd import holder
from ambi.network.netd.tcp import TcpProxy
from ambi.network.netd.udp import UdpProxy

_KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
_TRIES = 20  # to find a port that is free for both families
_BACKLOG = 512


class _Bound(NamedTuple):
    port: Port
    served: list[TcpProxy | UdpProxy]


class Ports:
    """Published ports by the key of who publishes them."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._bound: dict[str, list[_Bound]] = {}

    def __len__(self) -> int:
        return len(self._bound)

    @property
    def keys(self) -> list[str]:
        return list(self._bound)

    def publish(self, key: str, wanted: list[Port]) -> list[Port]:
        """Bind `wanted` beside what `key` has; all of it or nothing. A host_port of 0 is chosen.

        What is bound already is only led to its new targets. Raises Conflict naming the process that has a port.
        """
        own = self._bound.setdefault(key, [])
        fresh: list[_Bound] = []
        try:
            found = [self._one(own, port, fresh) for port in wanted]
        except BaseException:
            for bound in fresh:
                _close(bound)
            if not own:
                del self._bound[key]
            raise
        own += fresh
        return found

    def _one(self, own: list[_Bound], port: Port, fresh: list[_Bound]) -> Port:
        if port.protocol not in (*_KINDS, "sctp"):
            raise InvalidRequest(f"protocol {port.protocol} cannot be published", hint="tcp, udp or sctp")
        for bound in own:
            if port.host_port and bound.port._replace(targets=()) == port._replace(targets=()):
                own[own.index(bound)] = _Bound(port, bound.served)
                for proxy in bound.served:
                    proxy.targets = port.targets
                return port
        made = self._bind(port)
        fresh.append(made)
        return made.port

    def _bind(self, port: Port) -> _Bound:
        if port.protocol == "sctp":
            return self._sctp(port)
        for attempt in range(_TRIES):
            sockets: list[socket.socket] = []
            try:
                number = port.host_port
                for address in _addresses(port.host_ip):
                    sockets.append(_open(port.protocol, address, number))
                    number = number or sockets[0].getsockname()[1]
                return _Bound(port._replace(host_port=number), [self._serve(sock, port) for sock in sockets])
            except OSError as error:
                for sock in sockets:
                    sock.close()
                if port.host_port or attempt + 1 == _TRIES or error.errno != errno.EADDRINUSE:
                    raise _refused(port, error, self._owner(port)) from error
        raise AssertionError("the last attempt returns or raises")

    def _serve(self, sock: socket.socket, port: Port) -> TcpProxy | UdpProxy:
        proxy = TcpProxy if port.protocol == "tcp" else UdpProxy
        return proxy(self._loop, sock, port.port, port.targets)

    def _sctp(self, port: Port) -> _Bound:
        """nft alone serves it, and the kernel need not have sockets of it: the number is held among ours."""
        if port.host_port:
            if owner := self._owner(port):
                raise _refused(port, OSError(errno.EADDRINUSE, ""), owner)
            return _Bound(port, [])
        with open("/proc/sys/net/ipv4/ip_local_port_range", encoding="ascii") as file:
            first, last = map(int, file.read().split())
        for number in random.sample(range(first, last + 1), min(_TRIES, last + 1 - first)):
            if not self._owner(chosen := port._replace(host_port=number)):
                return _Bound(chosen, [])
        raise Conflict("no SCTP port is free", hint="publish a port by its number")

    def _owner(self, port: Port) -> str:
        """The key that has published `port`, "" for none."""
        for key, bounds in self._bound.items():
            for other in (bound.port for bound in bounds):
                same_address = not other.host_ip or not port.host_ip or other.host_ip == port.host_ip
                if (other.protocol, other.host_port) == (port.protocol, port.host_port) and same_address:
                    return key
        return ""

    def unpublish(self, key: str) -> None:
        for bound in self._bound.pop(key, ()):
            _close(bound)


def _close(bound: _Bound) -> None:
    for proxy in bound.served:
        proxy.close()


def _addresses(host_ip: str) -> list[str]:
    """What is bound: both families when no address is named, as far as this host has them."""
    if host_ip:
        return [host_ip]
    return ["0.0.0.0", "::"] if os.path.exists("/proc/net/if_inet6") else ["0.0.0.0"]


def _open(protocol: str, address: str, number: int) -> socket.socket:
    six = ":" in address
    sock = socket.socket(socket.AF_INET6 if six else socket.AF_INET, _KINDS[protocol])
    try:
        sock.setblocking(False)
        if six:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if protocol == "tcp":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, number))
        if protocol == "tcp":
            sock.listen(_BACKLOG)
        return sock
    except BaseException:
        sock.close()
        raise


def _refused(port: Port, error: OSError, owner: str) -> AmbiError:
    where = f"{port.host_ip or '0.0.0.0'}:{port.host_port}/{port.protocol}"
    if error.errno == errno.EADDRINUSE:
        who = f"instance {owner[:12]}" if owner else holder.of(port.protocol, port.host_port)
        return Conflict(
            f"{where} is in use" + (f" by {who}" if who else ""), hint="publish another port, or end that process"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return InvalidRequest(f"{where}: {port.host_ip} is no address of this host", hint="`ip address` shows them")
    if error.errno in (errno.EACCES, errno.EPERM):
        return Forbidden(f"{where} may not be bound: it needs CAP_NET_BIND_SERVICE", hint="publish a port above 1023")
    return from_os_error(f"cannot publish {where}", error)
