"""What the engine makes of systemd's environment."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from ambi.engine import service


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("0::/system.slice/ambi.service\n", "ambi.service"),
        ("12:pids:/\n1:name=systemd:/system.slice/other.service\n0::/\n", "other.service"),
        ("12:memory:/system.slice/ambi.service\n0::/user.slice/session-1.scope\n", None),
        ("0::/\n", None),
    ],
)
def test_the_unit_is_systemds(text: str, unit: str | None) -> None:
    assert service.unit_of(text) == unit


def test_who_is_not_the_main_process_is_no_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/systemd/notify")
    monkeypatch.setenv("SYSTEMD_EXEC_PID", str(os.getppid()))
    assert service.taken() is None
    assert "NOTIFY_SOCKET" not in os.environ and "SYSTEMD_EXEC_PID" not in os.environ


@pytest.mark.parametrize("abstract", [False, True])
def test_states_are_datagrams(abstract: bool, tmp_path: Path) -> None:
    address = f"@ambi-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + address[1:] if abstract else address)
        listener.settimeout(10)
        service.Service("ambi.service", address).tell("READY=1")
        assert listener.recv(64) == b"READY=1"
    service.Service("ambi.service", address).tell("STOPPING=1")  # nobody listens
    service.Service("ambi.service", "").tell("READY=1")
