"""Capability names, sets as bit masks, and the calls that change them."""

from __future__ import annotations

import ctypes
import struct
from typing import NamedTuple

from ambi.linux.calls import Calls
from ambi.linux.libc import syscall
from ambi.linux.process import (
    PR_CAP_AMBIENT,
    PR_CAP_AMBIENT_CLEAR_ALL,
    PR_CAP_AMBIENT_RAISE,
    PR_CAPBSET_DROP,
    PR_CAPBSET_READ,
    prctl,
)

# linux/capability.h, in the order of their numbers
NAMES = (
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID",
    "CAP_SETUID", "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST", "CAP_NET_ADMIN",
    "CAP_NET_RAW", "CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT", "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE", "CAP_SYS_RESOURCE", "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE", "CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL", "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG", "CAP_WAKE_ALARM", "CAP_BLOCK_SUSPEND", "CAP_AUDIT_READ",
    "CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE",
)  # fmt: skip
NUMBERS = {name: number for number, name in enumerate(NAMES)}

_VERSION_3 = 0x20080522
_NR_CAPGET, _NR_CAPSET = 125, 126


class Sets(NamedTuple):
    """The five sets of a process as bit masks."""

    bounding: int
    effective: int
    permitted: int
    inheritable: int
    ambient: int


def mask_of(names: list[str] | tuple[str, ...]) -> int:
    """The bits of `names`; ValueError names one that does not exist."""
    mask = 0
    for name in names:
        number = NUMBERS.get(name)
        if number is None:
            raise ValueError(f"no capability is called {name}")
        mask |= 1 << number
    return mask


def names_of(mask: int) -> list[str]:
    return [name for number, name in enumerate(NAMES) if mask >> number & 1]


def permitted() -> int:
    """The permitted set of the calling thread."""
    header = ctypes.create_string_buffer(struct.pack("Ii", _VERSION_3, 0), 8)
    data = ctypes.create_string_buffer(24)
    syscall(_NR_CAPGET, header, data, what="capget")
    _, low, _, _, high, _ = struct.unpack("6I", data.raw)
    return int(low | high << 32)


def bounding() -> int:
    """The bounding set of the calling thread."""
    mask = 0
    for number in range(64):
        try:
            mask |= prctl(PR_CAPBSET_READ, number) << number
        except OSError:  # EINVAL: the kernel's last capability is behind us
            break
    return mask


def limit_bounding(keep: int, now: int) -> None:
    """Drop from the bounding set, which is `now`, what `keep` lacks. Needs CAP_SETPCAP."""
    dropped = now & ~keep
    for number in range(dropped.bit_length()):
        if dropped >> number & 1:
            prctl(PR_CAPBSET_DROP, number)


def _set_words(effective: int, permitted: int, inheritable: int) -> tuple[bytes, bytes]:
    """The header and the data of capset(2) for the calling thread."""
    low = 0xFFFFFFFF
    words = (
        effective & low, permitted & low, inheritable & low, effective >> 32, permitted >> 32, inheritable >> 32,
    )  # fmt: skip
    return struct.pack("Ii", _VERSION_3, 0), struct.pack("6I", *words)


def set_process(effective: int, permitted: int, inheritable: int) -> None:
    """capset(2) for the calling thread."""
    words = [ctypes.create_string_buffer(data, len(data)) for data in _set_words(effective, permitted, inheritable)]
    syscall(_NR_CAPSET, *words, what="capset")


def add_set_process(calls: Calls, effective: int, permitted: int, inheritable: int) -> None:
    """`set_process` as a call of a list."""
    calls.add("set the capabilities", _NR_CAPSET, *_set_words(effective, permitted, inheritable))


def set_ambient(mask: int) -> None:
    """Make the ambient set exactly `mask`, which must be permitted and inheritable."""
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    for number in range(mask.bit_length()):
        if mask >> number & 1:
            prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, number)
