"""Starts the zygote of a run root.

The interpreter is executed from a detached read-only mount of itself (`open_tree`, `mount_setattr`), so that whoever gets
hold of a `/proc/PID/exe` of ours from within an instance has nothing that it could write to; where that cannot be done, from
a sealed copy in memory. `argv[0]` stays the real path, from which CPython finds its virtual environment; `-I` keeps the
caller's directory and environment out of the import path.
"""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

from ambi.core.errors import AmbiError, Unavailable
from ambi.linux import memfd, mount, unix
from ambi.shim import record

SOCKET = "zygote.sock"
LOG = "zygote.log"
LOCK = "zygote.lock"
LOG_BYTES = 1 << 20  # past which the log is started anew with the next zygote
START_SECONDS = 60.0
ANSWER_SECONDS = 10.0


def ensure(run_root: Path) -> None:
    """Have a zygote answer at `run_root`, which exists: the one that is there, or a new one.

    Raises Unavailable when it cannot be started; the message ends with the last line of its log.
    """
    lock = os.open(run_root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not answers(run_root):
            _start(run_root)
    finally:
        os.close(lock)


def answers(run_root: Path) -> bool:
    """Whether a zygote of this run root takes requests."""
    try:
        connect(run_root).close()
    except OSError:
        return False
    return True


def connect(run_root: Path) -> socket.socket:
    """A connection to the zygote of this run root, which has answered on it.

    Raises OSError when there is none. One of another version of the protocol is told to end; its shims live on.
    """
    sock = unix.connect(run_root / SOCKET, ANSWER_SECONDS)
    try:
        unix.send(sock, {"op": "ping", "seq": 0})
        message = unix.receive(sock)
        if message is None:
            raise ConnectionResetError("the zygote has closed the connection")
        message.close()
        if (message.body.get("ok") or {}).get("version") == record.VERSION:
            return sock
        unix.send(sock, {"op": "stop", "seq": 1})
        unix.receive(sock)
        raise ConnectionRefusedError("the zygote speaks another version of the protocol")
    except AmbiError as error:
        sock.close()
        raise ConnectionRefusedError(f"the zygote cannot be understood: {error}") from error
    except OSError:
        sock.close()
        raise


def _start(run_root: Path) -> None:
    log_path = run_root / LOG
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    log = os.open(log_path, flags, 0o600)
    if os.fstat(log).st_size > LOG_BYTES:
        os.ftruncate(log, 0)
    interpreter = -1
    listener = unix.listen(run_root / SOCKET)
    try:
        interpreter = _interpreter()
        child = subprocess.Popen(
            [sys.executable, "-I", "-m", "ambi.shim.zygote", str(run_root), str(listener.fileno())],
            executable=f"/proc/self/fd/{interpreter}",
            pass_fds=(listener.fileno(), interpreter),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            cwd="/",
            start_new_session=True,
        )
        status = _wait(child)
    except OSError as error:
        raise Unavailable(f"cannot start the zygote of {run_root}: {error.strerror}") from error
    finally:
        os.close(log)
        listener.close()
        if interpreter >= 0:
            os.close(interpreter)
    if status != 0:
        raise Unavailable(f"the zygote of {run_root} did not start: {_last_line(log_path)}", hint=f"see {log_path}")


def _wait(child: subprocess.Popen[bytes]) -> int | None:
    """The first process of the zygote ends when the second, which serves, is ready."""
    try:
        return child.wait(START_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        return None


def _interpreter() -> int:
    """A descriptor of the interpreter's file that cannot lead to a writable one."""
    path = os.path.realpath(sys.executable)
    try:
        fd = mount.open_tree(mount.AT_FDCWD, path, mount.OPEN_TREE_CLONE)
    except OSError:  # no CAP_SYS_ADMIN here, or a kernel before 5.2
        return _sealed_copy(path)
    try:
        mount.mount_setattr(fd, set=mount.MOUNT_ATTR_RDONLY | mount.MOUNT_ATTR_NOSUID)
    except OSError:  # before 5.12
        os.close(fd)
        return _sealed_copy(path)
    return fd


def _sealed_copy(path: str) -> int:
    with open(path, "rb", buffering=0) as file:
        return memfd.sealed("python", file.readall())


def _last_line(path: Path) -> str:
    lines = path.read_bytes()[-4096:].decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"nothing in {path}"
