"""Request to reaped exit of a static /bin/true, without the API, against `runc run` and `crun run` on an equal bundle.

Usage: .venv/bin/python scripts/bench/start.py [--rounds N] [--json FILE]

One round runs each of them once, in turn; `gap 0` is back to back, `gap 0.1` sleeps a tenth of a second before each run,
after which the kernel's first cgroup migration waits for a grace period. Ours goes through the zygote: spawn, start, exit
event, everything removed; with all namespaces, overlay (of a container that is removed afterwards, so it does not sync its
upper), cgroups, default seccomp. runc and crun get the same config.json over the plain tree, so without the overlay.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ambi.core.model import InstanceId, Isolation  # noqa: E402
from ambi.core.plan import LAUNCH_FILE, LaunchPlan, Layer, Layers  # noqa: E402
from ambi.linux import mount, process, unix  # noqa: E402
from ambi.shim import launch  # noqa: E402
from tests import driverkit  # noqa: E402
from tests.rootfs import busybox_tar  # noqa: E402

GAPS = (0.0, 0.1)
WARM_UP = 3


class Ambi:
    """Our zygote in a run root of its own."""

    def __init__(self, base: Path, tree: Path) -> None:
        self._base, self._layer, self._count = base / "ambi", Layer("base", "dir", tree, 0), 0
        self._run_root = self._base / "run"
        self._run_root.mkdir(parents=True, mode=0o700)
        (self._run_root / "layers").mkdir()
        launch.ensure(self._run_root)
        self._zygote = unix.connect(self._run_root / launch.SOCKET, 30)

    def _plan(self) -> LaunchPlan:
        self._count += 1
        home = self._base / f"i{self._count}"
        for name in ("data", "run", "upper"):
            (home / name).mkdir(parents=True)
        config = driverkit.oci_config(["true"], annotations={"ambi.disposable": "1"})
        config["linux"]["cgroupsPath"] = f"/ambi/bench-{os.getpid()}-{self._count}"
        plan = LaunchPlan(
            id=InstanceId(f"{self._count:064x}"), isolation=Isolation.CONTAINER, config=config,
            rootfs=Layers((self._layer,), home / "upper"), data_dir=home / "data", run_dir=home / "run",
            layers_dir=self._run_root / "layers", guest_dir=home,
        )  # fmt: skip
        (plan.data_dir / LAUNCH_FILE).write_text(plan.to_json())
        return plan

    def once(self, gap: float) -> float:
        plan = self._plan()
        time.sleep(gap)
        begin = time.perf_counter()
        ours, theirs = unix.pair()
        spawn = {"op": "spawn", "seq": 1, "id": plan.id, "isolation": "container", "data_dir": str(plan.data_dir)}
        spawn |= {"run_dir": str(plan.run_dir), "run_root": str(self._run_root)}
        unix.send(self._zygote, spawn, [theirs.fileno()])
        theirs.close()
        unix.send(ours, {"op": "start", "seq": 1, "by_s": 30})
        answer = unix.receive(self._zygote)
        assert answer is not None and "ok" in answer.body, answer
        code = None
        while (message := unix.receive(ours)) is not None:  # the end of the connection: everything is removed
            assert "error" not in message.body, message.body
            if message.body.get("event") == "exit":
                code = message.body["exit"]["code"]
        took = time.perf_counter() - begin
        ours.close()
        assert code == 0, code
        return took

    def close(self) -> None:
        unix.send(self._zygote, {"op": "stop", "seq": 2})
        unix.receive(self._zygote)
        self._zygote.close()


class Runtime:
    """runc or crun, with a bundle over the plain tree."""

    def __init__(self, program: str, base: Path, tree: Path) -> None:
        self._program, self._bundle, self._count = program, base / program, 0
        self._bundle.mkdir()
        config = driverkit.oci_config(["true"])
        config["root"]["path"] = str(tree)
        config["linux"]["cgroupsPath"] = f"/ambi-bench-{program}"
        (self._bundle / "config.json").write_text(json.dumps(config))
        self._state = base / f"{program}-state"

    def once(self, gap: float) -> float:
        self._count += 1
        argv = [self._program, "--root", str(self._state), "run", "--bundle", str(self._bundle), f"bench{self._count}"]
        time.sleep(gap)
        begin = time.perf_counter()
        subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        return time.perf_counter() - begin


def hide_unified() -> None:
    """On a hybrid host, go on in a mount namespace without the empty version 2 tree: crun refuses to see both."""
    process.unshare(process.CLONE_NEWNS)
    mount.mount(None, "/", None, mount.MS_SLAVE | mount.MS_REC)
    unified = Path("/sys/fs/cgroup/unified")
    if unified.is_mount():
        mount.umount(unified)


def usable(once: Callable[[float], float]) -> bool:
    """Some runtimes refuse some hosts."""
    try:
        once(0)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def summary(taken: list[float]) -> dict[str, float]:
    ordered = sorted(taken)
    return {"median": statistics.median(ordered), "min": ordered[0], "p90": ordered[len(ordered) * 9 // 10]}


def measure(subjects: dict[str, Callable[[float], float]], rounds: int) -> dict[str, Any]:
    """All subjects in turn, `rounds` times for each gap; milliseconds."""
    result: dict[str, Any] = {}
    for gap in GAPS:
        times: dict[str, list[float]] = {name: [] for name in subjects}
        for number in range(rounds + WARM_UP):
            for name, once in subjects.items():
                took = once(gap) * 1000
                if number >= WARM_UP:
                    times[name].append(took)
        row = {
            name: {"median": statistics.median(t), "min": min(t), "p90": sorted(t)[len(t) * 9 // 10]}
            for name, t in times.items()
        }
        for figures in row.values():
            if "runc" in row:
                figures["ratio to runc"] = figures["median"] / row["runc"]["median"]
        result[f"gap {gap:g}"] = row
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    hide_unified()
    base = Path(tempfile.mkdtemp(prefix="ambi-bench-", dir="/tmp"))
    ambi = None
    try:
        tree = driverkit.unpack(busybox_tar(base / "busybox.tar"), base / "tree")
        ambi = Ambi(base, tree)
        subjects: dict[str, Callable[[float], float]] = {"ambi": ambi.once}
        for program in ("runc", "crun"):
            if shutil.which(program) and usable(once := Runtime(program, base, tree).once):
                subjects[program] = once
        result = measure(subjects, options.rounds)
    finally:
        if ambi is not None:
            ambi.close()
        shutil.rmtree(base, ignore_errors=True)
    for gap, row in result.items():
        for name, figures in row.items():
            print(f"{gap:8} {name:5} " + "  ".join(f"{key} {value:6.2f}" for key, value in figures.items()))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
