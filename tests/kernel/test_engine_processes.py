"""The processes behind a run: what is executed, and what stays when they are killed or told to end."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness import EngineUnderTest
from tests.shimkit import wait_gone


@pytest.fixture
def engine(new_engine: Callable[..., EngineUnderTest], busybox_tar: Path) -> EngineUnderTest:
    engine = new_engine()
    engine.load_busybox(busybox_tar)
    return engine


def below(pid: int) -> list[int]:
    """Every process below `pid`, itself included."""
    found, rest = [], [pid]
    while rest:
        found.append(rest.pop())
        try:
            for task in Path(f"/proc/{found[-1]}/task").iterdir():
                rest += [int(child) for child in (task / "children").read_text().split()]
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            found.pop()
    return found


def parking_places(pids: list[int]) -> list[str]:
    """The cgroups that the parked shims `pids` have made, of those that are still there."""
    names = {f"park-{pid}" for pid in pids}
    return [path for path, _, _ in os.walk("/sys/fs/cgroup") if os.path.basename(path) in names]


def until(holds: Callable[[], object], what: str) -> None:
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def parked(engine: EngineUnderTest) -> list[int]:
    """Shims that wait below the zygote, their cgroups made and joined."""
    zygote = engine.zygote()
    children = [int(pid) for pid in Path(f"/proc/{zygote}/task/{zygote}/children").read_text().split()]
    return [pid for pid in children if parking_places([pid])]


@pytest.mark.needs("strace", "docker")
def test_a_run_executes_the_program_and_nothing_else(engine: EngineUnderTest, tmp_path: Path) -> None:
    """No python, no mount, no runtime: everything else is done by processes that are there or forked from such."""
    assert engine.docker("run", "--rm", "--network", "none", "busybox", "true").returncode == 0
    until(lambda: parked(engine), "no shim is parked")  # else the next run's shim may be made before strace is there
    traced = below(engine.pid or 0) + below(engine.zygote())
    trace = tmp_path / "trace"
    argv = ["strace", "-f", "-qq", "-e", "trace=execve,execveat", "-o", str(trace)]
    tracer = subprocess.Popen([*argv, *(word for pid in traced for word in ("-p", str(pid)))])
    try:
        until(lambda: all(f"TracerPid:\t{tracer.pid}" in _status(pid) for pid in traced), "strace does not attach")
        done = engine.docker("run", "--rm", "--network", "none", "busybox", "echo", "traced")
        assert (done.returncode, done.stdout) == (0, b"traced\n"), done.stderr
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.wait()
    executed = re.findall(r'execve(?:at)?\((?:\S+, )?"([^"]*)", \[([^\]]*)\]', trace.read_text())
    assert executed == [("/bin/echo", '"echo", "traced"')]


def _status(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text()


@pytest.mark.needs("cgroup-v1", "docker")
def test_a_killed_zygote_and_its_parked_shim_leave_no_cgroup(engine: EngineUnderTest) -> None:
    until(lambda: parked(engine), "no shim is parked")
    zygote, waiting = engine.zygote(), parked(engine)
    for pid in (zygote, *waiting):
        os.kill(pid, signal.SIGKILL)
    for pid in (zygote, *waiting):
        wait_gone(pid)
    assert engine.docker("run", "--rm", "--network", "none", "busybox", "true").returncode == 0
    until(lambda: parked(engine), "no shim is parked after a new start of the zygote")
    until(lambda: not parking_places(waiting), f"left: {parking_places(waiting)}")


@pytest.mark.needs("cgroup-v1")
@pytest.mark.parametrize("killed", [False, True], ids=["sigterm", "after a kill -9"])
def test_an_engine_that_ends_takes_zygote_and_parked_shim_along(engine: EngineUnderTest, killed: bool) -> None:
    until(lambda: parked(engine), "no shim is parked")
    zygote, waiting = engine.zygote(), parked(engine)
    if killed:
        engine.kill()
        engine.start()
        assert engine.zygote() == zygote
    assert engine.process is not None
    engine.process.send_signal(signal.SIGTERM)
    assert engine.process.wait(30) == 0
    assert not Path(f"/proc/{zygote}").exists() or _status(zygote).find("State:\tZ") > 0
    assert parking_places(waiting) == []
