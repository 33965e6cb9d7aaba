"""The helper that stays in a container after an exec and makes the next ones."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from ambi.core.deadline import Deadline
from ambi.core.errors import CommandNotFound, DeadlineExceeded, InvalidRequest
from runtime import cgroups, spare
from tests.driverkit import Rig, Running, oci_process
from tests.kernel.runtimekit import rig, tree
from tests.shimkit import state

__all__ = ["rig", "tree"]
SHOW = """
cat /proc/self/cgroup
for kind in cgroup ipc mnt net pid user uts; do readlink /proc/self/ns/$kind; done
ls /proc/self/fd
grep -e ^Uid -e ^Gid -e ^Groups -e ^Cap -e ^NoNew -e ^Sec -e ^Sig -e ^Shd -e ^Umask -e ^Cpus /proc/self/status
ulimit -a
"""  # of a process, all that does not change from one to the next
pytestmark = pytest.mark.needs("cgroup-v1")


@pytest.fixture
def running(rig: Rig) -> Iterator[Running]:
    with rig.started(["sleep", "1000"]) as running:
        yield running


def in_group(running: Running) -> set[int]:
    """The processes in the container's groups, the same in each hierarchy."""
    path = running.created._group.path  # type: ignore[attr-defined]
    found = {Path(f"{h.mount}{path}/cgroup.procs").read_text() for h in cgroups.hierarchies().v1}
    assert len(found) == 1, found
    return {int(pid) for pid in found.pop().split()}


def await_spare(running: Running) -> int:
    """The pid of the spare helper, once it has joined all groups."""
    loop, init = running.loop, running.created.init.pid

    def joined() -> bool:
        try:
            return len(in_group(running)) == 2
        except AssertionError:  # in some of them
            return False

    assert loop.run(lambda: _tick(running) and joined(), Deadline.after(30)), in_group(running)
    (pid,) = in_group(running) - {init}
    return pid


def _tick(running: Running) -> bool:
    """Have the loop look again soon."""
    running.loop.later(0.02, lambda: None)
    return True


def test_it_makes_the_next_execs_too(running: Running) -> None:
    assert in_group(running) == {running.created.init.pid}, "there is one before anything has been executed"
    assert running.exec(["echo", "one"]).out == b"one\n"
    first = await_spare(running)
    done = running.exec(["sh", "-c", "cat; echo two >&2; exit 5"], stdin=b"in")
    assert (done.code, done.out, done.err) == (5, b"in", b"two\n")
    assert await_spare(running) == first
    os.kill(first, signal.SIGSTOP)
    with pytest.raises(DeadlineExceeded):
        running.created.exec(oci_process(["true"]), False, Deadline.after(0.2))
    assert state(first) == "gone", "one that hangs is kept"
    assert running.exec(["echo", "three"]).out == b"three\n"


def test_what_it_makes_is_as_any_exec(running: Running) -> None:
    show = ["sh", "-c", SHOW]
    first = running.exec(show)
    await_spare(running)
    assert running.exec(show).out == first.out
    await_spare(running)
    tty = running.exec(["tty"], terminal=True)
    assert tty.out == b"/dev/pts/0\r\n"
    await_spare(running)
    with pytest.raises(CommandNotFound):
        running.exec(["/no/such"])
    with pytest.raises(InvalidRequest, match="working directory"):
        running.exec(["true"], cwd="/no/such")
    assert running.exec(show).out == first.out, "what went before has left something"


def test_it_is_not_counted(running: Running) -> None:
    running.exec(["true"])
    await_spare(running)
    alone = running.loop.run(lambda: _tick(running) and running.created.usage().pids == 1, Deadline.after(30))
    assert alone, "the spare is counted, or what made the exec never ends"
    assert [entry["pid"] for entry in running.created.processes()] == [running.created.init.pid]


def test_one_that_was_killed_is_done_without(running: Running) -> None:
    running.exec(["true"])
    os.kill(await_spare(running), signal.SIGKILL)
    assert running.exec(["echo", "still"]).out == b"still\n"
    await_spare(running)


def test_it_goes_after_a_while(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spare, "KEPT_SECONDS", 0.3)
    running.exec(["true"])
    pid = await_spare(running)
    assert running.loop.run(lambda: _tick(running) and state(pid) == "gone", Deadline.after(30))


@pytest.mark.parametrize("limits", [{"pids": {"limit": 20}}, {"memory": {"limit": 64 << 20}}])
def test_limits_are_the_containers_own(rig: Rig, limits: dict[str, object]) -> None:
    with rig.started(["sleep", "1000"], resources=limits) as running:
        assert running.exec(["true"]).code == 0
        running.loop.run(lambda: False, Deadline.after(0.3))
        assert in_group(running) == {running.created.init.pid}


def test_delete_leaves_none(rig: Rig) -> None:
    with rig.started(["sleep", "1000"]) as running:
        running.exec(["true"])
        pid = await_spare(running)
        path = running.created._group.path  # type: ignore[attr-defined]
    assert state(pid) == "gone"
    assert not [h.mount for h in cgroups.hierarchies().v1 if Path(f"{h.mount}{path}").exists()]
