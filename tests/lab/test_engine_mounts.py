"""`ambi volume attach` and `detach` of a VM of our own monitor, which has neither a bind nor a disk to begin with."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.test_real_engine import OnDemand


def targets(engine: OnDemand) -> set[str]:
    return {point["Destination"] for point in json.loads(engine.ok("inspect", "vm"))[0]["Mounts"]}


def test_disks_and_trees_come_and_go(engine: OnDemand, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("of the host\n")
    engine.ok("volume", "create", "-o", "type=disk", "-o", "size=64m", "disk")
    engine.ok("run", "-d", "--isolation", "vm", "--name", "vm", "--network", "none", "bb", "sleep", "1000")
    engine.ok("volume", "attach", "vm", "disk:/disk")
    engine.ok("volume", "attach", "vm", f"{tmp_path}:/tree:ro")
    assert targets(engine) == {"/disk", "/tree"}
    script = "cat /tree/file && ! touch /tree/no && echo on the disk > /disk/x"
    assert engine.ok("exec", "vm", "sh", "-c", script) == "of the host\n"
    done = engine.ambi("volume", "attach", "vm", "disk:/again")
    assert done.returncode and b"one virtual machine at a time" in done.stderr
    for target in ("/disk", "/tree"):
        engine.ok("volume", "detach", "vm", target)
    assert targets(engine) == set()
    engine.ok("volume", "attach", "vm", "disk:/disk:ro")
    script = "cat /disk/x && ! touch /disk/no && ls /tree"
    assert engine.ok("exec", "vm", "sh", "-c", script) == "on the disk\n"
    engine.ok("rm", "-f", "vm")
    engine.ok("volume", "rm", "disk")
