"""The engine as a service of systemd: it tells when it serves, and is started again through its unit.

Sources: sd_notify(3) for the datagrams, systemd.exec(5) for SYSTEMD_EXEC_PID, the pid of a service's main process.
"""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path
from typing import NamedTuple


class Service(NamedTuple):
    """What systemd told this process: its unit, and the socket to notify ("" for none)."""

    unit: str
    address: str

    def tell(self, state: str) -> None:
        """Send `READY=1` or `STOPPING=1`. An init that does not listen is no reason to end."""
        if not self.address:
            return
        name = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            try:
                sock.sendto(state.encode(), name)
            except OSError:  # nobody listens, and serving does not depend on it
                pass

    @property
    def start_argv(self) -> list[str] | None:
        """How to have it started again; None without systemctl."""
        program = shutil.which("systemctl")
        return [program, "start", "--no-block", self.unit] if program else None


def taken() -> Service | None:
    """This process as a service; None when systemd is not its parent. What it reads goes from the environment, so that no
    process below claims to be the service."""
    address, main = (os.environ.pop(name, "") for name in ("NOTIFY_SOCKET", "SYSTEMD_EXEC_PID"))
    if main != str(os.getpid()):
        return None
    unit = unit_of(Path("/proc/self/cgroup").read_text())
    return Service(unit, address) if unit else None


def unit_of(cgroups: str) -> str | None:
    """The service in the text of /proc/PID/cgroup: the last folder of systemd's own hierarchy, or of cgroup v2."""
    for line in cgroups.splitlines():
        _, controllers, path = line.split(":", 2)
        name = path.rpartition("/")[2]
        if controllers in ("", "name=systemd") and name.endswith(".service"):
            return name
    return None
