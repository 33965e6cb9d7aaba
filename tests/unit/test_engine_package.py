"""The unit file that ships with the engine."""

import configparser
from pathlib import Path

from ambi.core.roots import DEFAULT_DATA_ROOT, DEFAULT_RUN_ROOT, DEFAULT_SOCKET

UNIT = Path(__file__).parents[2] / "scripts" / "package" / "ambi.service"


def test_a_stop_of_the_service_ends_the_engine_alone() -> None:
    unit = configparser.ConfigParser(interpolation=None, strict=True)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(UNIT)
    service = unit["Service"]
    assert service["KillMode"] == "process" and service["Delegate"] == "yes"
    assert service["RuntimeDirectoryPreserve"] == "yes"  # else a stop removes the sockets of living shims
    words = service["ExecStart"].split()
    assert words[1:] == [
        "engine",
        "--data-root", str(DEFAULT_DATA_ROOT), "--run-root", str(DEFAULT_RUN_ROOT), "--socket", str(DEFAULT_SOCKET),
    ]  # fmt: skip
