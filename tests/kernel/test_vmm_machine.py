"""Whole machines of our monitor with guests of a few instructions: they run on any /dev/kvm, also on one that emulates."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ambi.core.deadline import Deadline
from ambi.core.errors import Corrupt
from ambi.core.loop import Loop
from hyper.vmm import console, layout
from hyper.vmm.config import Config
from hyper.vmm.machine import Ending, Machine
from tests.monitorkit import POWER_OFF, RESET, ROOT, SPIN, TRIPLE_FAULT, out, raw_kernel, say

pytestmark = pytest.mark.needs("kvm-device")

PANIC = "Kernel panic - not syncing: no working init\n"


class Rig:
    """Makes machines of raw code, and collects what they say on their console."""

    def __init__(self, where: Path) -> None:
        self.where = where
        self.fds = [os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC), os.memfd_create("console")]
        self.machines: list[Machine] = []
        self.loop = Loop()

    def machine(self, code: bytes, *, vcpus: int = 1) -> Machine:
        kernel = self.where / "kernel"
        kernel.write_bytes(raw_kernel(code))
        self.fds.append(os.open(kernel, os.O_RDONLY | os.O_CLOEXEC))
        config = Config(
            self.fds[0], self.fds[-1], None, "", vcpus=vcpus, memory_bytes=64 * layout.MIB, console=self.fds[1], spares=2
        )
        machine = Machine(config, self.loop)
        self.machines.append(machine)
        machine.boot()
        return machine

    def said(self) -> bytes:
        return os.pread(self.fds[1], 1 << 20, 0)

    def close(self) -> None:
        for machine in self.machines:
            machine.close()
        for fd in self.fds:
            os.close(fd)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    before = set(os.listdir("/proc/self/fd"))
    rig = Rig(tmp_path)
    yield rig
    rig.close()
    assert len(os.listdir("/proc/self/fd")) == len(before), "a machine leaves no descriptor behind"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vcpu")]


@pytest.mark.parametrize(
    "code,ending,said",
    [
        (say("bye") + POWER_OFF, Ending("guest-shutdown"), b"bye"),
        (RESET, Ending("guest-reset"), b""),
        (TRIPLE_FAULT, Ending("guest-crash", "a triple fault"), b""),
        (say("reboot: Restarting system\n") + TRIPLE_FAULT, Ending("guest-reset"), b"reboot: Restarting system\n"),
        (say("x\n" + PANIC) + TRIPLE_FAULT, Ending("guest-panic", PANIC.strip()), b"x\n" + PANIC.encode()),
        (say(PANIC) + RESET, Ending("guest-panic", PANIC.strip()), PANIC.encode()),
    ],
    ids=["power-off", "reset", "triple fault", "reboot=t", "panic", "panic and reset"],
)
def test_an_end_is_seen_as_what_it_is(rig: Rig, code: bytes, ending: Ending, said: bytes) -> None:
    assert rig.machine(code + SPIN).run() == ending
    assert rig.said() == said


def test_exits_are_counted_by_their_cause(rig: Rig) -> None:
    code = say("abc") + out(0x80, 1) + out(0x70, 0x8F) + b"\xa1" + struct.pack("<I", 0xC000_0000) + POWER_OFF + SPIN
    machine = rig.machine(code)
    machine.run()
    exits = machine.exits()
    assert exits.pop("interrupted", 0) <= 2
    assert exits == {"out 0x3f8": 3, "out 0x80": 1, "read 0xc0000000": 1, "out 0x600": 1}, "0x70 never came to us"
    assert machine.ports.unowned == {0x80: 1} and machine.mmio.unowned == {0xC000_0000: 1}


def test_a_read_of_nothing_is_all_ones_and_of_a_spare_slot_a_device_that_is_none(rig: Rig) -> None:
    """mov eax, [page]; mov [100000h], eax and so on: what the guest saw is in its memory."""
    addresses = (layout.slot_address(3), layout.slot_address(3) + 8, 0xC000_0000, layout.slot_address(5))
    code = b"".join(
        b"\xa1" + struct.pack("<I", address) + b"\xa3" + struct.pack("<I", 0x10_0000 + 4 * n)
        for n, address in enumerate(addresses)
    )
    machine = rig.machine(code + POWER_OFF + SPIN)
    machine.run()
    seen = struct.unpack("<4I", machine.memory.read(0x10_0000, 16))
    assert seen == (0x7472_6976, 0, 0xFFFF_FFFF, 0xFFFF_FFFF)
    assert f"read {layout.slot_address(3):#x}" not in machine.exits(), "a register page is read without an exit"


def test_a_vcpu_that_spins_is_paused_goes_on_and_is_ended(rig: Rig) -> None:
    """1: inc dword [100000h]; jmp 1b"""
    machine = rig.machine(b"\xff\x05\x00\x00\x10\x00\xeb\xf8", vcpus=2)
    seen: list[int] = []

    def drive() -> None:
        while not machine.memory.u32(0x10_0000):
            time.sleep(0.001)
        machine.pause()
        machine.pause()
        seen.append(machine.memory.u32(0x10_0000))
        time.sleep(0.02)
        seen.append(machine.memory.u32(0x10_0000))
        machine.resume()
        while machine.memory.u32(0x10_0000) == seen[-1]:
            time.sleep(0.001)
        machine.end("internal", "enough")

    driver = threading.Thread(target=drive)
    driver.start()
    ending = machine.run()
    driver.join()
    assert ending == Ending("internal", "enough")
    assert seen[0] == seen[1] > 0


def test_a_console_that_nobody_reads_stops_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """5,500 bytes by `rep outsb` from what is all zeros, into a pipe that takes 4096; the last words are kept."""
    monkeypatch.setattr(console, "KEEP_BYTES", 1024)
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.dup2(writer, rig.fds[1], inheritable=False)
    os.close(writer)
    flood = b"\x66\xba\xf8\x03\xbe\x00\x00\x20\x00\xb9\x7c\x15\x00\x00\xf3\x6e"  # dx 3f8h, esi 200000h, ecx 5500
    machine = rig.machine(flood + say(PANIC) + TRIPLE_FAULT)
    ending = machine.run()
    assert ending.cause == "guest-panic" and ending.detail.endswith(PANIC.strip()) and len(ending.detail) <= 300
    assert len(machine.console.tail) == 1024
    assert 0 < len(os.read(reader, 1 << 20)) <= 4096
    os.close(reader)


def test_sixteen_vcpus_wait_for_the_first(rig: Rig) -> None:
    machine = rig.machine(say("one") + POWER_OFF + SPIN, vcpus=16)
    assert machine.run() == Ending("guest-shutdown")
    assert rig.said() == b"one"


def test_what_cannot_be_booted_leaves_nothing(rig: Rig) -> None:
    kernel = rig.where / "damaged"
    kernel.write_bytes(raw_kernel(SPIN)[:-1])
    rig.fds.append(os.open(kernel, os.O_RDONLY | os.O_CLOEXEC))
    config = Config(rig.fds[0], rig.fds[-1], None, "", vcpus=1, memory_bytes=64 * layout.MIB, console=rig.fds[1])
    machine = Machine(config, rig.loop)
    rig.machines.append(machine)
    with pytest.raises(Corrupt, match="kernel is truncated"):
        machine.boot()


def test_a_monitor_ends_with_its_driver(rig: Rig) -> None:
    """The process that a driver forks: it says how it ended, and a control socket that is closed ends it."""
    from hyper.vmm.main import run

    for hang_up, expected in ((False, b'"cause":"guest-shutdown"'), (True, b"")):
        code = SPIN if hang_up else POWER_OFF + SPIN
        kernel = rig.where / "kernel"
        kernel.write_bytes(raw_kernel(code))
        fd = os.open(kernel, os.O_RDONLY | os.O_CLOEXEC)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            ours.close()
            null = os.open("/dev/null", os.O_WRONLY)
            os.dup2(null, 2)
            run(
                Config(
                    rig.fds[0], fd, None, "", vcpus=1, memory_bytes=64 * layout.MIB, console=rig.fds[1],
                    control=theirs.fileno(),
                )
            )  # fmt: skip
        theirs.close()
        os.close(fd)
        if hang_up:
            ours.close()
        else:
            ours.settimeout(30)
            assert expected in ours.recv(4096)
            ours.close()
        by = Deadline.after(30)
        while os.waitpid(pid, os.WNOHANG) == (0, 0):
            assert not by.expired()
            time.sleep(0.01)


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--kernel", "/nowhere/vmlinux"], "/nowhere/vmlinux: No such file"),
        (["--kernel", "/etc/passwd"], "neither a bzImage nor an ELF file"),
        (["--kernel", "/etc/passwd", "--cpus", "17"], "17 CPUs: 1 to 16 are possible\nhint: for example --cpus 16"),
        (["--kernel", "/etc/passwd", "--memory", "32M"], "32 MiB of memory, but 64 MiB to 1024 GiB"),
        (
            ["--kernel", "/etc/passwd", "--memory", "a lot"],
            "'a lot' is no amount of memory\nhint: for example --memory 256M",
        ),
    ],
)
def test_the_command_says_what_is_wrong(arguments: list[str], words: str) -> None:
    argv = [sys.executable, "-m", "hyper.vmm", *arguments]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 125 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.startswith("cannot run the machine: ")
