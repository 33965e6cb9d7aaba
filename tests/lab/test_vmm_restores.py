"""Many copies of one template, in a row and at once: each answers, with the time, the address, the disks that are its own.

`AMBI_RESTORES=200,20` in the environment: so many in a row, and so many at once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ambi.core.plan import LaunchPlan, Layers
from hyper import backends, boot_files
from hyper.vm import template
from tests import driverkit, netkit
from tests.harness import guest_dir

SERIES, AT_ONCE = (int(number) for number in os.environ.get("AMBI_RESTORES", "8,3").split(","))
WHICH = ("even", "odd")
CLOCK_S = 0.1
FIRST_S = 300
SCRIPT = """
set -e
cat /which
[ ! -e /mine ]; echo > /mine
ip -4 addr show dev eth0 | sed -n 's/.*inet \\([0-9.]*\\).*/\\1/p'
ping -c 1 -w 30 $gateway > /dev/null
head -c 16 /dev/urandom | md5sum
while read x; do adjtimex | sed -n 's/.*time.tv_u*sec: *//p' | tr '\\n' ' '; echo; done
"""


class Copies:
    """Starts copies whose networks and disks differ, and looks at what each has."""

    def __init__(self, base: Path, busybox_tar: Path, stack: ExitStack) -> None:
        tree = driverkit.unpack(busybox_tar, base / "tree")
        self._layers = []
        for which in WHICH:
            (tree / "which").write_text(f"{which}\n")
            self._layers.append(driverkit.make_layer(tree, "erofs", base / f"{which}.erofs", which))
        files = boot_files.find(guest_dir())
        (base / "guest").mkdir()
        (base / "guest" / files.release).symlink_to(files.kernel.parent)
        self.rig = driverkit.Rig("vm", base, (self._layers[0],), base / "guest")
        self._lab = stack.enter_context(netkit.Lab())
        self._network = netkit.network("10.78.0.0/22")

    def plan(self, number: int) -> tuple[LaunchPlan, list[bytes]]:
        """And what its process is to say, but for what is drawn at random and the time."""
        place = self._lab.instance(self._network)
        address = place.nic.addresses[0]
        plan = self.rig.plan(
            ["sh", "-c", SCRIPT], stdin=True, annotations={"ambi.disposable": "1"},
            env=["PATH=/usr/bin:/bin", f"gateway={address.gateway}"],
        )  # fmt: skip
        for entry in plan.config["linux"]["namespaces"]:
            if entry["type"] == "network":
                entry["path"] = f"/proc/{os.getpid()}/fd/{place.fd}"
        assert isinstance(plan.rootfs, Layers)
        plan = plan._replace(rootfs=plan.rootfs._replace(lowers=(self._layers[number % 2],)))
        return plan, [WHICH[number % 2].encode(), address.address.encode()]

    def check(self, running: driverkit.Running, expected: list[bytes]) -> bytes:
        """What it drew at random; AssertionError when something is not its own."""
        init = running.init
        assert running.created.inspect()["started"] == "template"  # type: ignore[attr-defined]
        init.until(lambda: init.out.count(b"\n") == 3 or init.exits, FIRST_S)
        said = init.out.splitlines()
        assert said[:2] == expected, (said, init.exits)
        begun = time.time()
        init.write(b"now\n")
        init.until(lambda: init.out.count(b"\n") == 4, FIRST_S)
        ended = time.time()
        init.close_stdin()
        seconds, micros = init.out.splitlines()[3].split()
        clock = int(seconds) + int(micros) / 1e6
        assert begun - CLOCK_S <= clock <= ended + CLOCK_S, f"the clock: {begun}, {clock}, {ended}"
        return said[2]


@pytest.fixture(scope="module")
def copies(busybox_tar: Path) -> Iterator[Copies]:
    base = Path(tempfile.mkdtemp(prefix="ambi-", dir="/tmp"))
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setenv(backends.CHOICE, backends.OURS)
        made = Copies(base, busybox_tar, stack)
        plan, expected = made.plan(0)
        with made.rig.started_plan(plan) as running:  # makes the template
            made.check(running, expected)
        yield made
    shutil.rmtree(base)


def monitors() -> list[int]:
    done = subprocess.run(["pgrep", "-x", "ambi-vmm"], capture_output=True, text=True, check=False)
    return [int(word) for word in done.stdout.split()]


@pytest.mark.timeout(60 + 30 * SERIES)
def test_in_a_row(copies: Copies) -> None:
    drawn = set()
    for number in range(SERIES):
        plan, expected = copies.plan(number)
        opened = os.listdir("/proc/self/fd")
        with copies.rig.started_plan(plan) as running:
            drawn.add(copies.check(running, expected))
        assert os.listdir("/proc/self/fd") == opened
    assert len(drawn) == SERIES and monitors() == []
    assert len(list((copies.rig.guest_dir / template.DIRECTORY).glob("*/manifest.json"))) == 1


@pytest.mark.timeout(60 + 60 * AT_ONCE)
def test_at_once(copies: Copies) -> None:
    """All are there before the first ends."""
    told, tell = os.pipe()
    wait, go = os.pipe()
    pids = []
    for number in range(AT_ONCE):
        plan, expected = copies.plan(number)
        pids.append(os.fork())
        if pids[-1] == 0:
            os.close(go)
            _child(copies, plan, expected, tell, wait)
    os.close(tell)
    drawn = b""
    while len(drawn) < 33 * AT_ONCE and (data := os.read(told, 4096)):
        drawn += data
    alive = len(monitors())
    os.close(go)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [7] * AT_ONCE
    assert len(set(drawn.split())) == AT_ONCE == alive and monitors() == []
    for fd in (told, wait):
        os.close(fd)


def _child(copies: Copies, plan: LaunchPlan, expected: list[bytes], tell: int, wait: int) -> None:
    code = 8
    try:
        with copies.rig.started_plan(plan) as running:
            os.write(tell, copies.check(running, expected)[:32] + b"\n")
            os.close(tell)
            os.read(wait, 1)
            code = 7
    except BaseException as error:
        os.write(2, f"{error!r}\n".encode())
    finally:
        os._exit(code)
