"""SEQPACKET sockets below a directory, carrying JSON objects and descriptors (unix(7)).

One message is one JSON object of at most `MAX_MESSAGE` bytes. A larger one, up to `MAX_BODY`, travels in a memfd: the
message is then `{"memfd": length}` and the memfd its last descriptor, so that a long environment or a long process list
needs no second protocol.

A socket's path may be longer than the 107 bytes of `sockaddr_un`: it is bound and connected to through a descriptor of its
directory, as `/proc/self/fd/N/NAME`.
"""

from __future__ import annotations

import array
import json
import os
import socket
import struct
from collections.abc import Iterable
from typing import Any, NamedTuple

from ambi.core.errors import InvalidRequest

MAX_MESSAGE = 128 << 10
MAX_BODY = 16 << 20
MAX_DESCRIPTORS = 8
_ANCILLARY = socket.CMSG_SPACE((MAX_DESCRIPTORS + 1) * 4)

Path = str | os.PathLike[str]


class Peer(NamedTuple):
    """Who connected, at the time of `connect`."""

    pid: int
    uid: int
    gid: int


class Message(NamedTuple):
    """A received object and the descriptors that came with it (CLOEXEC); the receiver owns them."""

    body: dict[str, Any]
    fds: list[int]

    def close(self) -> None:
        """Close the descriptors that nobody has taken out of `fds`."""
        while self.fds:
            os.close(self.fds.pop())


def listen(path: Path, *, mode: int = 0o600, backlog: int = 128) -> socket.socket:
    """A listening SEQPACKET socket at `path`, replacing what is there."""
    path = os.fspath(path)
    directory = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    name = os.path.basename(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        try:
            os.unlink(name, dir_fd=directory)
        except FileNotFoundError:
            pass
        os.fchmod(sock.fileno(), mode)  # the file is born with this mode, less the umask: never open to more, even briefly
        sock.bind(f"/proc/self/fd/{directory}/{name}")
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    finally:
        os.close(directory)
    return sock


def connect(path: Path, timeout: float | None = None) -> socket.socket:
    """A blocking connection to the SEQPACKET socket at `path`; each later operation too may take `timeout` seconds.

    Raises OSError: ENOENT or ECONNREFUSED when nobody listens, TimeoutError when nobody accepts.
    """
    path = os.fspath(path)
    directory = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(timeout)
    try:
        sock.connect(f"/proc/self/fd/{directory}/{os.path.basename(path)}")
    except BaseException:
        sock.close()
        raise
    finally:
        os.close(directory)
    return sock


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected SEQPACKET ends."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def peer(sock: socket.socket) -> Peer:
    return Peer(*struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)))


def send(sock: socket.socket, body: dict[str, Any], fds: Iterable[int] = ()) -> None:
    """Send one object with copies of `fds`, which stay the caller's.

    Raises InvalidRequest when it is too large, BlockingIOError on a full non-blocking socket, OSError when the peer is gone.
    """
    data = json.dumps(body, separators=(",", ":")).encode()
    passed = list(fds)
    if len(passed) > MAX_DESCRIPTORS:
        raise InvalidRequest(f"a message carries at most {MAX_DESCRIPTORS} descriptors, not {len(passed)}")
    if len(data) <= MAX_MESSAGE:
        _send(sock, data, passed)
        return
    if len(data) > MAX_BODY:
        raise InvalidRequest(f"a message of {len(data)} bytes is too long; the limit is {MAX_BODY}")
    memfd = os.memfd_create("message", os.MFD_CLOEXEC)
    try:
        os.write(memfd, data)
        _send(sock, b'{"memfd":%d}' % len(data), [*passed, memfd])
    finally:
        os.close(memfd)


def receive(sock: socket.socket) -> Message | None:
    """The next object, or None at the end of the connection.

    Raises InvalidRequest when it is not a JSON object, was cut short or brought too many descriptors (all are closed then),
    BlockingIOError when there is none on a non-blocking socket, OSError when the peer is gone.
    """
    data, ancillary, flags, _ = sock.recvmsg(MAX_MESSAGE + 1, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
    fds = _descriptors(ancillary)
    if not data and not fds and not flags & socket.MSG_CTRUNC:
        return None
    try:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(data) > MAX_MESSAGE:
            raise InvalidRequest("message is too long or carries too many descriptors")
        return Message(_decode(data, fds), fds)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def _send(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data], rights, socket.MSG_NOSIGNAL)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds: list[int] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.extend(struct.unpack(f"{len(data) // 4}i", data[: len(data) // 4 * 4]))
    return fds


def _decode(data: bytes, fds: list[int]) -> dict[str, Any]:
    body = _parse(data)
    length = body.get("memfd")
    if length is None:
        return body
    if len(body) != 1 or type(length) is not int or not 0 < length <= MAX_BODY or not fds:
        raise InvalidRequest("message names a memfd that it does not bring")
    memfd = fds.pop()
    try:
        return _parse(os.pread(memfd, length, 0))
    except OSError as error:
        raise InvalidRequest(f"message brings no memfd: {error.strerror}") from error
    finally:
        os.close(memfd)


def _parse(data: bytes) -> dict[str, Any]:
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"message is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise InvalidRequest(f"message is a JSON {type(body).__name__}, not an object")
    return body
