"""BPF programs of a few instructions, written by hand: bpf(2), Documentation/bpf/standardization/instruction-set.rst."""

from __future__ import annotations

import ctypes
import struct

from ambi.linux.libc import syscall

_NR_BPF, _BPF_PROG_LOAD = 321, 5  # linux/bpf.h
_ATTRIBUTES_BYTES = 72  # union bpf_attr, as far as older kernels know it


def instruction(code: int, destination: int = 0, source: int = 0, offset: int = 0, value: int = 0) -> bytes:
    return struct.pack("<BBhi", code, destination | source << 4, offset, value)  # struct bpf_insn


def load(kind: int, program: bytes) -> int:
    """A descriptor of `program`, of type `kind` (enum bpf_prog_type), which the caller closes. Raises OSError."""
    instructions = ctypes.create_string_buffer(program, len(program))
    license_text = ctypes.create_string_buffer(b"Apache-2.0")
    attributes = struct.pack(
        "<IIQQ", kind, len(program) // 8, ctypes.addressof(instructions), ctypes.addressof(license_text)
    )
    attributes += bytes(_ATTRIBUTES_BYTES - len(attributes))
    return command(_BPF_PROG_LOAD, attributes, what="bpf")


def command(number: int, attributes: bytes, *, what: str) -> int:
    """bpf(2) itself. Raises OSError about `what`."""
    return syscall(_NR_BPF, number, attributes, len(attributes), what=what)
