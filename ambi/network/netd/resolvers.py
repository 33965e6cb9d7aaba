"""The host's resolvers, as /etc/resolv.conf names them (resolv.conf(5)); read again when it changes."""

from __future__ import annotations

import ipaddress
import os
from typing import NamedTuple

PATH = "/etc/resolv.conf"
_MOST = 8


class Resolvers(NamedTuple):
    """servers: addresses, in their order. timeout_s: of one attempt. attempts: rounds over all of them."""

    servers: tuple[str, ...]
    timeout_s: float = 5.0
    attempts: int = 2


class HostResolvers:
    def __init__(self, path: str = PATH) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._known = Resolvers(())

    def now(self) -> Resolvers:
        try:
            status = os.stat(self._path)
            seen = (status.st_mtime_ns, status.st_ino, status.st_size)
            if seen != self._seen:
                with open(self._path, encoding="utf-8", errors="replace") as file:
                    self._known = parse(file.read(1 << 16))
                self._seen = seen
        except OSError:
            self._known, self._seen = Resolvers(()), None
        return self._known


def parse(text: str) -> Resolvers:
    servers: list[str] = []
    timeout, attempts = 5.0, 2
    for words in (line.split() for line in text.splitlines()):
        if len(words) > 1 and words[0] == "nameserver" and len(servers) < _MOST:
            try:
                ipaddress.ip_address(words[1].partition("%")[0])
            except ValueError:
                continue
            servers.append(words[1])
        elif words and words[0] == "options":
            for name, _, value in (word.partition(":") for word in words[1:]):
                if value.isdecimal():
                    timeout = float(min(max(int(value), 1), 30)) if name == "timeout" else timeout
                    attempts = min(max(int(value), 1), 5) if name == "attempts" else attempts
    return Resolvers(tuple(servers), timeout, attempts)
