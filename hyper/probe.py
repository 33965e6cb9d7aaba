"""What this host offers to virtual machines: QEMU, a KVM that runs code, the rate of the TSC. Asked once a boot."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

from hyper.vm import jail

QEMU_PROGRAMS = ("qemu-system-x86_64", "qemu-kvm")
CACHE = "host.json"  # below the guest directory: {"boot_id", "kvm_device", "kvm_problem", "tsc_khz"}


_known: dict[tuple[str, str], Host] = {}  # what this process has found, by boot and device


class Host(NamedTuple):
    """kvm_problem: why KVM is not used, "" when it is. tsc_khz: the rate of the time stamp counter."""

    kvm_problem: str
    tsc_khz: int

    @property
    def kvm(self) -> bool:
        return not self.kvm_problem


def find_qemu() -> str | None:
    return next((path for name in QEMU_PROGRAMS if (path := jail.find_program(name))), None)


def processor() -> str:
    """What a guest under KVM sees of the first processor, as far as a changed host can be told by it without asking KVM."""
    first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    return "\n".join(line for line in first.splitlines() if line.startswith(("model name", "microcode", "flags", "bugs")))


def host(cache_dir: Path | None = None) -> Host:
    """Try it, which takes less than 0.1 s, or read what an earlier try of this boot found and kept below `cache_dir`."""
    key = (_boot_id(), _device())
    if cache_dir is None and key in _known:
        return _known[key]
    if cache_dir is not None:
        found = _read(cache_dir / CACHE, key)
        if found is not None:
            return found
    from hyper.kvm import code, probe  # ctypes and code in memory: only when it is really tried

    result = _known[key] = Host(probe.problem() or "", code.tsc_khz())
    if cache_dir is not None:
        _write(cache_dir / CACHE, key, result)
    return result


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _device() -> str:
    """What /dev/kvm is now: a module loaded later, or other rights, make the old answer worthless."""
    try:
        info = os.stat("/dev/kvm")
    except OSError:
        return ""
    return f"{info.st_rdev:x} {info.st_mode:o} {info.st_uid} {info.st_gid} {os.getuid()}"


def _read(path: Path, key: tuple[str, str]) -> Host | None:
    try:
        body = json.loads(path.read_bytes())
        if (body["boot_id"], body["kvm_device"]) != key:
            return None
        return Host(str(body["kvm_problem"]), int(body["tsc_khz"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, key: tuple[str, str], host: Host) -> None:
    """Keep it; without a place for it the next one tries again."""
    body = {"boot_id": key[0], "kvm_device": key[1], "kvm_problem": host.kvm_problem, "tsc_khz": host.tsc_khz}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(body))
        os.rename(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
