"""CPUID as KVM tells and takes it: a count, and entries of 40 bytes."""

from __future__ import annotations

import ctypes
import errno
import struct
from collections.abc import Sequence
from typing import NamedTuple

from hyper.kvm.api import Ioctl, call
from hyper.kvm.errors import KvmError

_HEAD = struct.Struct("<II")  # kvm_cpuid2: nent, padding
_ENTRY = struct.Struct("<7I12x")  # kvm_cpuid_entry2
_MOST = 4096  # entries that we ever make room for


class CpuidEntry(NamedTuple):
    """A row: `index` is ECX where `flags` has KVM_CPUID_FLAG_SIGNIFCANT_INDEX."""

    function: int
    index: int  # type: ignore[assignment]  # the kernel's name; tuple.index is of no use here
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int


def read(fd: int, ioctl: Ioctl, subject: str) -> list[CpuidEntry]:
    """The table that a get-ioctl gives. Raises KvmError."""
    room = 128
    while True:
        buffer = ctypes.create_string_buffer(_HEAD.pack(room, 0), _HEAD.size + room * _ENTRY.size)
        try:
            call(fd, ioctl, buffer, subject)
            break
        except KvmError as error:
            if error.errno != errno.E2BIG or room >= _MOST:
                raise
            room *= 2
    count, _ = _HEAD.unpack_from(buffer)
    entries = memoryview(buffer)[_HEAD.size : _HEAD.size + count * _ENTRY.size]
    return [CpuidEntry(*row) for row in _ENTRY.iter_unpack(entries)]


def write(fd: int, ioctl: Ioctl, entries: Sequence[CpuidEntry], subject: str) -> None:
    """Raises KvmError."""
    call(fd, ioctl, _HEAD.pack(len(entries), 0) + b"".join(_ENTRY.pack(*row) for row in entries), subject)
