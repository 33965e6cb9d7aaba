"""Guests for the tests of our monitor: raw ones of a few instructions, and Linux in a monitor of its own process."""

from __future__ import annotations

import re
import socket
import struct
import subprocess
import sys
from pathlib import Path

from ambi.core.deadline import Deadline
from hyper.guest.client import GuestClient

ROOT = Path(__file__).parents[1]
BOOT_S = 120  # a bound against hanging for ever, not a measure
ENTRY = 16 << 20


def raw_kernel(code: bytes, *, entry: int = ENTRY) -> bytes:
    """An ELF file that is entered by PVH, in 32-bit protected mode without paging, at `code`."""
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", entry)
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    head = struct.pack("<16sHHIQQQIHHHHHH", ident, 2, 62, 1, entry, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    at = 64 + 2 * 56
    notes = struct.pack("<IIQQQQQQ", 4, 4, at, 0, 0, len(note), len(note), 4)
    text = struct.pack("<IIQQQQQQ", 1, 5, at + len(note), entry, entry, len(code), len(code), 1)
    return head + notes + text + note + code


def out(port: int, value: int) -> bytes:
    """mov dx, port; mov al, value; out dx, al"""
    return b"\x66\xba" + port.to_bytes(2, "little") + b"\xb0" + bytes((value,)) + b"\xee"


def say(text: str) -> bytes:
    """Each byte to the serial port."""
    return b"".join(out(0x3F8, byte) for byte in text.encode())


POWER_OFF = out(0x600, 5 << 2 | 1 << 5)
RESET = out(0x64, 0xFE)
TRIPLE_FAULT = b"\x0f\x0b"  # ud2, without an interrupt table
SPIN = b"\xeb\xfe"  # 1: jmp 1b


class Monitor:
    """`python -m hyper.vmm` and the agent's end of its channel. Use as a context manager: it is killed at the end."""

    def __init__(self, kernel: Path, initramfs: Path, *arguments: str, cpus: int = 1, memory: str = "128M") -> None:
        ours, theirs = socket.socketpair()
        argv = [sys.executable, "-m", "hyper.vmm", "--kernel", str(kernel), "--initramfs", str(initramfs)]
        argv += ["--cpus", str(cpus), "--memory", memory, "--agent-fd", str(theirs.fileno()), "--exits", *arguments]
        with theirs:
            self.process = subprocess.Popen(
                argv, cwd=ROOT, pass_fds=(theirs.fileno(),), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        self.client = GuestClient(ours)

    def hello(self) -> None:
        """Wait for the agent."""
        by = Deadline.after(BOOT_S)
        self.client.connect(by)
        self.client.hello(by)

    def end(self) -> tuple[str, str]:
        """The console, and what the monitor said, once it has ended by itself."""
        return self.process.communicate(timeout=BOOT_S)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.client.close()
        self.process.kill()
        self.process.communicate()


def exits(said: str) -> dict[str, int]:
    """The causes of exits by what a Monitor said, with `all` for their sum."""
    found = {cause: int(count) for count, cause in re.findall(r"^ *(\d+) (.+)$", said, re.MULTILINE)}
    total = re.search(r"(\d+) exits to user space", said)
    assert total, said
    return {**found, "all": int(total[1])}
