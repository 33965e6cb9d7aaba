"""Network namespaces from within the engine, whose threads must all stay in the host's.

A namespace is made, and what can only be done from inside is done, by a thread that ends afterwards (0.1 ms): a thread
that stayed would sooner or later open a socket in the wrong place.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TypeVar

from ambi.core.errors import from_os_error
from ambi.linux import process
from ambi.linux.net import loopback_up

T = TypeVar("T")


def elsewhere(work: Callable[[], T]) -> T:
    """What `work` returns or raises, run by a thread of its own that may change its namespaces."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="netns")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def inside(netns_fd: int, work: Callable[[], T]) -> T:
    """What `work` returns or raises, run inside the network namespace of `netns_fd`; also OSError of setns."""

    def enter() -> T:
        process.setns(netns_fd, process.CLONE_NEWNET)
        return work()

    return elsewhere(enter)


def new() -> int:
    """A descriptor (CLOEXEC) of a fresh network namespace in which `lo` is up."""

    def make() -> int:
        process.unshare(process.CLONE_NEWNET)
        loopback_up()
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    try:
        return elsewhere(make)
    except OSError as error:
        raise from_os_error("cannot make a network namespace", error) from error
