"""Real engines for tests: private roots, the real command line clients, a total clean-up that checks itself."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from ambi.network import namespaces
from ambi.shim.client import ZygoteClient

ROOT = Path(__file__).parents[1]
AMBI = Path(sys.executable).with_name("ambi")


@functools.cache
def guest_dir() -> Path:
    """The guest kernel and initramfs that all tests share: built once below `build/guest`, or $AMBI_TEST_GUEST as it is."""
    ready = os.environ.get("AMBI_TEST_GUEST")
    if ready:
        return Path(ready)
    path = ROOT / "build" / "guest"
    path.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [sys.executable, "-m", "hyper.guest", "--guest-dir", path], check=True, cwd=ROOT, stdout=subprocess.DEVNULL
    )
    return path


class EngineUnderTest:
    """An engine process with roots below `base`, and the clients that talk to it.

    It runs in a network namespace of its own, so whatever it does to links and rules is done to nobody else's. `netns` is a
    descriptor of it.
    """

    def __init__(self, base: Path, **environment: str) -> None:
        self.base = base
        self.data, self.run, self.socket = base / "data", base / "run", base / "run" / "ambi.sock"
        self.environment = {**os.environ, **environment}
        self.process: subprocess.Popen[bytes] | None = None
        self.netns = namespaces.new()

    @property
    def entering(self) -> list[str]:
        """What before a command line has it run in this engine's network namespace; it stays the same process."""
        return ["nsenter", f"--net=/proc/{os.getpid()}/fd/{self.netns}", "--"]

    @property
    def argv(self) -> list[str]:
        roots = ["--data-root", str(self.data), "--run-root", str(self.run), "--socket", str(self.socket)]
        return [sys.executable, "-m", "ambi.engine", *roots]

    def start(self, *, vm: bool = True) -> None:
        """Start the engine in the foreground of this process and wait until it answers."""
        self.data.mkdir(parents=True, exist_ok=True)
        if vm and not (self.data / "guest").exists() and shutil.which("qemu-system-x86_64"):
            (self.data / "guest").symlink_to(guest_dir())
        with open(self.base / "engine.out", "ab") as output:
            self.process = subprocess.Popen(
                [*self.entering, *self.argv],
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                env=self.environment,
                cwd=ROOT,
            )
        self.wait_ready()

    def wait_ready(self, seconds: float = 30) -> None:
        import socket

        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with socket.socket(socket.AF_UNIX) as probe:
                try:
                    probe.connect(str(self.socket))
                    return
                except OSError:
                    time.sleep(0.05)
        raise AssertionError(f"the engine does not answer:\n{self.output()}")

    def output(self) -> str:
        return (self.base / "engine.out").read_text(errors="replace")

    @property
    def pid(self) -> int | None:
        """The engine of these roots, whoever started it; None when none runs."""
        try:
            pid = int((self.run / "engine.lock").read_text().split()[0])
            os.kill(pid, 0)
        except (OSError, ValueError, IndexError):
            return None
        return pid

    def kill(self) -> None:
        """kill -9 of the engine, and nothing else."""
        pid = self.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        self._wait_gone(pid, 10)

    def _wait_gone(self, pid: int, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process is not None and self.process.pid == pid and self.process.poll() is not None:
                return True
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return True
            time.sleep(0.05)
        return False

    def shims(self) -> dict[str, int]:
        """Instance id to pid of its shim."""
        found = {}
        for path in self.run.glob("instances/*/shim.json"):
            try:
                found[path.parent.name] = int(json.loads(path.read_text())["pid"])
            except (OSError, ValueError, KeyError):
                continue
        return found

    def zygote(self) -> int:
        """Pid of the zygote: the process of these roots that is neither engine nor shim nor below one."""
        shims = set(self.shims().values())
        for pid in self._leftover():
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if b"zygote" in command and pid not in shims:
                return pid
        raise AssertionError("no zygote")

    def docker(self, *args: str, **options: object) -> subprocess.CompletedProcess[bytes]:
        """Run the real docker CLI against this engine."""
        return self._client(["docker", *args], {"DOCKER_HOST": f"unix://{self.socket}"}, options)

    def ambi(self, *args: str, **options: object) -> subprocess.CompletedProcess[bytes]:
        """Run our own CLI against this engine."""
        roots = {"AMBI_SOCKET": str(self.socket), "AMBI_DATA_ROOT": str(self.data), "AMBI_RUN_ROOT": str(self.run)}
        starts = self.entering if self.pid is None else []  # an engine that it starts is to be in there too
        return self._client([*starts, str(AMBI), *args], roots, options)

    def _client(
        self, argv: list[str], extra: dict[str, str], options: dict[str, object]
    ) -> subprocess.CompletedProcess[bytes]:
        check = bool(options.pop("check", False))
        settings: dict[str, object] = {"capture_output": True, "timeout": 120, **options}
        if "input" not in settings:
            settings.setdefault("stdin", subprocess.DEVNULL)
        return subprocess.run(  # type: ignore[call-overload,no-any-return]
            argv, check=check, env={**self.environment, **extra}, **settings
        )

    def load_busybox(self, tar: Path, name: str = "busybox") -> None:
        done = self.docker("import", str(tar), name)
        assert done.returncode == 0, done.stderr.decode()

    def destroy(self) -> None:
        """Remove every instance, end engine and zygote, and make sure that no process of these roots is left."""
        pid = self.pid
        if pid is not None:
            listed = self.docker("ps", "-aq").stdout.decode().split()
            if listed:
                self.docker("rm", "-f", *listed)
            os.kill(pid, signal.SIGTERM)
            if not self._wait_gone(pid, 20):
                os.kill(pid, signal.SIGKILL)
        if self.process is not None:
            self.process.wait()
        ZygoteClient(self.run).stop()  # an engine that was killed has not
        for pid in self._leftover():
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.base, ignore_errors=True)
        if self.netns >= 0:
            os.close(self.netns)
            self.netns = -1

    def _leftover(self) -> list[int]:
        """Pids of processes whose command line or environment names these roots (the zygote outlives its engine)."""
        needle, found = str(self.run).encode(), []
        for entry in os.listdir("/proc"):
            if entry.isdigit() and int(entry) != os.getpid():
                try:
                    if needle in Path("/proc", entry, "cmdline").read_bytes():
                        found.append(int(entry))
                except OSError:
                    continue
        return found
