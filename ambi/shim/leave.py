"""What a shim does at its end: leave the exit status, tell an engine, and have slow clients served on."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from ambi.core.deadline import Deadline
from ambi.core.errors import AmbiError
from ambi.core.loop import POLLIN, Loop
from ambi.core.model import ExitStatus
from ambi.linux import process, unix
from ambi.shim.attach import Client, Hub
from ambi.shim.record import write_whole

EXIT_FILE = "exit.json"
CONNECT_SECONDS = 5.0
NOTICE_SECONDS = 10.0  # an engine that was started needs less than one
RETRY_SECONDS = 0.25
STALL_SECONDS = 600.0  # a client that takes nothing for so long after the end is cut off


class Parting(NamedTuple):
    """What a notice needs to know of the shim."""

    id: str
    run_root: str
    home: int


def write_exit(data_dir: str, status: ExitStatus) -> ExitStatus:
    """Have `exit.json` appear whole; returns what it says, with the time filled in.

    On a full disk there is none; who listens is told all the same.
    """
    if not status.finished_ns:
        status = status._replace(finished_ns=time.time_ns())
    try:
        write_whole(os.path.join(data_dir, EXIT_FILE), json.dumps(status._asdict()).encode())
    except OSError as error:
        os.write(2, f"shim[{os.getpid()}]: cannot write {data_dir}/{EXIT_FILE}: {error.strerror}\n".encode())
    return status


def read_exit(data_dir: str | os.PathLike[str]) -> ExitStatus | None:
    """What `exit.json` says, None when there is none that can be read."""
    try:
        with open(os.path.join(data_dir, EXIT_FILE), "rb", buffering=0) as file:
            return ExitStatus(**json.loads(file.read(65536)))
    except (OSError, ValueError, TypeError):
        return None


class Notice:
    """Tells an engine about an exit: the one that listens on `notify.sock`, else one that is started for it."""

    def __init__(self, parting: Parting, status: ExitStatus) -> None:
        self._parting = parting
        self._body = {"event": "exit", "id": parting.id, "exit": status._asdict()}
        self._sock: socket.socket | None = None
        self._acknowledged = False

    def send(self) -> bool:
        """Tell now, or start an engine and leave the telling to `wait`; whether there is something to wait for."""
        return self._try() or start_engine(self._parting)

    def wait(self, loop: Loop, enough: Callable[[], bool]) -> None:
        """Turn `loop` until an engine has acknowledged, `enough` says so, or NOTICE_SECONDS have passed."""
        if self._sock is None:
            loop.later(RETRY_SECONDS, lambda: self._retry(loop))
        else:
            loop.watch(self._sock.fileno(), POLLIN, lambda _: self._answered(loop))
        loop.run(lambda: self._acknowledged or enough(), Deadline.after(NOTICE_SECONDS))
        if self._sock is not None:
            loop.unwatch(self._sock.fileno())
            self._sock.close()

    def _try(self) -> bool:
        try:
            sock = unix.connect(os.path.join(self._parting.run_root, "notify.sock"), CONNECT_SECONDS)
        except OSError:
            return False
        try:
            unix.send(sock, self._body)
        except (AmbiError, OSError):
            sock.close()
            return False
        self._sock = sock
        return True

    def _retry(self, loop: Loop) -> None:
        if self._try():
            assert self._sock is not None
            loop.watch(self._sock.fileno(), POLLIN, lambda _: self._answered(loop))
        else:
            loop.later(RETRY_SECONDS, lambda: self._retry(loop))

    def _answered(self, loop: Loop) -> None:
        """Any message or the end of the connection: the engine has read it."""
        assert self._sock is not None
        loop.unwatch(self._sock.fileno())
        self._acknowledged = True


def start_engine(parting: Parting) -> bool:
    """Run the argv of `engine.json` in a session of its own and in the engines' mount namespace; whether there is one."""
    try:
        with open(os.path.join(parting.run_root, "engine.json"), "rb", buffering=0) as file:
            argv = json.loads(file.read(65536))["argv"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if not isinstance(argv, list) or not argv or not all(isinstance(word, str) for word in argv):
        return False
    pid = os.fork()
    if pid == 0:
        _exec_detached(argv, parting.home)
    os.waitpid(pid, 0)
    return True


def _exec_detached(argv: list[str], home: int) -> None:
    """In a child: become a grandchild that has nothing of ours, and execute. Never returns."""
    try:
        process.setns(home, process.CLONE_NEWNS)
        os.chdir("/")
        os.setsid()
        if os.fork():
            os._exit(0)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        process.close_range(3)
        process.reset_signals()
        os.execv(argv[0], argv)
    finally:
        os._exit(127)


def serve_on(hubs: Iterable[Hub]) -> None:
    """Send clients what they still have to get: now what they take now, the rest from a process of its own."""
    clients = [client for hub in hubs for client in list(hub.clients)]
    for client in clients:
        client.flush()
        if not client.closed:
            client.end()
    clients = [client for client in clients if not client.closed]
    if not clients:
        return
    try:
        if os.fork():
            return
    except OSError:  # no process to spare: then this one stays
        _serve(clients)
        return
    try:
        _keep_only({fd for client in clients for fd in client.descriptors()} | {0, 1, 2})
        _serve(clients)
    finally:
        os._exit(0)


def _serve(clients: list[Client]) -> None:
    loop = Loop()
    for client in clients:
        client.move(loop)

    def cut_stalled(before: list[int]) -> None:
        for client, left in zip(clients, before, strict=True):
            if client.left == left:
                client.close()
        now = [client.left for client in clients]
        loop.later(STALL_SECONDS, lambda: cut_stalled(now))

    start = [client.left for client in clients]
    loop.later(STALL_SECONDS, lambda: cut_stalled(start))
    loop.run(lambda: all(client.closed for client in clients))


def _keep_only(wanted: set[int]) -> None:
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in wanted:
            try:
                os.close(int(name))
            except OSError:  # the descriptor of the listing itself
                pass
