"""A child's open(2) answered with a descriptor of ours: seccomp_unotify(2).

Some programs open a file by its name for reading and writing where they need to read it alone, and take no descriptor. With
this they name a file that does not exist, and get what the parent chooses: they have neither the file's path nor a right to
it. Other files are opened as ever until then; from then on nothing is opened in this way any more (ENOSYS).
"""

from __future__ import annotations

import array
import fcntl
import os
import select
import socket
import struct

from ambi.core.deadline import Deadline
from ambi.core.errors import DeadlineExceeded, Unavailable
from ambi.linux import seccomp

# linux/seccomp.h
_RET_ALLOW, _RET_USER_NOTIF = 0x7FFF0000, 0x7FC00000
_NOTIF_RECV, _NOTIF_SEND, _NOTIF_ADDFD = 0xC0502100, 0xC0182101, 0x40182103
_NOTIF_BYTES = 80  # struct seccomp_notif: id, pid, flags, struct seccomp_data
_NOTIF_PATH = 16 + 16 + 8  # there, openat's second argument
_CONTINUE = 1  # SECCOMP_USER_NOTIF_FLAG_CONTINUE
_ADDFD_FLAG_SEND = 2  # Linux 5.14: the new descriptor is the call's result

_AUDIT_ARCH_X86_64 = 0xC000003E
_NR_OPENAT = 257
_LOAD, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06  # linux/bpf_common.h
_NR, _ARCH, _FLAGS = 0, 4, 16 + 2 * 8  # struct seccomp_data; openat's third argument


def _program() -> bytes:
    """Tell of openat(..., O_RDWR) without any other flag, which leaves out what the C library and most programs open."""
    steps = (
        (_LOAD, 0, 0, _ARCH), (_JUMP_EQUAL, 0, 5, _AUDIT_ARCH_X86_64),
        (_LOAD, 0, 0, _NR), (_JUMP_EQUAL, 0, 3, _NR_OPENAT),
        (_LOAD, 0, 0, _FLAGS), (_JUMP_EQUAL, 0, 1, os.O_RDWR),
        (_RETURN, 0, 0, _RET_USER_NOTIF), (_RETURN, 0, 0, _RET_ALLOW),
    )  # fmt: skip
    return b"".join(struct.pack("<HBBI", *step) for step in steps)  # struct sock_filter


class Handover:
    """Made before the fork; `announce` is the child's, `give` the parent's, which is to `close` it. path: the file's."""

    __slots__ = ("_child", "_parent", "_path")

    def __init__(self, path: str) -> None:
        self._path = path.encode() + b"\0"
        self._parent, self._child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def announce(self) -> None:
        """Of the child, right before execve, with no_new_privs set: what it opens for reading and writing is told to us.

        Raises OSError: no kernel support, or somebody supervises this process in the same way already.
        """
        listener = seccomp.listen(_program())
        self._child.sendmsg([b"l"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [listener]))])
        os.close(listener)

    def give(self, fd: int, ended: int, by: Deadline) -> None:
        """Of the parent: wait until the child opens the path and have it get a copy of `fd`, close-on-exec.

        ended: readable once the child has ended. Raises Unavailable (it ended, or cannot be answered), DeadlineExceeded.
        """
        self._child.close()
        listener = self._receive(ended, by)
        try:
            while (ident := self._asked(listener, ended, by)) is None:
                pass
            answer = struct.pack("<QIIII", ident, _ADDFD_FLAG_SEND, fd, 0, os.O_CLOEXEC)  # struct seccomp_notif_addfd
            fcntl.ioctl(listener, _NOTIF_ADDFD, answer)
        except OSError as error:
            raise Unavailable(f"a child's open cannot be answered: {error.strerror}") from error
        finally:
            os.close(listener)

    def _asked(self, listener: int, ended: int, by: Deadline) -> int | None:
        """The identity of the child's next open if that is of our path; else it goes on, and None.

        The child has not met anything hostile yet, and could not open more than it can if it lied.
        """
        _wait(listener, ended, by)
        body = bytearray(_NOTIF_BYTES)
        fcntl.ioctl(listener, _NOTIF_RECV, body)
        ident, pid = struct.unpack_from("<QI", body)
        (address,) = struct.unpack_from("<Q", body, _NOTIF_PATH)
        memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if os.pread(memory, len(self._path), address) == self._path:
                return int(ident)
        finally:
            os.close(memory)
        fcntl.ioctl(listener, _NOTIF_SEND, struct.pack("<QqiI", ident, 0, 0, _CONTINUE))  # struct seccomp_notif_resp
        return None

    def _receive(self, ended: int, by: Deadline) -> int:
        _wait(self._parent.fileno(), ended, by)
        fds = array.array("i")
        _, ancillary, _, _ = self._parent.recvmsg(1, socket.CMSG_SPACE(fds.itemsize), socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(data[: fds.itemsize])
        if not fds:
            raise Unavailable("a child ended before it could be given a file")
        return fds[0]

    def close(self) -> None:
        self._parent.close()
        self._child.close()


def _wait(fd: int, ended: int, by: Deadline) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    poll.register(ended, select.POLLIN)
    ready = dict(poll.poll(by.milliseconds()))
    if not ready:
        raise DeadlineExceeded("a child did not open its file in time")
    if not ready.get(fd, 0) & select.POLLIN:
        raise Unavailable("a child ended before it could be given a file")
