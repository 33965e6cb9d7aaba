"""A machine by hand: python -m hyper.vmm --kernel K [--initramfs I] [--append WORDS] [--memory 256M] [--cpus N]

Runs it in the foreground, without the jail and the seccomp filter that a driver gives it, with its serial port on standard
output. The last line on standard error says how it ended; the exit status is 0 for a power-off, 3 reset, 4 panic, 5 crash.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

from ambi.core.errors import AmbiError, InvalidRequest, from_os_error
from ambi.core.loop import Loop
from hyper.kvm.code import tsc_khz
from hyper.vm.words import WORDS
from hyper.vmm.config import Config, Disk
from hyper.vmm.machine import Machine
from hyper.vmm.main import STATUS, SWITCH_S

UNITS = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
WORST = 20  # causes of exits that are shown


def main() -> int:
    options = _options()
    sys.setswitchinterval(SWITCH_S)
    try:
        return _run(options)
    except AmbiError as error:
        _say(f"cannot run the machine: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""))
    except OSError as error:
        _say(f"cannot run the machine: {error.strerror or error}")
    return 125


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m hyper.vmm", description="Run a virtual machine in the foreground.")
    parser.add_argument("--kernel", required=True, help="a bzImage or a vmlinux")
    parser.add_argument("--initramfs", help="a cpio archive, compressed or not")
    parser.add_argument("--append", default="", help="further words of the kernel's command line")
    parser.add_argument("--loud", action="store_true", help="leave `quiet` out of them")
    parser.add_argument("--memory", default="256M", help="bytes, or with K, M or G (default: 256M)")
    parser.add_argument("--cpus", type=int, default=1, help="1 to 16 (default: 1)")
    parser.add_argument("--disk", action="append", default=[], metavar="FILE", help="a writable disk; may be repeated")
    parser.add_argument("--agent-fd", type=int, default=-1, help="a stream socket for the port of the guest's agent")
    parser.add_argument("--exits", action="store_true", help="say at the end what came to user space, by cause")
    return parser.parse_args()


def _run(options: argparse.Namespace) -> int:
    config = _config(options)
    before = time.monotonic()
    machine = Machine(config, Loop())
    try:
        machine.boot()
        ready = time.monotonic()
        ending = machine.run()
        os.set_blocking(1, True)
        machine.console.flush()
        if options.exits:
            _tell_exits(machine, ready - before, time.monotonic() - ready)
    finally:
        machine.close()
        os.set_blocking(1, True)  # standard output is shared with whoever started us
    _say(f"{ending.cause}: {ending.detail}" if ending.detail else ending.cause)
    return STATUS[ending.cause]


def _tell_exits(machine: Machine, setup_s: float, ran_s: float) -> None:
    exits = machine.exits()
    _say(f"made in {setup_s * 1000:.0f} ms, ran {ran_s * 1000:.0f} ms, {sum(exits.values())} exits to user space")
    for cause, count in list(exits.items())[:WORST]:
        _say(f"{count:8} {cause}")
    kernel: dict[str, Any] = machine.kernel_stats()
    _say(f"{kernel.get('exits', 0):8} exits in all, {kernel.get('halt_exits', 0)} of them to wait for an interrupt")


def _config(options: argparse.Namespace) -> Config:
    words = [word for word in WORDS if not (options.loud and word == "quiet")]
    words.append(f"tsc_early_khz={tsc_khz()}")
    return Config(
        kvm=_open("/dev/kvm", os.O_RDWR),
        kernel=_open(options.kernel, os.O_RDONLY),
        initramfs=_open(options.initramfs, os.O_RDONLY) if options.initramfs else None,
        cmdline=" ".join((*words, options.append)).strip(),
        vcpus=options.cpus,
        memory_bytes=_bytes(options.memory),
        console=os.dup(1),
        agent=options.agent_fd,
        disks=tuple(Disk(f"disk{n}", _open(path, os.O_RDWR), readonly=False) for n, path in enumerate(options.disk)),
    )


def _open(path: str, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        raise from_os_error("cannot open a file", error) from error


def _bytes(text: str) -> int:
    unit = UNITS.get(text[-1:].lower(), 1)
    digits = text[:-1] if unit > 1 else text
    if not digits.isdecimal():
        raise InvalidRequest(f"{text!r} is no amount of memory", hint="for example --memory 256M")
    return int(digits) * unit


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
