"""The engine's side of netd: it is started when it is first needed, watched, started again, and told everything again.

Importing this loads neither dnslib nor anything else of the process.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from ambi.core.errors import AmbiError, Unavailable, from_os_error, from_wire
from ambi.core.roots import Roots
from ambi.linux import unix
from ambi.network.model import Port
from ambi.network.netd.names import NamedEndpoint, NetworkNames

if TYPE_CHECKING:
    import subprocess

__all__ = ["NamedEndpoint", "Netd", "NetworkNames"]

log = logging.getLogger(__name__)

_CALL_S = 10.0
_START_S = 20.0
_AGAIN_S = 0.25  # between a death and the next start
_LOG_BYTES = 1 << 20  # past which the log is started anew with the next netd


class Netd:
    """netd of one run root. Safe to use from any thread."""

    def __init__(self, roots: Roots) -> None:
        self._roots = roots
        self._lock = threading.RLock()
        self._sock: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._seq = 0
        self._closed = False
        self._networks: dict[str, NetworkNames] = {}
        self._ports: dict[str, list[Port]] = {}

    def warm_up(self) -> None:
        """Have it run. Raises Unavailable."""
        self._call("ping")

    @property
    def pid(self) -> int:
        return int(self._call("ping")["pid"])

    def publish(self, key: str, ports: list[Port]) -> list[Port]:
        """Hold and serve `ports` for `key`, beside what it has; all or nothing. A host_port of 0 is chosen.

        Raises Conflict naming the process that has a port, InvalidRequest, Forbidden, Unavailable.
        """
        with self._lock:
            rows = self._call("publish", key=key, ports=ports)["ports"]
            found = [Port(protocol, ip, host, port, tuple(to)) for protocol, ip, host, port, to in rows]
            kept = [x for x in self._ports.get(key, []) if not any(_same(x, y) for y in found)]
            self._ports[key] = kept + found
            return found

    def unpublish(self, key: str) -> None:
        with self._lock:
            known = self._ports.pop(key, None)
            if known is not None or self._sock is not None:
                self._call("unpublish", key=key)

    def network(self, id: str, names: NetworkNames | None) -> None:
        """Answer for a network as `names` says, or no longer. Raises Unavailable, Conflict (its port 53 is taken), ..."""
        with self._lock:
            if names is None:
                if self._networks.pop(id, None) is not None or self._sock is not None:
                    self._call("network", id=id, names=None)
                return
            self._networks[id] = names
            self._call("network", id=id, names=names)

    def keep(self, networks: list[str], keys: list[str]) -> None:
        """Drop everything else: what a netd that has outlived an engine still serves for nobody."""
        with self._lock:
            self._networks = {id: names for id, names in self._networks.items() if id in networks}
            self._ports = {key: ports for key, ports in self._ports.items() if key in keys}
            if not self._networks and not self._ports and not self._reach():
                return
            self._call("keep", networks=networks, keys=keys)

    def close(self, *, stop: bool = False) -> None:
        """Let go of it; it serves on, unless `stop`."""
        with self._lock:
            self._closed = True
            if stop:
                try:
                    if self._reach() and self._sock is not None:
                        self._exchange({"op": "stop"})
                        unix.receive(self._sock)  # the end of the connection: the process ends
                except (AmbiError, OSError):  # there is none
                    pass
                self._roots.netd_socket.unlink(missing_ok=True)  # which it may not remove itself
            self._disconnect()
            if stop and self._process is not None:
                self._process.wait(_CALL_S)

    def _call(self, op: str, **fields: Any) -> dict[str, Any]:
        request = {"op": op, **fields}
        with self._lock:
            try:
                answer = self._exchange(request)
            except OSError:  # it was killed, or has never been there
                try:
                    self._connect_anew()
                    answer = self._exchange(request)
                except OSError as error:
                    self._disconnect()
                    raise from_os_error("netd does not answer", error) from error
        if "error" in answer:
            raise from_wire(answer["error"])
        result: dict[str, Any] = answer["ok"]
        return result

    def _exchange(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request and its answer; OSError when there is no netd or it ends meanwhile."""
        if self._sock is None:
            raise ConnectionResetError("not connected")
        self._seq += 1
        unix.send(self._sock, {**request, "seq": self._seq})
        while True:
            message = unix.receive(self._sock)
            if message is None:
                raise ConnectionResetError("netd has closed the connection")
            message.close()
            if message.body.get("seq") == self._seq:
                return message.body

    def _reach(self) -> bool:
        """Connect to the netd that is there."""
        if self._sock is None:
            try:
                self._sock = unix.connect(self._roots.netd_socket, _CALL_S)
            except OSError:
                return False
            threading.Thread(target=self._watch, args=(self._sock,), name="netd", daemon=True).start()
        return True

    def _connect_anew(self) -> None:
        """Connect to the netd that is there, or start one; and tell it what it is to serve."""
        self._disconnect()
        if not self._reach():
            self._start()
            if not self._reach():
                raise ConnectionRefusedError(f"netd does not listen at {self._roots.netd_socket}")
        for id, names in self._networks.items():
            self._again({"op": "network", "id": id, "names": names})
        for key, ports in self._ports.items():
            self._again({"op": "publish", "key": key, "ports": ports})

    def _again(self, request: dict[str, Any]) -> None:
        answer = self._exchange(request)
        if "error" in answer:
            log.error("netd: %s", answer["error"].get("message"))

    def _start(self) -> None:
        """Raises Unavailable with what it says."""
        import subprocess

        if self._process is not None:
            self._process.poll()
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        log_file = os.open(self._roots.run / "netd.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(log_file).st_size > _LOG_BYTES:
                os.ftruncate(log_file, 0)
            argv = [sys.executable, "-I", "-m", "ambi.network.netd", str(self._roots.run), str(write_end)]
            self._process = subprocess.Popen(
                argv, pass_fds=[write_end], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=log_file, start_new_session=True, cwd="/",
            )  # fmt: skip
            os.close(write_end)
            write_end = -1
            if not select.select([read_end], [], [], _START_S)[0]:
                raise Unavailable(f"netd has not started within {_START_S:.0f} s")
            said = os.read(read_end, 4096)
        except OSError as error:
            raise from_os_error("cannot start netd", error) from error
        finally:
            os.close(read_end)
            os.close(log_file)
            if write_end >= 0:
                os.close(write_end)
        if said != b"\0":
            raise Unavailable(f"netd has not started: {said.decode(errors='replace') or 'it died'}")

    def _watch(self, sock: socket.socket) -> None:
        """Until this connection ends: then start netd again, if it has something to serve."""
        poll = select.poll()
        try:
            poll.register(sock, select.POLLRDHUP)
            poll.poll()
        except (OSError, ValueError):
            return
        time.sleep(_AGAIN_S)
        with self._lock:
            if self._process is not None:
                self._process.poll()  # reaped
            if self._closed or self._sock is not sock:
                return
            if not self._networks and not self._ports:
                self._disconnect()
                return
            log.warning("netd has ended and is started again")
            try:
                self._connect_anew()
            except (AmbiError, OSError) as error:
                log.error("netd: %s", error)

    def _disconnect(self) -> None:
        if self._sock is not None:
            try:
                self._sock.shutdown(socket.SHUT_RDWR)  # for the thread that watches: a poll keeps a closed socket open
            except OSError:  # netd has ended, so the thread knows
                pass
            self._sock.close()
            self._sock = None


def _same(one: Port, other: Port) -> bool:
    return one._replace(targets=()) == other._replace(targets=())
