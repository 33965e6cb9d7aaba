"""The docker CLI waits across a kill of the engine, and has the exit code."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness import EngineUnderTest
from tests.rawclient import RawClient

pytestmark = pytest.mark.needs("docker")
SCRIPT = "echo ready; read line; echo got $line; exit 7"


@pytest.fixture
def engine(new_engine: Callable[..., EngineUnderTest], busybox_tar: Path) -> EngineUnderTest:
    engine = new_engine()
    engine.load_busybox(busybox_tar)
    return engine


def docker(engine: EngineUnderTest, *argv: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["docker", *argv],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**engine.environment, "DOCKER_HOST": f"unix://{engine.socket}"},
    )


def first_line(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    return process.stdout.readline()


@pytest.mark.parametrize("extra", [(), ("--rm",)], ids=["run", "run --rm"])
@pytest.mark.parametrize("again", [False, True], ids=["no engine", "another engine"])
def test_docker_run_outlives_its_engine(
    engine: EngineUnderTest, isolation: str, extra: tuple[str, ...], again: bool
) -> None:
    argv = ["run", *extra, "-i", "--name", "it", "--network", "none", "--runtime", isolation, "busybox", "sh", "-c", SCRIPT]
    client = docker(engine, *argv)
    assert first_line(client) == b"ready\n"
    engine.docker("exec", "it", "true", check=True)  # by then the start has been answered, too
    engine.kill()
    if again:
        engine.start()
    out, err = client.communicate(b"word\n", timeout=60)
    assert (client.returncode, out, err) == (7, b"got word\n", b"")
    engine.wait_ready()  # the shim has started it
    listed = engine.docker("ps", "-a", "--format", "{{.Names}} {{.Status}}").stdout.decode()
    assert extra or listed.startswith("it Exited (7)"), listed


def test_docker_wait_outlives_its_engine(engine: EngineUnderTest) -> None:
    engine.docker("run", "-d", "-i", "--name", "it", "--network", "none", "busybox", "sh", "-c", SCRIPT, check=True)
    waiters = [docker(engine, "wait", "it") for _ in range(3)]
    _await_copies(engine, len(waiters))
    engine.kill()
    engine.start()
    client = docker(engine, "attach", "it")
    client.communicate(b"word\n", timeout=60)
    assert [waiter.communicate(timeout=60)[0] for waiter in waiters] == [b"7\n"] * 3


def _await_copies(engine: EngineUnderTest, count: int) -> None:
    """Until `count` waits are known to the shim, as copies of sockets."""
    (shim,) = engine.shims().values()
    end = time.monotonic() + 30
    while sum(os.readlink(fd).startswith("socket:") for fd in Path(f"/proc/{shim}/fd").iterdir()) < count + 2:
        assert time.monotonic() < end, "the shim has not got the waiting clients"
        time.sleep(0.05)


def test_a_wait_before_the_shim_is_there_is_covered_by_the_start(engine: EngineUnderTest) -> None:
    engine.docker("create", "-i", "--name", "it", "--network", "none", "busybox", "sh", "-c", SCRIPT, check=True)
    waiter = RawClient(engine.socket)
    waiter.send("POST", "/containers/it/wait?condition=next-exit")
    _, headers = waiter.head()
    engine.docker("start", "it", check=True)
    _await_copies(engine, 1)
    engine.kill()
    engine.start()
    docker(engine, "attach", "it").communicate(b"word\n", timeout=60)
    assert waiter.body(headers) == b'{"StatusCode":7}\n'
    waiter.close()
