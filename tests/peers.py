"""Peers to compare with, started for one test or benchmark with everything of their own and stopped at its end."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType


class Dockerd:
    """Debian's dockerd with a private data root, exec root, socket and containerd; no bridge, no firewall rules.

    with Dockerd() as peer: peer.docker("run", ...)

    Set `options` before it is entered for a bridge and rules; it is in the namespaces of the thread that enters.
    """

    options: tuple[str, ...] = ("--iptables=false", "--ip6tables=false", "--bridge=none")

    def __init__(self, base: Path | None = None) -> None:
        """base: an empty directory for all that is the daemon's, on a file system of the caller's choice."""
        self.base = base or Path(tempfile.mkdtemp(prefix="peer-", dir="/tmp"))
        self.socket = self.base / "docker.sock"
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Dockerd:
        program = shutil.which("dockerd", path=os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin")
        assert program, "dockerd is missing (Debian package docker.io)"
        argv = [program, "--data-root", self.base / "data", "--exec-root", self.base / "exec", "-H", f"unix://{self.socket}"]
        argv += ["-p", self.base / "pid", *self.options]
        with open(self.base / "log", "wb") as log:
            self.process = subprocess.Popen(argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
        end = time.monotonic() + 60
        while time.monotonic() < end and self.process.poll() is None:
            with socket.socket(socket.AF_UNIX) as probe:
                try:
                    probe.connect(str(self.socket))
                    return self
                except OSError:
                    time.sleep(0.2)
        log_tail = (self.base / "log").read_text(errors="replace")[-2000:]
        self.__exit__(None, None, None)
        raise AssertionError(f"dockerd did not start:\n{log_tail}")

    def docker(self, *args: str, check: bool = False, **options: object) -> subprocess.CompletedProcess[bytes]:
        """Run the docker CLI against this daemon."""
        settings: dict[str, object] = {"capture_output": True, "timeout": 120, **options}
        if "input" not in settings:
            settings.setdefault("stdin", subprocess.DEVNULL)
        environment = {**os.environ, "DOCKER_HOST": f"unix://{self.socket}"}
        return subprocess.run(["docker", *args], check=check, env=environment, **settings)  # type: ignore[call-overload,no-any-return]

    def pids(self) -> list[int]:
        """dockerd, its containerd and their shims."""
        found, needle = [], str(self.base).encode()
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                try:
                    if needle in Path("/proc", entry, "cmdline").read_bytes():
                        found.append(int(entry))
                except OSError:
                    continue
        return found

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process is not None and self.process.poll() is None:
            for name in self.docker("ps", "-aq").stdout.decode().split():
                self.docker("rm", "-f", name)
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for pid in self.pids():
            if pid != os.getpid():
                os.kill(pid, signal.SIGKILL)
        self._unmount()
        shutil.rmtree(self.base, ignore_errors=True)

    def _unmount(self) -> None:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        for point in sorted((line.split()[4] for line in lines if str(self.base) in line.split()[4]), reverse=True):
            subprocess.run(["umount", "-l", point], check=False)
