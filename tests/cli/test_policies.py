"""Health, pause, update, stats and restarts by both command lines, for both kinds of instance."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import EngineUnderTest

SECONDS = 60.0


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, busybox_tar: Path) -> Iterator[EngineUnderTest]:
    made = EngineUnderTest(tmp_path_factory.mktemp("p"))
    made.start()
    made.load_busybox(busybox_tar)
    yield made
    made.destroy()


def said(engine: EngineUnderTest, *args: str, status: int = 0) -> str:
    """What the docker CLI prints, stdout and stderr together."""
    done = engine.docker(*args)
    text = (done.stdout + done.stderr).decode()
    assert done.returncode == status, text
    return text


def until(read: Callable[[], str], pattern: str) -> str:
    end, text = time.monotonic() + SECONDS, ""
    while time.monotonic() < end:
        text = read()
        if re.search(pattern, text):
            return text
        time.sleep(0.1)
    raise AssertionError(f"no {pattern!r} in {text!r}")


def status_of(engine: EngineUnderTest, name: str) -> str:
    return engine.ambi("ps", "-a", "--filter", f"name=^{name}$", "--format", "{{.Status}}").stdout.decode().strip()


@pytest.mark.needs("docker", "qemu")
@pytest.mark.parametrize("runtime", ["container", "vm"])
def test_health_pause_update_and_stats(engine: EngineUnderTest, runtime: str) -> None:
    name = f"aa-{runtime}"
    check = ("--health-cmd", "echo seen; test -e /well", "--health-interval", "200ms", "--health-retries", "1")
    run = ("run", "-d", "--name", name, "--runtime", runtime, "--network", "none", "-m", "64m", *check)
    identity = said(engine, *run, "busybox", "sleep", "1000").strip()
    until(lambda: status_of(engine, name), r"^Up .* \(unhealthy\)$")
    said(engine, "exec", name, "touch", "/well")
    until(lambda: status_of(engine, name), r"^Up .* \(healthy\)$")
    assert said(engine, "ps", "-q", "--no-trunc", "--filter", "health=healthy").strip() == identity
    health = json.loads(said(engine, "inspect", name, "--format", "{{json .State.Health}}"))
    assert health["Status"] == "healthy" and health["FailingStreak"] == 0
    assert health["Log"][-1]["ExitCode"] == 0 and health["Log"][-1]["Output"] == "seen\n"

    assert said(engine, "pause", name) == f"{name}\n"
    assert re.fullmatch(r"Up .* \(Paused\)", status_of(engine, name))
    assert "is paused, unpause the container before exec" in said(engine, "exec", name, "true", status=1)
    assert "unpause it first" in said(engine, "attach", name, status=1)
    assert f"Container {identity} is already paused" in said(engine, "pause", name, status=1)
    assert "Unpause and then stop the container" in said(engine, "rm", name, status=1)
    assert "try unpause instead" in said(engine, "start", name, status=1)
    state = json.loads(said(engine, "inspect", name, "--format", "{{json .State}}"))
    assert (state["Status"], state["Running"], state["Paused"]) == ("paused", True, True)
    assert "sleep 1000" in said(engine, "top", name)
    assert engine.ambi("unpause", name).stdout == f"{name}\n".encode()
    assert said(engine, "exec", name, "echo", "awake") == "awake\n"

    row = json.loads(said(engine, "stats", "--no-stream", "--format", "json", name))
    assert row["MemUsage"].endswith("/ 64MiB") and int(row["PIDs"]) >= 1, row
    ours = json.loads(engine.ambi("stats", "--no-stream", "--format", "json", name).stdout)
    assert ours["MemUsage"].endswith("/ 64MiB") and " / " in ours["NetIO"] and " / " in ours["BlockIO"]

    assert engine.ambi("update", "--pids-limit", "30", "--restart", "on-failure:2", name).returncode == 0
    host = json.loads(said(engine, "inspect", name, "--format", "{{json .HostConfig}}"))
    assert host["PidsLimit"] == 30 and host["RestartPolicy"] == {"Name": "on-failure", "MaximumRetryCount": 2}
    assert "Minimum memory limit allowed is 6MB" in said(engine, "update", "-m", "1m", name, status=1)
    assert said(engine, "pause", name) and said(engine, "stop", "-t", "0", name)
    assert re.fullmatch(r"Exited \(137\) .* ago", status_of(engine, name))
    said(engine, "rm", name)


@pytest.mark.needs("docker")
def test_a_run_with_a_policy_ends_with_its_first_run(engine: EngineUnderTest) -> None:
    """As with dockerd 20.10: who is attached sees one run, and the instance goes on without them."""
    done = engine.docker("run", "--name", "bb", "--restart", "on-failure:1", "busybox", "sh", "-c", "echo hi; exit 3")
    assert (done.returncode, done.stdout) == (3, b"hi\n")
    until(lambda: status_of(engine, "bb"), r"^Exited \(3\)")
    assert said(engine, "inspect", "bb", "--format", "{{.RestartCount}} {{.State.Restarting}}") == "1 false\n"
    assert said(engine, "logs", "bb") == "hi\nhi\n"
    said(engine, "rm", "bb")


@pytest.mark.needs("docker")
def test_a_restarting_instance(engine: EngineUnderTest) -> None:
    said(engine, "run", "-d", "--name", "cc", "--restart", "always", "busybox", "false")
    until(lambda: said(engine, "inspect", "cc", "--format", "{{.RestartCount}} {{.State.Status}}"), "^[4-9] restarting")
    assert re.fullmatch(r"Restarting \(1\) .* ago", status_of(engine, "cc"))
    state = json.loads(said(engine, "inspect", "cc", "--format", "{{json .State}}"))
    assert (state["Running"], state["Restarting"], state["ExitCode"], state["Pid"]) == (True, True, 1, 0)
    assert "You cannot remove a restarting container" in said(engine, "rm", "cc", status=1)
    assert "is restarting, wait until the container is running" in said(engine, "exec", "cc", "true", status=1)
    assert "cc" in said(engine, "ps")
    said(engine, "stop", "cc")
    assert re.fullmatch(r"Exited \(1\) .* ago", status_of(engine, "cc"))
    said(engine, "rm", "cc")


@pytest.mark.needs("docker")
def test_no_engine_is_needed_for_a_restart(engine: EngineUnderTest) -> None:
    """The shim that finds nobody to tell starts an engine, which starts the instance."""
    script = "test -e /again && exec sleep 1000; touch /again; read x < /fifo"
    said(engine, "run", "-d", "--name", "dd", "--restart", "always", "busybox", "sh", "-c", f"mkfifo /fifo; {script}")
    said(engine, "exec", "-d", "dd", "sh", "-c", "sleep 1; echo > /fifo")
    before = engine.pid
    engine.kill()
    until(lambda: str(engine.pid), f"^(?!{before}$)[0-9]")
    engine.wait_ready()
    until(lambda: said(engine, "inspect", "dd", "--format", "{{.RestartCount}} {{.State.Status}}"), "^1 running")
    said(engine, "rm", "-f", "dd")
