"""The engine against Debian's dockerd, the docker CLI as the client of both, pairs in turn, in one run.

Usage: .venv/bin/python scripts/bench/engine.py [--rounds N] [--pause SECONDS] [--json FILE]

Rows: `docker run --rm --network none IMAGE true` and `docker exec C true` end to end and as the engine's own time (the same
requests made by a small client over one connection, from the first byte of the first request to the last byte of the last
answer), and `GET /containers/json`. Then the memory of one idle shim with 50 running, of the engine, of dockerd.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.harness import EngineUnderTest  # noqa: E402
from tests.peers import Dockerd  # noqa: E402
from tests.rawclient import RawClient  # noqa: E402
from tests.rootfs import busybox_tar  # noqa: E402

CONFIG = {
    "Image": "busybox",
    "Cmd": ["true"],
    "HostConfig": {"NetworkMode": "none"},
    "AttachStdout": True,
    "AttachStderr": True,
}


class Subject(Protocol):
    socket: Path

    def docker(self, *args: str) -> subprocess.CompletedProcess[bytes]: ...


def cli_run(subject: Subject) -> float:
    begin = time.perf_counter()
    done = subject.docker("run", "--rm", "--network", "none", "busybox", "true")
    took = time.perf_counter() - begin
    assert done.returncode == 0, done.stderr
    return took


def cli_exec(subject: Subject) -> float:
    begin = time.perf_counter()
    done = subject.docker("exec", "idle", "true")
    took = time.perf_counter() - begin
    assert done.returncode == 0, done.stderr
    return took


def api_run(subject: Subject) -> float:
    """What `docker run --rm` asks: create, attach, wait for the removal, start; until the removal is answered."""
    control, attached, waiter = (RawClient(subject.socket) for _ in range(3))
    begin = time.perf_counter()
    status, made = control.call(
        "POST", "/containers/create", {**CONFIG, "HostConfig": {"NetworkMode": "none", "AutoRemove": True}}
    )
    assert status == 201, made
    attached.hijack(f"/containers/{made['Id']}/attach?stream=1&stdout=1&stderr=1")
    waiter.send("POST", f"/containers/{made['Id']}/wait?condition=removed")
    _, headers = waiter.head()
    status, answer = control.call("POST", f"/containers/{made['Id']}/start")
    assert status == 204, answer
    attached.frames()
    waiter.body(headers)
    took = time.perf_counter() - begin
    for client in (control, attached, waiter):
        client.close()
    return took


def api_exec(subject: Subject) -> float:
    control, attached = RawClient(subject.socket), RawClient(subject.socket)
    begin = time.perf_counter()
    body = {"Cmd": ["true"], "AttachStdout": True, "AttachStderr": True}
    status, made = control.call("POST", "/containers/idle/exec", body)
    assert status == 201, made
    attached.hijack(f"/exec/{made['Id']}/start", {"Detach": False, "Tty": False})
    attached.frames()
    _, state = control.call("GET", f"/exec/{made['Id']}/json")
    took = time.perf_counter() - begin
    assert state["ExitCode"] == 0, state
    control.close()
    attached.close()
    return took


def api_list(subject: Subject) -> float:
    client = RawClient(subject.socket)
    client.call("GET", "/_ping")
    begin = time.perf_counter()
    status, _ = client.call("GET", "/containers/json")
    took = time.perf_counter() - begin
    assert status == 200
    client.close()
    return took


ROWS: tuple[tuple[str, Callable[[Subject], float], float | None], ...] = (
    ("docker run --rm --network none IMAGE true", cli_run, 1 / 4),
    ("the same, engine's own time", api_run, 1 / 8),
    ("docker exec C true", cli_exec, 1 / 2),
    ("the same, engine's own time", api_exec, 1 / 5),
    ("docker ps, engine's own time", api_list, 1.0),
)


def pss_bytes(pid: int) -> int:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")) * 1024


@contextlib.contextmanager
def ours(base: Path) -> Iterator[EngineUnderTest]:
    engine = EngineUnderTest(base)
    try:
        engine.start(vm=False)
        yield engine
    finally:
        engine.destroy()


def memory_rows(engine: EngineUnderTest, peer: Dockerd) -> dict[str, float]:
    """MiB of PSS with 50 idle containers."""
    names = [f"m{n}" for n in range(50)]
    for name in names:
        assert engine.docker("run", "-d", "--network", "none", "--name", name, "busybox", "sleep", "600").returncode == 0
    shims = [json.loads(path.read_text())["pid"] for path in engine.run.glob("instances/*/shim.json")]
    assert engine.process is not None
    rows = {
        "shim, mean of 50": statistics.mean(pss_bytes(pid) for pid in shims) / 2**20,
        "engine": pss_bytes(engine.process.pid) / 2**20,
    }
    daemons = [pid for pid in peer.pids() if "shim" not in Path(f"/proc/{pid}/comm").read_text()]
    rows["dockerd and its containerd"] = sum(pss_bytes(pid) for pid in daemons) / 2**20
    engine.docker("rm", "-f", *names)
    return rows


def main() -> None:
    def rested(measure: Callable[[Subject], float], subject: Subject) -> float:
        time.sleep(options.pause)
        return measure(subject)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--pause", type=float, default=0.1, help="seconds before each measurement; both go on after answering"
    )
    options = parser.parse_args()
    samples: dict[str, tuple[list[float], list[float]]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as name,
        Dockerd() as peer,
        ours(Path(name) / "e") as engine,
    ):
        tar = busybox_tar(Path(name) / "busybox.tar")
        for subject in (engine, peer):
            assert subject.docker("import", str(tar), "busybox").returncode == 0
            assert (
                subject.docker("run", "-d", "--network", "none", "--name", "idle", "busybox", "sleep", "3600").returncode
                == 0
            )
        print(f"{'':44}{'ambi ms':>20}{'dockerd ms':>20}{'ratio':>8}{'goal':>7}")
        for number, (title, measure, goal) in enumerate(ROWS):
            measure(engine), measure(peer)  # warm
            pairs = [(rested(measure, engine), rested(measure, peer)) for _ in range(options.rounds)]
            mine, theirs = [a for a, _ in pairs], [b for _, b in pairs]
            samples[f"{number} {title}"] = (mine, theirs)
            ratio = statistics.median(a / b for a, b in pairs)
            cells = [f"{statistics.median(x) * 1000:.1f} ({min(x) * 1000:.1f})" for x in (mine, theirs)]
            print(f"{title:44}{cells[0]:>20}{cells[1]:>20}{ratio:8.2f}{goal or 0:7.2f}", flush=True)
        memory = memory_rows(engine, peer)
        for title, mib in memory.items():
            print(f"PSS {title:40}{mib:14.1f} MiB")
    print("median (minimum); ratio: median of the pairs' ratios")
    if options.json:
        options.json.write_text(json.dumps({"seconds": samples, "pss_mib": memory}))


if __name__ == "__main__":
    main()
