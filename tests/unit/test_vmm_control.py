"""The control protocol of the monitor: both of its ends, over a true socket."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from ambi.core.deadline import Deadline
from ambi.core.errors import AmbiError, Conflict, DeadlineExceeded, Internal, Unavailable
from ambi.core.loop import Loop
from hyper.vm.jail import Child
from hyper.vmm.control import Control
from hyper.vmm.monitor import VmmMonitor

SOON = 5.0


class Rig:
    """A Control in a thread of its own, and a VmmMonitor that talks to it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.monitor = VmmMonitor(Child("monitor", os.getpid()), ours)
        self.hung_up = threading.Event()
        self.loop = Loop()
        verbs = {"figures": self.figures, "save": self.save, "pause": self.refuse, "break": self.break_down}
        self.control = Control(self.loop, theirs, verbs, self.hung_up.set)
        self.thread = threading.Thread(target=lambda: self.loop.run(self.hung_up.is_set, Deadline.after(30)))
        self.thread.start()

    def figures(self, request: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        return {"read_bytes": 5, "written_bytes": 7, "exits": {"io": 1}}

    def save(self, request: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        os.write(fds[0], b"state")
        return {"pages": request["pages"]}

    def refuse(self, request: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        raise Conflict("it stands already")

    def break_down(self, request: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        raise OSError(28, "No space left on device")

    def end(self) -> None:
        self.monitor.close()
        self.thread.join()
        self.control.close()
        self.monitor.child.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    found = Rig()
    yield found
    found.end()


def by() -> Deadline:
    return Deadline.after(SOON)


def test_figures_come_back(rig: Rig) -> None:
    assert rig.monitor.block_bytes(by()) == (5, 7)
    assert rig.monitor.inspect(by())["exits"] == {"io": 1}


def test_descriptors_go_along_and_are_not_kept(rig: Rig) -> None:
    reader, writer = os.pipe()
    before = len(os.listdir("/proc/self/fd"))
    assert rig.monitor.call("save", by(), (writer,), pages=3) == {"pages": 3}
    rig.monitor.block_bytes(by())  # answered when the request before has been put away
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(writer)
    assert os.read(reader, 100) == b"state" and os.read(reader, 100) == b""
    os.close(reader)


def test_errors_keep_their_kind(rig: Rig) -> None:
    with pytest.raises(Conflict, match="stands already"):
        rig.monitor.call("pause", by())
    with pytest.raises(Internal, match="break: No space left"):
        rig.monitor.call("break", by())
    with pytest.raises(AmbiError, match="does not know the operation 'dance'"):
        rig.monitor.call("dance", by())


def test_the_cause_of_an_end_is_kept_and_cleaned(rig: Rig) -> None:
    rig.control.end("guest-panic", "Kernel panic\n\x1b[31m not syncing")
    assert rig.monitor.block_bytes(by()) == (5, 7)  # the event came first
    assert rig.monitor.why() == "guest-panic: Kernel panic  [31m not syncing"


def test_a_driver_that_goes_is_noticed(rig: Rig) -> None:
    rig.monitor.close()
    assert rig.hung_up.wait(SOON)


@pytest.fixture
def bare() -> Iterator[tuple[VmmMonitor, socket.socket]]:
    """A monitor whose other end is the test."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    monitor = VmmMonitor(Child("monitor", os.getpid()), ours)
    yield monitor, theirs
    monitor.close()
    monitor.child.close()
    theirs.close()


@pytest.mark.parametrize(
    "answer", [b"{", b"[]", b'"x"', b"\xff", b'{"id": 1}', b'{"id": 1, "ok": 3}', b'{"id": 1, "error": "x"}']
)
def test_a_monitor_that_talks_nonsense_is_unavailable(bare: tuple[VmmMonitor, socket.socket], answer: bytes) -> None:
    monitor, theirs = bare
    theirs.send(answer)
    with pytest.raises(Unavailable):
        monitor.call("figures", by())


def test_a_monitor_that_is_silent_or_gone(bare: tuple[VmmMonitor, socket.socket]) -> None:
    monitor, theirs = bare
    with pytest.raises(DeadlineExceeded):
        monitor.call("figures", Deadline.after(0.01))
    theirs.send(json.dumps({"id": 1, "ok": {"late": 1}}).encode())
    theirs.send(json.dumps({"id": 2, "ok": {"read_bytes": -3, "written_bytes": "x"}}).encode())
    assert monitor.block_bytes(by()) == (0, 0)  # the late answer is not taken for the second's
    theirs.close()
    with pytest.raises(Unavailable):
        monitor.call("figures", by())
    assert monitor.why() == ""
