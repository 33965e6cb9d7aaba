"""The process: its control socket, what it is told, and its end."""

from __future__ import annotations

import fcntl
import logging
import os
import resource
import signal
import socket
import time
from pathlib import Path
from typing import Any

from ambi.core.errors import AmbiError, Conflict, InvalidRequest, from_os_error
from ambi.core.loop import POLLIN
from ambi.core.roots import Roots
from ambi.linux import unix
from ambi.network.model import Port
from ambi.network.netd.confine import confine
from ambi.network.netd.loop import EpollLoop
from ambi.network.netd.names import NameTable, NetworkNames
from ambi.network.netd.ports import Ports
from ambi.network.netd.resolvers import HostResolvers
from ambi.network.netd.responder import Responder

VERSION = 1
IDLE_S = 10.0
_LOCK_S = 3.0  # to wait for an earlier netd that is ending


class Server:
    """Serves one run root until it is told to stop, or has had nothing to do for IDLE_S."""

    def __init__(self, roots: Roots) -> None:
        """Raises Conflict when another netd serves this run root."""
        self._lock = os.open(roots.run / "netd.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        _take(self._lock, str(roots.run))
        self._loop = EpollLoop()
        self._table = NameTable()
        self._responder = Responder(self._loop, self._table, HostResolvers())
        self._ports = Ports(self._loop)
        self._engines: set[socket.socket] = set()
        self._stopped = False
        self._instances = roots.run / "instances"  # a directory in it for each that runs
        self._listener = unix.listen(roots.netd_socket)
        self._listener.setblocking(False)
        self._loop.watch(self._listener.fileno(), POLLIN, self._accept)

    def run(self) -> None:
        self._rest()
        self._loop.run(lambda: self._stopped)
        self._listener.close()  # who has connected just now is told, and starts another
        for engine in list(self._engines):
            self._leave(engine)
        os.close(self._lock)

    def _rest(self) -> None:
        """Look now and then whether there is still something to serve."""
        idle = self._idle()

        def look() -> None:
            if idle and self._idle():
                self._stopped = True
            else:
                self._rest()

        self._loop.later(IDLE_S, look)

    def _idle(self) -> bool:
        """No engine, and nothing to serve or nobody to serve: the engine of an empty run root may have been killed."""
        if self._engines:
            return False
        if not self._table.networks and not len(self._ports):
            return True
        try:
            return not os.listdir(self._instances)
        except FileNotFoundError:
            return True
        except OSError:  # it may not look: somebody may be there
            return False

    def _accept(self, _: int) -> None:
        try:
            engine, _address = self._listener.accept()
        except OSError:
            return
        engine.setblocking(False)
        self._engines.add(engine)
        self._loop.watch(engine.fileno(), POLLIN, lambda _: self._request(engine))

    def _request(self, engine: socket.socket) -> None:
        try:
            message = unix.receive(engine)
        except BlockingIOError:
            return
        except (AmbiError, OSError):
            message = None
        if message is None:
            self._leave(engine)
            return
        message.close()
        body = message.body
        try:
            answer: dict[str, Any] = {"ok": self._do(body)}
        except AmbiError as error:
            answer = {"error": error.to_wire()}
        except OSError as error:
            answer = {"error": from_os_error("netd", error).to_wire()}
        except (TypeError, ValueError, KeyError) as error:
            answer = {"error": InvalidRequest(f"netd: bad request: {error}").to_wire()}
        try:
            unix.send(engine, {**answer, "seq": body.get("seq")})
        except (OSError, AmbiError):
            self._leave(engine)

    def _leave(self, engine: socket.socket) -> None:
        self._loop.unwatch(engine.fileno())
        engine.close()
        self._engines.discard(engine)

    def _do(self, body: dict[str, Any]) -> dict[str, Any]:
        op = body.get("op")
        if op == "ping":
            return {"pid": os.getpid(), "version": VERSION}
        if op == "network":
            self._network(str(body["id"]), body["names"])
        elif op == "publish":
            wanted = [Port(p, ip, int(host), int(port), tuple(targets)) for p, ip, host, port, targets in body["ports"]]
            return {"ports": self._ports.publish(str(body["key"]), wanted)}
        elif op == "unpublish":
            self._ports.unpublish(str(body["key"]))
        elif op == "keep":
            for id in set(self._table.networks) - set(body["networks"]):
                self._responder.drop(id)
            for key in set(self._ports.keys) - set(body["keys"]):
                self._ports.unpublish(key)
        elif op == "stop":
            self._stopped = True
        else:
            raise InvalidRequest(f"netd: unknown request {op}")
        return {}

    def _network(self, id: str, names: list[object] | None) -> None:
        if names is None:
            self._responder.drop(id)
            return
        try:
            self._responder.serve(id, NetworkNames.from_wire(names))
        except BaseException:
            self._responder.drop(id)
            raise


def main(argv: list[str]) -> int:
    """`python -I -m ambi.network.netd RUN_ROOT READY_FD`: a byte on READY_FD says that it listens."""
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard != resource.RLIM_INFINITY else max(soft, 1 << 16), hard))
    ready = int(argv[1])
    logging.basicConfig(format="%(message)s")
    try:
        server = Server(Roots(run=Path(argv[0])))
        confine()
    except AmbiError as error:
        os.write(ready, error.message.encode()[:4000])
        return 1
    except OSError as error:
        os.write(ready, f"netd cannot serve {argv[0]}: {error.strerror}".encode())
        return 1
    os.write(ready, b"\0")
    os.close(ready)
    server.run()
    return 0


def _take(lock: int, run_root: str) -> None:
    """Raises Conflict when another netd serves this run root, and is not about to end."""
    end = time.monotonic() + _LOCK_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > end:
                raise Conflict(f"another netd serves {run_root}", hint=f"fuser {run_root}/netd.lock") from None
        time.sleep(0.02)
