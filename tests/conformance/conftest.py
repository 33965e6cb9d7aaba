"""Every body of this folder runs over every driver of the shim's table; a driver without a result for one fails the run."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ambi.shim.drivers import TABLE
from tests import driverkit, needs
from tests.harness import guest_dir

FORMS = {"container": ("dir", "erofs"), "vm": ("erofs",)}  # of the layers that each driver takes
NEEDED = {"vm": ("qemu",)}
_results: dict[str, set[str]] = {}


def _variants() -> list[Any]:
    found = []
    for name in TABLE:
        marks = [pytest.mark.needs(*NEEDED[name])] if name in NEEDED else []
        found += [pytest.param((name, form), id=f"{name}-{form}", marks=marks) for form in FORMS[name]]
    return found


@pytest.fixture(scope="session", params=_variants())
def variant(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(driver, form of its layers)"""
    found: tuple[str, str] = request.param
    return found


@pytest.fixture(scope="session")
def rig(variant: tuple[str, str], busybox_tar: Path) -> Iterator[driverkit.Rig]:
    name, form = variant
    base = Path(tempfile.mkdtemp(prefix="ambi-", dir="/tmp"))
    tree = driverkit.unpack(busybox_tar, base / "tree")
    layer = driverkit.make_layer(tree, form, base / "base.erofs")
    with driverkit.layers_namespace():
        yield driverkit.Rig(name, base, (layer,), guest_dir() if name == "vm" else base / "guest")
    shutil.rmtree(base)


@pytest.fixture(scope="session")
def idle(rig: driverkit.Rig) -> Iterator[driverkit.Running]:
    """A workload that sleeps, shared by the tests that only run programs beside it."""
    with rig.started(["sleep", "100000"], hostname="idle") as running:
        yield running


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    body, bracket, rest = report.nodeid.partition("[")
    if report.when == "call" and bracket and "tests/conformance/" in body:
        _results.setdefault(body, set()).add(rest.split("-")[0].rstrip("]"))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A driver that can run here, but has no result for a body that another one has a result for, fails the run."""
    able = {name for name in TABLE if all(needs.NEEDS[need]() is None for need in ("root", *NEEDED.get(name, ())))}
    chosen = any(a.startswith("-k") or "::" in a for a in session.config.invocation_params.args)
    if session.config.option.keyword or chosen or session.config.option.collectonly:
        return
    missing = {body: able - seen for body, seen in _results.items() if able - seen}
    if missing and session.exitstatus == 0:
        for body, names in missing.items():
            print(f"\n{body}: no result of {', '.join(sorted(names))}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
