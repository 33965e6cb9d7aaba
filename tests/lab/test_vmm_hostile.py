"""A guest's kernel that turns on its devices (hostile/hostile.c): its VM is limited or dead, and nobody else notices."""

from __future__ import annotations

import json
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hyper.guest.protocol import Type, encode
from tests.cli.test_real_engine import OnDemand
from tests.harness import ROOT

MODULE = ROOT / "build" / "hostile.ko"
GUEST_MIB, MONITOR_MIB, SHIM_MIB = 128, 64, 64
PATIENCE_S = 150  # a bound against hanging for ever, not a measure
AGENT_QUEUE = 5  # from the guest, of the console in slot 0


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, busybox_tar: Path) -> Iterator[OnDemand]:
    assert MODULE.exists(), "python -m tests.lab.hostile.build GUEST_DIR build/hostile.ko, and --put it into the lab"
    it = OnDemand(tmp_path_factory.mktemp("hostile"))
    it.start()
    with tarfile.open(busybox_tar, "a") as tar:
        tar.add(MODULE, "hostile.ko")
    it.ok("import", str(busybox_tar), "bb")
    it.ok("run", "-d", "--isolation", "vm", "--memory", f"{GUEST_MIB}m", "--name", "peaceful", "bb", "sleep", "100000")
    yield it
    it.destroy()


@pytest.fixture
def others(engine: OnDemand) -> Iterator[None]:
    """What must not notice: the engine, the shims, another VM."""
    before = engine.pid, processes("ambi")
    yield
    assert engine.ok("exec", "peaceful", "echo", "here") == "here\n"
    engine.ok("rm", "-f", "hostile")
    assert (engine.pid, processes("ambi")) == before


def processes(name: str) -> dict[int, str]:
    """Those with such a name, by number."""
    found = {}
    for home in Path("/proc").glob("[0-9]*"):
        try:
            comm = (home / "comm").read_text().strip()
        except OSError:
            continue
        if comm.startswith(name):
            found[int(home.name)] = comm
    return found


def attack(engine: OnDemand, *words: str) -> None:
    """A VM whose workload loads the module with these words, and then says so: by a shell that no longer needs its disk."""
    script = f"cat /bin/busybox > /dev/null; insmod /hostile.ko {' '.join(words)}; echo $?; sleep 1000"
    engine.ok(
        "run", "-d", "--isolation", "vm", "--memory", f"{GUEST_MIB}m", "--name", "hostile", "--cap-add", "SYS_MODULE",
        "--security-opt", "seccomp=unconfined", "bb", "sh", "-c", script,
    )  # fmt: skip


def state(engine: OnDemand) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(engine.ok("inspect", "hostile"))[0]["State"]
    return found


def await_(engine: OnDemand, happened: Any) -> None:
    end = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < end, (state(engine), engine.ok("logs", "hostile"))
        time.sleep(0.5)


def assert_bounded() -> None:
    """The most that any of ours has had in memory, by the kernel's own high-water marks."""
    for pid, name in processes("ambi").items():
        lines = (line.split(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        most = int(dict(lines)["VmHWM"].split()[0]) >> 10
        assert most < (GUEST_MIB + MONITOR_MIB if name == "ambi-vmm" else SHIM_MIB), (name, most)


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "what,count", [("loops", 3), ("outside", 2), ("resets", 20), ("jumps", 5), ("registers", 5)], ids=str
)
def test_devices(engine: OnDemand, others: None, what: str, count: int) -> None:
    """All devices but the agent's: the guest loses its disks and NICs, and its agent says how the attack ended."""
    attack(engine, f"what={what}", "slot=-1", f"count={count}")
    await_(engine, lambda: engine.ok("logs", "hostile") or not state(engine)["Running"])
    assert engine.ok("logs", "hostile") == "0\n" and state(engine)["Running"]
    assert_bounded()


@pytest.mark.timeout(400)
def test_garbage_on_the_agents_channel(engine: OnDemand, others: None) -> None:
    attack(engine, "what=flood", "slot=0", f"queue={AGENT_QUEUE}", "count=1000", "bytes=ff")
    await_(engine, lambda: not state(engine)["Running"])
    found = state(engine)
    assert found["ExitCode"] == 137
    assert "the guest" in found["Error"]
    assert_bounded()


@pytest.mark.timeout(400)
def test_a_flood_of_good_messages(engine: OnDemand, others: None) -> None:
    """60 MB of lines for the log of the VM: it goes on, and what is kept of them is bounded."""
    line = encode(Type.LOG, 0, ((1, "a line of the guest's own"),)).hex()
    attack(engine, "what=flood", "slot=0", f"queue={AGENT_QUEUE}", "count=500", f"bytes={line}")
    before = time.monotonic()
    while time.monotonic() < before + 15 and state(engine)["Running"]:
        time.sleep(1)
    assert_bounded()
