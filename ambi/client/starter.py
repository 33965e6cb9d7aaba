"""Starts the engine when nobody listens on its socket.

Where systemd runs and knows the unit, the unit is started; elsewhere the engine detaches itself from our session. Either
way it is the engine's lock that decides when several commands start one at the same time: the losers' engines end, and
their commands use the winner's.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from ambi.client.http import connect
from ambi.core.errors import AmbiError, Conflict, DeadlineExceeded, Forbidden, Unavailable
from ambi.core.roots import Roots

START_SECONDS = 60.0
PATIENCE_SECONDS = 1.0  # silence that needs no explanation
POLL_SECONDS = 0.05
RIVAL_SECONDS = 10.0  # how long an engine that another command has just started may take
UNIT = "ambi.service"
UNIT_FOLDERS = ("/etc/systemd/system", "/run/systemd/system", "/usr/local/lib/systemd/system", "/usr/lib/systemd/system")


def engine_argv(roots: Roots) -> list[str]:
    """The command that runs the engine of `roots`; `--detach` is for the caller to add."""
    named = ["--data-root", str(roots.data), "--run-root", str(roots.run), "--socket", str(roots.socket)]
    return [sys.executable, "-I", "-m", "ambi.engine", *named]


def listens(roots: Roots) -> bool:
    try:
        connect(roots.socket).close()
    except OSError:
        return False
    return True


def start(roots: Roots, report: Callable[[str], None]) -> None:
    """Start the engine of `roots` and return when its socket accepts connections.

    report: told in a few words what is awaited when that takes longer than a second.
    Raises Forbidden without root, Unavailable with the engine's own words, DeadlineExceeded.
    """
    if os.geteuid() != 0:
        raise Forbidden(f"no engine answers at {roots.socket}, and only root can start one", hint="sudo ambi engine start")
    argv = ["systemctl", "start", UNIT] if _has_unit(roots) else [*engine_argv(roots), "--detach"]
    output = os.memfd_create("engine-stderr")
    try:
        _wait_until_it_listens(roots, _spawn(argv, output), output, report)
    finally:
        os.close(output)


def _has_unit(roots: Roots) -> bool:
    if roots != Roots() or not os.path.isdir("/run/systemd/system"):
        return False
    return any(os.path.exists(f"{folder}/{UNIT}") for folder in UNIT_FOLDERS)


def _spawn(argv: list[str], output: int) -> int:
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0),
        (os.POSIX_SPAWN_DUP2, output, 2),
    ]
    try:
        return os.posix_spawnp(argv[0], argv, os.environ, file_actions=actions, setsid=True)
    except OSError as error:
        raise Unavailable(f"cannot start the engine: {argv[0]}: {error.strerror}", hint="ambi doctor") from error


def _wait_until_it_listens(roots: Roots, pid: int, output: int, report: Callable[[str], None]) -> None:
    begin = time.monotonic()
    reported, status = False, None
    while not listens(roots):
        if status is None:
            ended, code = os.waitpid(pid, os.WNOHANG)
            status = os.waitstatus_to_exitcode(code) if ended else None
        waited = time.monotonic() - begin
        if status and not listens(roots):
            error = _failure(os.pread(output, 64 << 10, 0).decode(errors="replace"), status)
            if not isinstance(error, Conflict) or waited > RIVAL_SECONDS:
                raise error
        if waited > START_SECONDS:
            raise DeadlineExceeded(
                f"the engine was started but does not answer at {roots.socket} after {START_SECONDS:.0f} s",
                hint=f"see {roots.data}/engine.log, or run `ambi engine run` to watch it",
            )
        if waited > PATIENCE_SECONDS and not reported:
            report(f"waiting for the engine at {roots.socket} to start")
            reported = True
        time.sleep(POLL_SECONDS)


def _failure(output: str, status: int) -> AmbiError:
    """What the engine said when it could not start, as an error of ours."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    message, hint = lines[-1] if lines else "", None  # of a traceback, the last line is the error
    for line in lines:
        if line.startswith("error: "):
            message = line.removeprefix("error: ")
        elif line.startswith("hint: "):
            hint = line.removeprefix("hint: ")
    kind = Conflict if message.startswith("another engine") else Unavailable
    cause = message or f"it ended with status {status} and said nothing"
    return kind(f"cannot start the engine: {cause}", hint=hint or "`ambi engine run` shows all that it says")
