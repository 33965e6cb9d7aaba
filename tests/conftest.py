"""What every test gets: declared needs, an account of skips, and a census of what was left behind.

`@pytest.mark.needs("root", "qemu", ...)` states what a test needs; unmet needs skip it. At the end every skip is listed with
its reason, and one that `allowed_skips.txt` does not allow on this kind of machine fails the run. What tests leave on the
machine fails it too.
"""

from __future__ import annotations

import fnmatch
import os
import secrets
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest

from tests import census
from tests.needs import NEEDS, machine_kind

HERE = Path(__file__).parent
_MAIN = os.getpid()
MARK = os.environ.setdefault(census.MARK_VARIABLE, secrets.token_hex(8))
_skips: list[tuple[str, str]] = []
_failures: dict[str, None] = {}  # node ids, in order
_leaks: dict[str, list[str]] = {}
FAILURES_VARIABLE = "AMBI_TEST_FAILURES"  # a file that gets the node ids of failed tests, for scripts/test


def pytest_configure(config: pytest.Config) -> None:
    signal.signal(signal.SIGTERM, _ended)
    config.addinivalue_line("markers", "needs(name, ...): what the test needs of this machine, see tests/needs.py")


def _ended(number: int, frame: FrameType | None) -> None:
    """scripts/test ends what runs beside a group that failed; like ctrl-c, it lets fixtures clear away."""
    if os.getpid() == _MAIN:
        raise KeyboardInterrupt
    signal.signal(number, signal.SIG_DFL)  # a child that a test has forked
    os.kill(os.getpid(), number)


def pytest_report_header() -> list[str]:
    met = [name for name, need in NEEDS.items() if need() is None]
    return [f"machine: {machine_kind()}", f"needs met: {', '.join(met) or 'none'}"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    unmet: dict[str, str | None] = {}
    for item in items:
        names = [name for mark in item.iter_markers("needs") for name in mark.args]
        folder = item.path.relative_to(HERE).parts[0] if HERE in item.path.parents else ""
        if folder in ("kernel", "vm", "cli", "conformance"):
            names.insert(0, "root")
        for name in names:
            if name not in unmet:
                unmet[name] = NEEDS[name]()
            if unmet[name]:
                item.add_marker(pytest.mark.skip(reason=f"needs {name}: {unmet[name]}"))
                break


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):
        _skips.append((report.nodeid, report.longrepr[2].removeprefix("Skipped: ")))
    if report.failed:
        _failures[report.nodeid] = None


def _allowed(nodeid: str) -> bool:
    kind = machine_kind()
    for line in (HERE / "allowed_skips.txt").read_text().splitlines():
        fields = line.split(None, 2)
        if fields and not line.startswith("#") and fields[0] in (kind, "any") and fnmatch.fnmatch(nodeid, fields[1]):
            return True
    return False


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _skips:
        return
    terminalreporter.section("skipped")
    for nodeid, reason in _skips:
        mark = "" if _allowed(nodeid) else "NOT ALLOWED HERE: "
        terminalreporter.line(f"{mark}{nodeid}: {reason}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if any(not _allowed(nodeid) for nodeid, _ in _skips) and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    elif (path := os.environ.get(FAILURES_VARIABLE)) and not _leaks:  # a leak is no matter of luck
        Path(path).write_text("".join(f"{nodeid}\n" for nodeid in _failures))


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fails the session when tests leave mounts, cgroups, links, loop devices, namespaces or processes of ours."""
    before = census.take(MARK)
    yield
    _leaks.update(census.settle(MARK, before))
    assert not _leaks, f"left behind by the tests: {_leaks}"


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A fresh directory with a short path on the same file system as /tmp; removed afterwards."""
    import shutil
    import tempfile

    path = Path(tempfile.mkdtemp(prefix=census.temporary_prefix(MARK), dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)
    assert not path.exists() or not any(path.iterdir()), f"{path} could not be removed"


@pytest.fixture(scope="session")
def busybox_tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small root file system, as a tar: static busybox with its links, a few users, and nothing else."""
    from tests.rootfs import busybox_tar as build

    return build(tmp_path_factory.mktemp("busybox") / "busybox.tar")


@pytest.fixture
def new_engine(short_tmp: Path) -> Iterator[Callable[..., object]]:
    """A factory of real engines with private roots; all are stopped and checked afterwards (see tests/harness.py)."""
    from tests.harness import EngineUnderTest

    engines: list[EngineUnderTest] = []

    def make(**options: str) -> EngineUnderTest:
        engine = EngineUnderTest(short_tmp / f"e{len(engines)}", **options)
        engines.append(engine)
        engine.start()
        return engine

    yield make
    for engine in engines:
        engine.destroy()


@pytest.fixture(params=["container", pytest.param("vm", marks=pytest.mark.needs("qemu"))])
def isolation(request: pytest.FixtureRequest) -> str:
    """Both kinds, for promises that are the same."""
    return str(request.param)
