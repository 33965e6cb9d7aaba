"""The API's socket: who may connect, one thread a client, and what happens to each request.

Membership in the group `ambi` is the same as being root, since whoever may create instances may do everything.
"""

from __future__ import annotations

import errno
import grp
import logging
import os
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from ambi.api.exchange import Call, Reply, error_reply
from ambi.api.http import ClientGone, Connection, Malformed, Request
from ambi.api.query import Query
from ambi.api.router import Router
from ambi.api.routes import ROUTER
from ambi.core.errors import AmbiError, Conflict, Internal, InvalidRequest, Unavailable, from_os_error
from ambi.core.roots import SOCKET_GROUP

if TYPE_CHECKING:
    from ambi.engine.engine import Engine

MAX_CLIENTS = 1024
_BACKLOG = 512

_log = logging.getLogger(__name__)


def serve(engine: Engine, path: Path) -> Server:
    """Listen at `path` and answer in threads of their own; returns at once. Raises Conflict when it is in use."""
    server = Server(engine, listen(path))
    server.start()
    return server


def listen(path: Path) -> socket.socket:
    """A listening socket at `path`, root:ambi 0660, or root alone when there is no such group.

    A socket that nobody answers at is replaced. Raises Conflict when somebody does, or when it is another kind of file.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _bind(listener, path)
        listener.listen(_BACKLOG)
    except BaseException as error:
        listener.close()
        if isinstance(error, OSError):
            raise from_os_error(f"cannot listen at {path}", error) from error
        raise
    return listener


def _bind(listener: socket.socket, path: Path) -> None:
    """Bind at `path`, never reachable by others in between: it gets its owner and mode before it has a backlog."""
    _remove_stale(path)
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    old_mask = os.umask(0o177)
    try:
        listener.bind(f"/proc/self/fd/{folder}/{path.name}")  # sun_path takes 107 bytes, folders are longer
        try:
            os.chown(path.name, 0, grp.getgrnam(SOCKET_GROUP).gr_gid, dir_fd=folder)
        except KeyError:
            _log.info("no group %s: only root may use %s", SOCKET_GROUP, path)
        os.chmod(f"/proc/self/fd/{folder}/{path.name}", 0o660)
    finally:
        os.umask(old_mask)
        os.close(folder)


def _remove_stale(path: Path) -> None:
    if not os.path.lexists(path):
        return
    if not path.is_socket():
        raise Conflict(f"cannot listen at {path}: it exists and is no socket", hint=f"remove {path} or use --socket")
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.connect(f"/proc/self/fd/{folder}/{path.name}")
    except ConnectionRefusedError:
        path.unlink()
        return
    finally:
        os.close(folder)
    raise Conflict(f"cannot listen at {path}: another process answers there", hint="use another --socket")


class Server:
    """Accepts clients and answers them."""

    def __init__(self, engine: Engine, listener: socket.socket, router: Router = ROUTER) -> None:
        self._engine = engine
        self._listener = listener
        self._router = router
        self._clients: set[Connection] = set()
        self._lock = threading.Lock()
        self._closing = False
        self._thread = threading.Thread(target=self._accept, name="api", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Accept nobody any more and end idle connections; requests under way are not waited for."""
        self._closing = True
        try:
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError:  # closed already: what was wanted
            pass
        if self._thread.is_alive():
            self._thread.join()
        self._listener.close()
        with self._lock:
            for connection in self._clients:
                _end_input(connection)

    def _accept(self) -> None:
        while not self._closing:
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if self._closing:
                    return
                _log.warning("accept: %s", error)
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    threading.Event().wait(0.2)  # until somebody else has given something back
                continue
            self._admit(Connection(sock))

    def _admit(self, connection: Connection) -> None:
        with self._lock:
            full = len(self._clients) >= MAX_CLIENTS
            if not full:
                self._clients.add(connection)
        if full:
            _turn_away(connection)
            return
        try:
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()
        except RuntimeError:  # no thread to be had
            self._forget(connection)
            _turn_away(connection)

    def _forget(self, connection: Connection) -> None:
        with self._lock:
            self._clients.discard(connection)

    def _serve(self, connection: Connection) -> None:
        """One client's thread, from its first request to its last."""
        try:
            while not self._closing:
                try:
                    request = connection.next_request()
                except Malformed as error:
                    connection.poisoned = True
                    _send(connection, _malformed_reply(error))
                    break
                if request is None:
                    break
                self._answer(connection, request)
        except ClientGone:
            pass
        finally:
            self._forget(connection)
            connection.close()

    def _answer(self, connection: Connection, request: Request) -> None:
        try:
            reply = self._handle(connection, request)
        except AmbiError as error:
            reply = error_reply(error)
        except ClientGone:
            raise
        except OSError as error:
            reply = error_reply(from_os_error(f"{request.method} {request.target.partition('?')[0]} failed", error))
        except Exception as error:  # ours: the client is told, the log has the rest
            _log.exception("%s %s", request.method, request.target)
            what = f"{type(error).__name__}: {error}".partition("\n")[0]
            reply = error_reply(
                Internal(f"internal error: {what}", hint="the engine's log has the details; please report it")
            )
        if connection.answered:
            if not connection.hijacked and reply is not None:
                connection.poisoned = True  # it failed in the middle of a stream: only the end of the connection can say so
            return
        assert reply is not None
        _send(connection, reply)

    def _handle(self, connection: Connection, request: Request) -> Reply | None:
        match = self._router.match(request.method, request.target)
        call = Call(self._engine, connection, request, version=match.version, name=match.name, query=Query(match.query))
        return match.handler(call)


def _send(connection: Connection, reply: Reply) -> None:
    connection.reply(reply.status, reply.headers, reply.body)


def _malformed_reply(error: Malformed) -> Reply:
    return error_reply(InvalidRequest(str(error)))._replace(status=error.status)


def _turn_away(connection: Connection) -> None:
    """Tell a client that there are too many, without waiting for it."""
    connection.poisoned = True
    connection.socket.setblocking(False)
    error = Unavailable(f"the engine has {MAX_CLIENTS} clients already", hint="end some of them, or try again later")
    try:
        _send(connection, error_reply(error))
    except ClientGone:
        pass
    connection.socket.close()


def _end_input(connection: Connection) -> None:
    if connection.hijacked:
        return
    try:
        connection.socket.shutdown(socket.SHUT_RD)
    except OSError:  # the client is gone, or its thread has closed it
        pass
