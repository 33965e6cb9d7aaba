"""Kill any process of ours at any moment: DESIGN's table of costs holds, and afterwards nothing is left.

Each round kills one process, chosen by a seeded die, while instances of both kinds run, a terminal is attached, a client of
`docker run` waits for its exit code and an import is under way. AMBI_LOTTERY_ROUNDS and AMBI_LOTTERY_SEED change how often
and which.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pexpect
import pytest

from tests import census
from tests.conftest import MARK
from tests.harness import EngineUnderTest

ROUNDS = int(os.environ.get("AMBI_LOTTERY_ROUNDS", "8"))
SEED = int(os.environ.get("AMBI_LOTTERY_SEED", "20"))
VICTIMS = ("engine", "zygote", "shim", "vmm", "vm-shim", "worker", "nursery")
SWEPT_WITHIN_S = 10.0  # promised are 2; the rest is for a machine that does other work too


class Table:
    """The running things of one lottery, and what must be true of them."""

    def __init__(self, engine: EngineUnderTest, tar: Path) -> None:
        self.engine, self.tar = engine, tar
        self.terminal = self._attach()
        self.client: subprocess.Popen[bytes] | None = None
        self.ids: dict[str, str] = {}

    def _attach(self) -> pexpect.spawn:
        environment = {**os.environ, "DOCKER_HOST": f"unix://{self.engine.socket}"}
        argv = ["run", "-it", "--name", "terminal", "--network", "none", "busybox", "cat"]
        return pexpect.spawn("docker", argv, env=environment, timeout=30)

    def renew(self) -> None:
        """Have both instances and a client of a third running, whatever the last round did."""
        if self.client is None:
            self.client = self._run_client()
        for name, kind in (("box", "container"), ("guest", "vm")):
            if self.state(name) != "true 0":
                self.engine.docker("rm", "-f", name)
                done = self.engine.docker(
                    "run", "-d", "--name", name, "--network", "none", "--runtime", kind, "busybox", "sleep", "3600"
                )
                assert done.returncode == 0, done.stderr.decode()
                self.ids[name] = done.stdout.decode().strip()

    def _run_client(self) -> subprocess.Popen[bytes]:
        """A `docker run` that has had its start answered, whose program ends with 23 when it reads a line."""
        argv = ["docker", "run", "--rm", "-i", "--name", "client", "--network", "none", "busybox", "sh", "-c"]
        client = subprocess.Popen(
            [*argv, "echo ready; read line; echo $line; exit 23"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "DOCKER_HOST": f"unix://{self.engine.socket}"},
        )
        assert client.stdout is not None
        assert client.stdout.readline() == b"ready\n"
        assert self.engine.docker("exec", "client", "true").returncode == 0
        return client

    def end_client(self) -> None:
        """The client has all output and the exit code, whatever has been killed since its start."""
        assert self.client is not None
        out, err = self.client.communicate(b"word\n", timeout=60)
        assert (self.client.returncode, out, err) == (23, b"word\n", b"")
        self.client = None

    def state(self, name: str) -> str:
        return (
            self.engine.ambi("inspect", "--format", "{{.State.Running}} {{.State.ExitCode}}", name).stdout.decode().strip()
        )

    def await_state(self, name: str, want: str) -> None:
        end = time.monotonic() + SWEPT_WITHIN_S
        while (now := self.state(name)) != want:
            assert time.monotonic() < end, f"{name} is {now!r}, not {want!r}"
            time.sleep(0.2)

    def terminal_echoes(self, word: str) -> None:
        self.terminal.sendline(word)
        self.terminal.expect_exact(word)  # the terminal's echo
        self.terminal.expect_exact(word)  # cat's answer

    def victim(self, kind: str) -> int:
        if kind == "engine":
            pid = self.engine.pid
            assert pid is not None
            return pid
        if kind == "zygote":
            return self.engine.zygote()
        if kind in ("worker", "nursery"):
            return self._worker(kind)
        name = "box" if kind == "shim" else "guest"
        shim = self.engine.shims()[self.ids[name]]
        return shim if kind != "vmm" else _descendant(shim, "qemu")

    def _worker(self, kind: str) -> int:
        """The process that parses the import, or the one below the engine that forked it; waits for both to appear."""
        end = time.monotonic() + 10
        while time.monotonic() < end:
            engine = self.engine.pid
            for pid in _children(engine) if engine else []:
                for worker in _children(pid) if pid != self.engine.zygote() else []:
                    return worker if kind == "worker" else pid
        pytest.fail("no worker was seen during the import")


def _children(pid: int) -> list[int]:
    found = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    except OSError:
        pass
    return found


def _descendant(pid: int, name: str) -> int:
    for child in _children(pid):
        if name in Path(f"/proc/{child}/comm").read_text():
            return child
        try:
            return _descendant(child, name)
        except AssertionError:
            continue
    raise AssertionError(f"no {name} below {pid}")


@pytest.mark.needs("qemu")
@pytest.mark.timeout(900)
def test_any_death_costs_what_the_table_says(
    new_engine: Callable[[], EngineUnderTest], busybox_tar: Path, tmp_path: Path
) -> None:
    before = census.take(MARK)
    engine = new_engine()
    engine.load_busybox(busybox_tar)
    die = random.Random(SEED)
    table = Table(engine, busybox_tar)
    table.terminal_echoes("ready")
    big = tmp_path / "big.tar"
    _big_tar(big)
    for number in range(ROUNDS):
        kind = VICTIMS[number % len(VICTIMS)] if number < len(VICTIMS) else die.choice(VICTIMS)
        table.renew()
        _round(table, kind, die, big)
        table.terminal_echoes(f"round{number}")
        if kind == "engine":
            table.end_client()
    if table.client is not None:
        table.end_client()
    table.terminal.close(force=True)
    engine.destroy()
    assert census.settle(MARK, before) == {}


def _round(table: Table, kind: str, die: random.Random, big: Path) -> None:
    engine = table.engine
    imported: list[subprocess.CompletedProcess[bytes]] = []
    importer = threading.Thread(target=lambda: imported.append(engine.docker("import", str(big), "big")))
    importer.start()
    if kind not in ("worker", "nursery"):
        time.sleep(die.uniform(0, 0.5))
    victim = table.victim(kind)
    os.kill(victim, signal.SIGKILL)
    importer.join()
    if kind in ("shim", "vmm", "vm-shim"):
        name, other = ("box", "guest") if kind == "shim" else ("guest", "box")
        table.await_state(name, "false 137")
        assert table.state(other) == "true 0", f"killing {kind} hit {other}"
    else:
        table.await_state("box", "true 0")  # asked through our client, which starts the engine again
        assert table.state("guest") == "true 0"
    if kind not in ("engine", "worker", "nursery"):
        assert imported[0].returncode == 0, imported[0].stderr.decode()
    if kind == "worker":
        assert imported[0].returncode != 0 and imported[0].stderr
    if kind == "nursery":  # its worker may just have answered
        assert imported[0].returncode == 0 or imported[0].stderr
    again = engine.docker("import", str(big), "big")
    assert again.returncode == 0, again.stderr.decode()
    run = engine.docker("run", "--rm", "--network", "none", "busybox", "echo", "alive")
    assert (run.returncode, run.stdout) == (0, b"alive\n"), run.stderr.decode()


def _big_tar(target: Path) -> None:
    """A root of 200 MB, so that an import takes long enough to be hit."""
    import io
    import tarfile

    block = os.urandom(1 << 20)
    with tarfile.open(target, "w") as tar:
        for number in range(200):
            entry = tarfile.TarInfo(f"data/{number}")
            entry.size = len(block)
            tar.addfile(entry, io.BytesIO(block))
