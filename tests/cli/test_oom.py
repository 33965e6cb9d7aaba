"""What a workload that takes more memory than it may looks like from outside, of both kinds."""

from __future__ import annotations

import json

from tests.cli.test_real_engine import OnDemand, engine, isolation, name  # noqa: F401  fixtures

HOG = "x=a; while :; do x=$x$x$x; done"


def test_out_of_memory(engine: OnDemand, isolation: str, name: str) -> None:  # noqa: F811
    limit = ["--memory", "16m", "--memory-swap", "16m"]
    done = engine.ambi("run", "--isolation", isolation, "--name", name, *limit, "bb", "sh", "-c", HOG)
    assert done.returncode == 137
    assert engine.ok("inspect", "-f", "{{.State.OOMKilled}} {{.State.ExitCode}}", name) == "true 137\n"
    told = engine.ok("events", "--filter", f"container={name}", "--since", "0", "--until", "0s", "--format", "json")
    actions = [json.loads(line)["Action"] for line in told.splitlines()]
    assert [action for action in actions if action in ("oom", "die")] == ["oom", "die"]
