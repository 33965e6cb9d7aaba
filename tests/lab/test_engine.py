"""The whole way on pure cgroup v2 with KVM: one image through the command line, as a container and as a VM."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.test_real_engine import OnDemand

SCRIPT = "cat /etc/passwd; id; pwd; echo $A; read x; echo got $x; echo error >&2; exit 42"
RUN = ("run", "--rm", "-i", "-e", "A=b", "-u", "alice", "-w", "/made/here", "bb", "sh", "-c", SCRIPT)


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


def test_doctor_finds_what_is_here(engine: OnDemand) -> None:
    said = engine.ambi("doctor").stdout.decode()
    assert "kvm" in said.lower() and "v2" in said
