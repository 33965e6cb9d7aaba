"""The whole way on pure cgroup v2 with KVM: one image through the command line, as a container and as a VM."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.test_real_engine import OnDemand

SCRIPT = "cat /etc/passwd; id; pwd; echo $A; read x; echo got $x; echo error >&2; exit 42"
RUN = ("run", "--rm", "-i", "-e", "A=b", "-u", "alice", "-w", "/made/here", "bb", "sh", "-c", SCRIPT)


MORE_KIB = 8 << 10


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, busybox_tar: Path) -> Iterator[OnDemand]:
    it = OnDemand(tmp_path_factory.mktemp("lab"))
    it.start()
    it.ok("import", str(busybox_tar), "bb")
    yield it
    it.destroy()


def test_one_image_both_ways(engine: OnDemand) -> None:
    found = {}
    for isolation in ("container", "vm"):
        done = engine.ambi(RUN[0], "--isolation", isolation, *RUN[1:], input=b"a line\n")
        found[isolation] = (done.returncode, done.stdout, done.stderr)
    assert found["container"] == found["vm"]
    code, out, err = found["vm"]
    assert (code, err) == (42, b"error\n")
    assert out.endswith(b"/made/here\nb\ngot a line\n") and b"uid=1000(alice)" in out


@pytest.mark.parametrize("isolation", ["container", "vm"])
def test_a_life(engine: OnDemand, isolation: str) -> None:
    """Detached, exec, limits in figures, stop by signal, logs, remove."""
    engine.ok("run", "-d", "--isolation", isolation, "--name", isolation, "--memory", "128m", "bb",
              "sh", "-c", "trap 'echo bye; exit 5' TERM; echo hello; while :; do sleep 0.2; done")  # fmt: skip
    done = engine.ambi("exec", isolation, "sh", "-c", "uname -s; exit 3")
    assert (done.returncode, done.stdout) == (3, b"Linux\n")
    engine.ok("stop", isolation)
    assert engine.ok("wait", isolation) == "5\n"
    assert engine.ok("logs", isolation) == "hello\nbye\n"
    engine.ok("rm", isolation)


def test_one_more_idle_vm_costs_little_beside_its_own_pages(engine: OnDemand) -> None:
    """PSS of monitor and shim, of what is not the guest's memory: the second of two copies of a template."""
    for name in ("one", "more"):
        engine.ok("run", "-d", "--isolation", "vm", "--name", name, "bb", "sleep", "100000")
        assert json.loads(engine.ok("inspect", name))[0]["State"]["Running"]
    monitor = max(pid for pid, name in ours() if name == "ambi-vmm")
    shim = int(Path(f"/proc/{monitor}/stat").read_text().rpartition(")")[2].split()[1])
    guest, rest = pss(monitor)
    rest += sum(pss(shim))
    print(f"one more VM: {guest / 1024:.1f} MiB of the guest's, {rest / 1024:.1f} MiB beside them (monitor and shim)")
    assert guest > 0 and rest < MORE_KIB
    engine.ok("rm", "-f", "one", "more")


def ours() -> Iterator[tuple[int, str]]:
    for home in Path("/proc").glob("[0-9]*"):
        try:
            name = (home / "comm").read_text().strip()
        except OSError:
            continue
        if name.startswith("ambi"):
            yield int(home.name), name


def pss(pid: int) -> tuple[int, int]:
    """KiB of the memory of a guest that is a copy of a template, and of all the rest of the process."""
    guest = rest = 0
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if line[0] in "0123456789abcdef":
            inside = line.endswith("/memory") and "/templates/" in line
        elif line.startswith("Pss:"):
            guest, rest = (guest + int(line.split()[1]), rest) if inside else (guest, rest + int(line.split()[1]))
    return guest, rest


def test_doctor_finds_what_is_here(engine: OnDemand) -> None:
    said = engine.ambi("doctor").stdout.decode()
    assert "kvm" in said.lower() and "v2" in said
