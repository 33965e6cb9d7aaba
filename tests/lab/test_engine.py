"""The whole way on pure cgroup v2 with KVM: one image through the command line, as a container and as a VM."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.test_real_engine import OnDemand

SCRIPT = "cat /etc/passwd; id; pwd; echo $A; read x; echo got $x; echo error >&2; exit 42"
RUN = ("run", "--rm", "-i", "-e", "A=b", "-u", "alice", "-w", "/made/here", "bb", "sh", "-c", SCRIPT)


MORE_KIB = 16 << 10  # 15.5 MiB are the PSS of a monitor and its shim where there are two


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
    """By how much the PSS of all our processes grows, without the memory of guests: by a shim and a monitor."""
    totals = []
    for name in ("one", "more"):
        engine.ok("run", "-d", "--isolation", "vm", "--name", name, "bb", "sleep", "100000")
        sizes = [pss(pid) for pid in ours()]
        totals.append((sum(guest for guest, _ in sizes), sum(rest for _, rest in sizes)))
    guest, rest = (after - before for before, after in zip(*totals, strict=True))
    print(f"one more VM: {guest / 1024:.1f} MiB of the guest's, {rest / 1024:.1f} MiB beside them")
    assert guest > 0 and rest < MORE_KIB
    engine.ok("rm", "-f", "one", "more")


def ours() -> Iterator[int]:
    for home in Path("/proc").glob("[0-9]*"):
        try:
            name = (home / "comm").read_text()
        except OSError:
            continue
        if name.startswith("ambi"):
            yield int(home.name)


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
