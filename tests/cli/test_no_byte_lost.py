"""Every byte that a workload prints arrives, on attach and in the log, however short it lives and whoever stalls."""

from __future__ import annotations

import hashlib
import os
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.harness import EngineUnderTest
from tests.rawclient import RawClient

SHORT_RUNS = {"container": 500, "vm": 50}
BULK_BYTES = 100_000_000
EXPECTED = b"x" * 4096


@pytest.fixture
def engine(new_engine: Callable[[], EngineUnderTest], busybox_tar: Path) -> EngineUnderTest:
    made = new_engine()
    made.load_busybox(busybox_tar)
    return made


@pytest.mark.timeout(900)
def test_output_of_a_short_life_is_whole(engine: EngineUnderTest, isolation: str) -> None:
    script = "head -c 4096 /dev/zero | tr '\\0' x"

    def run(number: int) -> None:
        done = engine.docker("run", "--rm", "--network", "none", "--runtime", isolation, "busybox", "sh", "-c", script)
        assert (done.returncode, done.stdout, done.stderr) == (0, EXPECTED, b""), f"run {number}"

    with ThreadPoolExecutor(os.cpu_count()) as several:
        list(several.map(run, range(SHORT_RUNS[isolation])))


@pytest.mark.timeout(900)
def test_bulk_survives_a_stalled_reader_and_commands(engine: EngineUnderTest, isolation: str, tmp_path: Path) -> None:
    data = os.urandom(BULK_BYTES)
    want = hashlib.sha256(data).hexdigest()
    created = engine.docker(
        "create",
        "-i",
        "--name",
        "bulk",
        "--network",
        "none",
        "--runtime",
        isolation,
        "busybox",
        "sh",
        "-c",
        "tee /dev/stderr",
    )
    assert created.returncode == 0, created.stderr.decode()
    stalled = RawClient(engine.socket)
    stalled.hijack("/containers/bulk/attach?stream=1&stdout=1&stderr=1")
    second = RawClient(engine.socket)
    second.hijack("/containers/bulk/attach?stream=1&stdout=1&stderr=1")
    seen: dict[int, bytes] = {}
    reader = threading.Thread(target=lambda: seen.update(second.frames()))
    reader.start()
    environment = {**os.environ, "DOCKER_HOST": f"unix://{engine.socket}"}
    with open(tmp_path / "out", "wb") as out, open(tmp_path / "err", "wb") as err:
        main = subprocess.Popen(
            ["docker", "start", "-ai", "bulk"], stdin=subprocess.PIPE, stdout=out, stderr=err, env=environment
        )
        assert main.stdin is not None
        feeder = threading.Thread(target=lambda: (main.stdin.write(data), main.stdin.close()))  # type: ignore[union-attr]
        feeder.start()
        answers = _ask_meanwhile(engine, feeder)
        feeder.join()
        assert main.wait(600) == 0
    reader.join(120)
    assert answers, "the transfer was over before anything could be asked"
    for path in ("out", "err"):
        assert hashlib.sha256((tmp_path / path).read_bytes()).hexdigest() == want, f"attached {path}"
    assert {n: hashlib.sha256(seen[n]).hexdigest() for n in (1, 2)} == {1: want, 2: want}, "second attacher"
    late = stalled.frames()
    assert {n: hashlib.sha256(late[n]).hexdigest() for n in (1, 2)} == {1: want, 2: want}, "stalled reader"
    logs = engine.docker("logs", "bulk", timeout=300)
    assert (hashlib.sha256(logs.stdout).hexdigest(), hashlib.sha256(logs.stderr).hexdigest()) == (want, want), "log"
    for client in (stalled, second):
        client.close()


def _ask_meanwhile(engine: EngineUnderTest, feeder: threading.Thread) -> list[bytes]:
    """Exec and signal while the transfer runs; every exec must answer although the data flows."""
    answers = []
    while feeder.is_alive():
        if engine.docker("inspect", "-f", "{{.State.Running}}", "bulk").stdout.strip() == b"true":
            done = engine.docker("exec", "bulk", "echo", "here", timeout=30)
            assert (done.returncode, done.stdout) == (0, b"here\n"), done.stderr
            assert engine.docker("kill", "-s", "CONT", "bulk").returncode == 0
            answers.append(done.stdout)
        time.sleep(0.2)
    return answers
