"""What one idle shim costs in memory beyond what it shares with the zygote and the other shims."""

from collections.abc import Callable
from pathlib import Path

from tests.harness import EngineUnderTest

MOST_PRIVATE_KIB = 5 << 10  # 3.6 MiB measured; nearly all are pages that reference counts have parted from the zygote's


def private_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Dirty:", "Private_Clean:")))


def test_an_idle_shim_keeps_to_its_budget(new_engine: Callable[..., EngineUnderTest], busybox_tar: Path) -> None:
    engine = new_engine()
    engine.load_busybox(busybox_tar)
    for name in ("one", "two"):
        done = engine.docker("run", "-d", "--name", name, "--network", "none", "busybox", "sleep", "600")
        assert done.returncode == 0, done.stderr
    for pid in engine.shims().values():
        assert 0 < private_kib(pid) < MOST_PRIVATE_KIB
    assert engine.docker("exec", "one", "true").returncode == 0
    assert all(private_kib(pid) < MOST_PRIVATE_KIB for pid in engine.shims().values()), "an exec leaves memory behind"
