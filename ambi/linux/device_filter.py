"""Device rules on cgroup v2: a BPF program of type CGROUP_DEVICE, since the controller itself is gone.

The program sees `struct bpf_cgroup_dev_ctx {u32 access_type, major, minor}`; the low half of access_type is the device's
type, the high half the access asked for. Rules are ordered and the last that fits wins, so they are tried from the end.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from typing import Protocol

from ambi.linux import bpf
from ambi.linux.bpf import instruction as _instruction

# linux/bpf.h
_BPF_PROG_ATTACH = 8
_BPF_PROG_TYPE_CGROUP_DEVICE, _BPF_CGROUP_DEVICE, _BPF_F_ALLOW_MULTI = 15, 6, 2
_TYPES = {"b": 1, "c": 2}
_ACCESS = {"m": 1, "r": 2, "w": 4}

_LDX_W, _MOV_REG, _AND_IMM, _RSH_IMM, _MOV_IMM, _JNE_IMM, _EXIT = 0x61, 0xBF, 0x57, 0x77, 0xB7, 0x55, 0x95
_JNE_REG = 0x5D


class DeviceRule(Protocol):
    """One rule: type `a`, `b` or `c`; numbers, None for all; access, letters of `rwm`."""

    @property
    def allow(self) -> bool: ...
    @property
    def kind(self) -> str: ...
    @property
    def major(self) -> int | None: ...
    @property
    def minor(self) -> int | None: ...
    @property
    def access(self) -> str: ...


def compile(rules: Sequence[DeviceRule]) -> bytes:
    """The program of `rules`; what none of them fits is denied."""
    program = [
        _instruction(_LDX_W, 2, 1, 0), _instruction(_AND_IMM, 2, value=0xFFFF),
        _instruction(_LDX_W, 3, 1, 0), _instruction(_RSH_IMM, 3, value=16),
        _instruction(_LDX_W, 4, 1, 4), _instruction(_LDX_W, 5, 1, 8),
    ]  # fmt: skip
    for rule in reversed(rules):
        program += _one(rule)
        if _fits_all(rule):  # what comes after it would be unreachable, which the kernel refuses
            return b"".join(program)
    return b"".join([*program, _instruction(_MOV_IMM, 0, value=0), _instruction(_EXIT)])


def _fits_all(rule: DeviceRule) -> bool:
    return rule.kind not in _TYPES and rule.major is None and rule.minor is None and set(rule.access) == set(_ACCESS)


def _one(rule: DeviceRule) -> list[bytes]:
    """Return the rule's verdict, or fall through when it does not fit."""
    tests: list[tuple[int, int, int]] = []  # code, register, value
    if rule.kind in _TYPES:
        tests.append((_JNE_IMM, 2, _TYPES[rule.kind]))
    if rule.major is not None:
        tests.append((_JNE_IMM, 4, rule.major))
    if rule.minor is not None:
        tests.append((_JNE_IMM, 5, rule.minor))
    access = sum(_ACCESS[letter] for letter in set(rule.access))
    body = [_instruction(_MOV_IMM, 0, value=int(rule.allow)), _instruction(_EXIT)]
    if access != 7:  # every access asked for must be among the rule's
        masked = [_instruction(_MOV_REG, 1, 3), _instruction(_AND_IMM, 1, value=access)]
        body = [*masked, _instruction(_JNE_REG, 1, 3, 2), *body]
    for code, register, value in reversed(tests):
        body = [_instruction(code, register, offset=len(body), value=value), *body]
    return body


def attach(directory: str, program: bytes) -> None:
    """Load `program` and attach it to the cgroup `directory`; it lives as long as the group."""
    loaded = bpf.load(_BPF_PROG_TYPE_CGROUP_DEVICE, program)
    try:
        group = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            target = struct.pack("<IIII", group, loaded, _BPF_CGROUP_DEVICE, _BPF_F_ALLOW_MULTI)
            bpf.command(_BPF_PROG_ATTACH, target, what=directory)
        finally:
            os.close(group)
    finally:
        os.close(loaded)
