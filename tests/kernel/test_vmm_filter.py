"""The monitor's seccomp filter: what it refuses, tried in a child that has loaded it."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import socket
import threading
from collections.abc import Callable

import pytest

from ambi.linux import process
from hyper.vmm import filter as vmm_filter


def in_child(body: Callable[[], object]) -> str:
    """What `body` raises, by the name of its errno, or "fine"; it runs under the filter."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        said = b"died"
        try:
            process.no_new_privileges()
            vmm_filter.load(os.getpid())
            body()
            said = b"fine"
        except OSError as error:
            said = errno.errorcode.get(error.errno or 0, "?").encode()
        finally:
            os.write(writer, said)
            os._exit(0)
    os.close(writer)
    try:
        return os.read(reader, 100).decode()
    finally:
        os.close(reader)
        os.waitpid(pid, 0)


REFUSED: dict[str, Callable[[], object]] = {
    "open a file": lambda: os.open("/etc/passwd", os.O_RDONLY),
    "look at a file": lambda: os.stat("/etc/passwd"),
    "open a socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM),
    "make a pair": socket.socketpair,
    "kill": lambda: os.kill(os.getppid(), 0),
    "kill itself": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "fork": os.fork,
    "execute": lambda: os.execv("/bin/true", ["true"]),
    "map code": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC),
    "leave its namespaces": lambda: os.open("/proc/1/ns/mnt", os.O_RDONLY),
    "trace": lambda: process.prctl(process.PR_SET_DUMPABLE, 1),
    "change its root": lambda: os.chroot("/"),
}

ALLOWED: dict[str, Callable[[], object]] = {
    "write to what it has": lambda: os.write(1, b""),
    "map memory": lambda: mmap.mmap(-1, 1 << 20).close(),
    "size of a descriptor": lambda: os.fstat(0),
    "random numbers": lambda: os.getrandom(8),
    "an eventfd": lambda: os.eventfd(0),
    "a lock between threads": lambda: threading.Event().wait(0.001),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    assert in_child(REFUSED[what]) == "EPERM"


@pytest.mark.parametrize("what", ALLOWED)
def test_allowed(what: str) -> None:
    assert in_child(ALLOWED[what]) == "fine"


def test_all_threads_are_under_it() -> None:
    """It is loaded when the vCPUs' threads are there already."""
    go, said = threading.Event(), [""]

    def thread() -> None:
        go.wait()
        try:
            os.open("/etc/passwd", os.O_RDONLY)
        except OSError as error:
            said[0] = errno.errorcode[error.errno or 0]

    def body() -> None:
        go.set()
        other.join()
        if said[0] != "EPERM":
            raise OSError(errno.ENOTRECOVERABLE, said[0])

    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            other = threading.Thread(target=thread)
            other.start()
            process.no_new_privileges()
            vmm_filter.load(os.getpid())
            body()
            os.write(writer, b"fine")
        finally:
            os._exit(0)
    os.close(writer)
    assert os.read(reader, 100) == b"fine"
    os.close(reader)
    os.waitpid(pid, 0)
