"""A machine of our own monitor with a guest of ours in it, driven by the blocking client: no driver, no shim, no jail.

The machine is a child process, which tells its figures when it is asked. For hosts with a true KVM (`scripts/kvm-lab`).
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from ambi.core.deadline import Deadline
from ambi.core.loop import POLLIN, Loop
from hyper import boot_files
from hyper.guest.client import GuestClient
from hyper.guest.protocol import Items, SetupTag, Type
from hyper.kvm.code import tsc_khz
from hyper.vm.words import WORDS
from hyper.vmm.config import Config
from hyper.vmm.machine import Machine
from hyper.vmm.main import SWITCH_S
from hyper.vmm.virtio.balloon import Balloon
from tests.vm.guest_boot import ALL_CAPABILITIES, BOOT_S, MOUNTS, sh

GUEST_DIR = Path(__file__).parents[1] / "build" / "guest"


class Guest:
    """A running guest; `client` is connected and has said hello. parts: fields of Config beyond the usual ones.

    Descriptors in `parts` are the machine's: they are closed here once it has them.
    """

    def __init__(
        self, directory: Path, *, vcpus: int = 1, memory_mib: int = 256, fds: tuple[int, ...] = (), **parts: Any
    ) -> None:
        self.console = directory / "console"
        self.agent, agent = socket.socketpair()
        self._figures, figures = socket.socketpair()
        self._execs = 100
        files = boot_files.find(GUEST_DIR)
        self.pid = os.fork()
        if self.pid == 0:
            self.agent.close()
            self._figures.close()
            try:
                config = Config(
                    kvm=os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC),
                    kernel=os.open(files.kernel, os.O_RDONLY | os.O_CLOEXEC),
                    initramfs=os.open(files.initramfs, os.O_RDONLY | os.O_CLOEXEC),
                    cmdline=" ".join((*WORDS, f"tsc_early_khz={tsc_khz()}")),
                    vcpus=vcpus, memory_bytes=memory_mib << 20,
                    console=os.open(self.console, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
                    agent=agent.detach(), **parts,
                )  # fmt: skip
                _run(config, figures)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        for fd in (agent.detach(), figures.detach(), *fds):
            os.close(fd)
        self.client = GuestClient(self.agent)
        try:
            by = Deadline.after(BOOT_S)
            self.client.connect(by)
            self.hello = self.client.hello(by)
        except BaseException:
            sys.stderr.write(self.console.read_text(errors="replace")[-4000:])
            self.close()
            raise

    def setup(self, *items: tuple[int, object], mounts: Items = MOUNTS) -> None:
        """A root, and a first process that stays: `run` adds others."""
        fields = ((SetupTag.HOSTNAME, "guest"), *mounts, *items)
        self.client.request(Type.SETUP, fields, Deadline.after(BOOT_S))  # type: ignore[arg-type]
        self.client.start(Type.RUN, 1, sh("exec sleep 1000000", ALL_CAPABILITIES), Deadline.after(BOOT_S))

    def run(self, script: str, seconds: float = BOOT_S) -> str:
        """The output of a script in the guest, which must succeed."""
        self._execs += 1
        by = Deadline.after(seconds)
        self.client.start(Type.EXEC, self._execs, sh(script, ALL_CAPABILITIES), by)
        output = self.client.wait(by, self._execs)
        assert output.exit == 0, f"{script}: {output.exit}: {bytes(output.stderr)!r}"
        return output.stdout.decode()

    def balloon(self, size_bytes: int) -> None:
        """Ask the guest for so much of its memory."""
        self._tell(f"balloon {size_bytes}")

    def memory(self, size_bytes: int) -> int:
        """Have the guest use so much more than it booted with, or less again; what it uses when this is called."""
        return int(self._tell(f"memory {size_bytes}")["plugged"])

    def resize(self, serial: str) -> None:
        """The file of a disk has another size."""
        self._tell(f"resize {serial}")

    def sysrq(self, key: str) -> None:
        self._tell(f"sysrq {key}")

    def figures(self) -> dict[str, Any]:
        """exits: to user space by cause; devices: counters by name; kernel: KVM's statistics; balloon: what the guest has
        given, in bytes; plugged: what it uses beyond what it booted with. at: when, in seconds."""
        return self._tell("figures")

    def ending(self) -> dict[str, Any]:
        """Wait for the machine to end by itself: its cause and detail."""
        return self._line()

    def _tell(self, word: str) -> dict[str, Any]:
        self._figures.send(word.encode())
        return self._line()

    def _line(self) -> dict[str, Any]:
        self._figures.settimeout(BOOT_S)
        data = b""
        while not data.endswith(b"\n"):
            piece = self._figures.recv(65536)
            assert piece, "the machine has ended"
            data += piece
        found: dict[str, Any] = json.loads(data)
        return found

    def close(self) -> None:
        self.client.close()
        self._figures.close()
        os.kill(self.pid, 9)
        os.waitpid(self.pid, 0)


def _run(config: Config, figures: socket.socket) -> None:
    sys.setswitchinterval(SWITCH_S)
    loop = Loop()
    machine = Machine(config, loop)
    transport = next(t for t in machine.transports if isinstance(t.device, Balloon))
    balloon = transport.device
    assert isinstance(balloon, Balloon)

    def asked(_: int) -> None:
        words = figures.recv(100).split()
        if not words:
            os._exit(0)
        if words[0] == b"balloon":
            transport.run(lambda: balloon.resize(int(words[1])))
        elif words[0] == b"memory":
            machine.resize_memory(int(words[1]))
        elif words[0] == b"resize":
            machine.resize_disk(words[1].decode())
        elif words[0] == b"sysrq":
            machine.uart.send_sysrq(words[1])
        found = {
            "balloon": balloon.actual,
            "plugged": machine.memory_plugged(),
            "exits": machine.exits(),
            "devices": machine.counters(),
            "kernel": machine.kernel_stats(),
            "at": time.monotonic(),
        }
        figures.sendall(json.dumps(found).encode() + b"\n")

    loop.watch(figures.fileno(), POLLIN, asked)
    machine.boot()
    if hasattr(machine, "start"):
        machine.start()
    ending = machine.run()
    figures.sendall(json.dumps(ending._asdict()).encode() + b"\n")
    sys.stderr.write(f"the machine ended: {ending}\n")
