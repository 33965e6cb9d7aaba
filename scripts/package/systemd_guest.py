"""The checks of check_systemd.py, inside its machine: each prints a line, the first that fails ends them.

The first boot makes instances and treats the unit as administrators and accidents do; the second looks for what is back.
"""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
SOCKET = Path("/run/ambi/ambi.sock")
MARK = Path("/var/lib/check-first-boot")
MEMORY_BYTES = 64 << 20
SECONDS = 180.0


def run(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=SECONDS * 2, check=False)
    assert done.returncode == 0, f"{' '.join(argv)} ended with {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


def until(what: str, holds: Callable[[], object]) -> None:
    end = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < end, f"not within {SECONDS:.0f} s: {what}"
        time.sleep(0.2)


def shown(name: str, template: str) -> str:
    return run("ambi", "inspect", "-f", template, name)


def pid_of(name: str) -> int:
    return int(shown(name, "{{.State.Pid}}"))


def of_unit(key: str) -> str:
    return run("systemctl", "show", "-P", key, "ambi.service")


def alive(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


def cgroup_of(pid: int | str) -> str:
    return Path(f"/proc/{pid}/cgroup").read_text().strip().removeprefix("0::")


def same_instance(pid: int) -> None:
    """`web` is the one it was, a new engine knows it, and its limit holds."""
    assert shown("web", "{{.State.Running}}") == "true" and pid_of("web") == pid
    assert run("ambi", "exec", "web", "echo", "still") == "still"
    limit = (CGROUPS / cgroup_of(pid).lstrip("/") / "memory.max").read_text().strip()
    assert limit == str(MEMORY_BYTES), limit


def starting() -> None:
    run("systemctl", "enable", "--now", "ambi.service")
    status = os.stat(SOCKET)  # there at once: the unit says when it is
    assert stat.S_ISSOCK(status.st_mode) and stat.S_IMODE(status.st_mode) == 0o660
    import grp

    assert status.st_gid == grp.getgrnam("ambi").gr_gid and status.st_uid == 0
    assert cgroup_of(of_unit("MainPID")) == "/system.slice/ambi.service"


def running() -> None:
    run("ambi", "image", "import", "/check/busybox.tar", "busybox")
    run("ambi", "run", "-d", "--name", "web", "--restart", "always", "--network", "none", "--memory", "64m", "busybox",
        "sleep", "100000")  # fmt: skip
    pid = pid_of("web")
    assert cgroup_of(pid).startswith("/ambi/"), cgroup_of(pid)
    assert run("ambi", "run", "--rm", "busybox", "echo", "by the bridge") == "by the bridge"
    same_instance(pid)


def reloading() -> None:
    """systemd goes through all cgroups of its own, and leaves ours with their controllers."""
    pid = pid_of("web")
    run("systemctl", "daemon-reload")
    run("systemctl", "set-property", "--runtime", "system.slice", "MemoryMax=900M")
    same_instance(pid)
    run("systemctl", "revert", "system.slice")


def restarting() -> None:
    pid, engine = pid_of("web"), of_unit("MainPID")
    run("systemctl", "restart", "ambi.service")
    assert of_unit("MainPID") != engine
    same_instance(pid)


def stopping() -> None:
    """The engine goes and the instance stays; what next needs an engine has systemd start the unit."""
    pid = pid_of("web")
    run("systemctl", "stop", "ambi.service")
    assert of_unit("ActiveState") == "inactive" and alive(pid) and not SOCKET.exists()
    assert "web" in run("ambi", "ps", "--format", "{{.Names}}").split()
    assert of_unit("ActiveState") == "active"
    same_instance(pid)


def ending_alone() -> None:
    """An instance ends while nobody serves: its shim has systemd start the unit, and its policy has it run again."""
    pid = pid_of("web")
    run("systemctl", "stop", "ambi.service")
    os.kill(pid, signal.SIGKILL)
    until("the unit is active", lambda: of_unit("ActiveState") == "active")
    until("web runs again", lambda: pid_of("web") not in (0, pid))  # 0 while it waits for its next start


def killing() -> None:
    pid, engine = pid_of("web"), int(of_unit("MainPID"))
    os.kill(engine, signal.SIGKILL)
    until("another engine", lambda: of_unit("ActiveState") == "active" and of_unit("MainPID") not in ("0", str(engine)))
    same_instance(pid)
    assert of_unit("NRestarts") == "1"


def leaving() -> None:
    run("ambi", "run", "-d", "--name", "plain", "--network", "none", "busybox", "sleep", "100000")
    run(
        "ambi",
        "run",
        "-d",
        "--name",
        "halted",
        "--restart",
        "unless-stopped",
        "--network",
        "none",
        "busybox",
        "sleep",
        "9999",
    )
    run("ambi", "stop", "-t", "0", "halted")
    MARK.write_text(Path("/proc/sys/kernel/random/boot_id").read_text())


def returning() -> None:
    assert Path("/proc/sys/kernel/random/boot_id").read_text() != MARK.read_text()
    assert of_unit("ActiveState") == "active" and of_unit("NRestarts") == "0"
    until("web runs again", lambda: pid_of("web"))
    same_instance(pid_of("web"))
    assert [shown(name, "{{.State.Status}}") for name in ("plain", "halted")] == ["exited", "exited"]


def removing() -> None:
    run("ambi", "rm", "-f", "web", "plain", "halted")
    run("systemctl", "disable", "--now", "ambi.service")
    until("no process of ours", lambda: not _ours())
    until("no cgroup of ours", lambda: not any((CGROUPS / "ambi").glob("*/")))


def _ours() -> list[str]:
    return [pid for pid in os.listdir("/proc") if pid.isdigit() and _name(pid).startswith("ambi-")]


def _name(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""


FIRST = (starting, running, reloading, restarting, stopping, ending_alone, killing, leaving)
SECOND = (returning, removing)


def main() -> int:
    for check in SECOND if MARK.exists() else FIRST:
        began = time.monotonic()
        try:
            check()
        except Exception:
            print(f"FAILED: {check.__name__}\n{traceback.format_exc()}")
            subprocess.run(
                ["systemctl", "status", "--no-pager", "-l", "ambi.service"], stderr=subprocess.STDOUT, check=False
            )
            subprocess.run(["tail", "-n", "20", "/var/lib/ambi/engine.log"], check=False)
            return 1
        print(f"ok {check.__name__} ({time.monotonic() - began:.1f} s)", flush=True)
    print("end of the checks", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
