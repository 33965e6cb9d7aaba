"""From the `linux.seccomp` object of config.json to a loaded seccomp program, without libseccomp.

`compile` is pure: it returns the array of `struct sock_filter` that `load` hands to the kernel here and the guest's agent
there. For each architecture all system call numbers become ranges of equal outcome, found by a binary tree of `jge`:
about log2(n) instructions a call, where libseccomp's list has n.

Semantics are those of runc with libseccomp (runtime-spec, config-linux.md, seccomp):

- names that the tables do not know are ignored, entries whose action is the default one too;
- the conditions of an entry hold together, unless two name the same argument: then each is an entry of its own;
- an entry without conditions beats all with, of the same call; among those with conditions the first that holds wins;
- a call newer than every call that the profile names gets ENOSYS instead of a denial, so that programs fall back (runc);
- a call of an architecture that is not listed kills the thread, as does one of x32 when x86-64 alone is listed;
- the i386 multiplexers `socketcall` and `ipc` are calls of their own: their parts are not filtered through them.
"""

from __future__ import annotations

import ctypes
import errno
import struct
from typing import Any, NamedTuple

from ambi.core.errors import InvalidRequest, Unsupported
from ambi.linux.calls import Calls
from ambi.linux.libc import syscall
from ambi.linux.syscall_table import I386, X32, X32_BIT, X86_64

# linux/bpf_common.h, linux/filter.h
_LD_ABS, _AND, _RET = 0x20, 0x54, 0x06
_JA, _JEQ, _JGT, _JGE = 0x05, 0x15, 0x25, 0x35
_LIMIT = 4096  # BPF_MAXINSNS

# linux/seccomp.h
_RET_KILL_THREAD = 0
_ACTIONS = {
    "SCMP_ACT_KILL": 0,
    "SCMP_ACT_KILL_THREAD": 0,
    "SCMP_ACT_KILL_PROCESS": 0x80000000,
    "SCMP_ACT_TRAP": 0x00030000,
    "SCMP_ACT_ERRNO": 0x00050000,
    "SCMP_ACT_TRACE": 0x7FF00000,
    "SCMP_ACT_LOG": 0x7FFC0000,
    "SCMP_ACT_ALLOW": 0x7FFF0000,
}
_WITH_DATA = ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE")
_FLAGS = {"SECCOMP_FILTER_FLAG_TSYNC": 1, "SECCOMP_FILTER_FLAG_LOG": 2, "SECCOMP_FILTER_FLAG_SPEC_ALLOW": 4}
_SET_MODE_FILTER = 1
_FILTER_FLAG_NEW_LISTENER = 8
_NR_SECCOMP = 317

# struct seccomp_data: nr, arch, instruction pointer, args[6]
_NR_OFFSET, _ARCH_OFFSET, _ARGS_OFFSET = 0, 4, 16

# linux/audit.h
_AUDIT_X86_64, _AUDIT_I386 = 0xC000003E, 0x40000003
_ABIS = {
    "SCMP_ARCH_X86_64": (_AUDIT_X86_64, X86_64, 0, X32_BIT),
    "SCMP_ARCH_X32": (_AUDIT_X86_64, X32, X32_BIT, 1 << 32),
    "SCMP_ARCH_X86": (_AUDIT_I386, I386, 0, 1 << 32),
}

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, k: struct sock_filter


class Condition(NamedTuple):
    """One comparison of a 64-bit argument; `second` is the value that SCMP_CMP_MASKED_EQ compares with."""

    argument: int
    op: str
    value: int
    second: int


class Rule(NamedTuple):
    """An outcome (a SECCOMP_RET_* word) and the conditions that must all hold."""

    outcome: int
    conditions: tuple[Condition, ...]


class Segment(NamedTuple):
    """All numbers from `start` to the next segment's: a return word, or the code that decides."""

    start: int
    outcome: int | tuple[Instruction, ...]


def compile(profile: dict[str, Any]) -> bytes:
    """The program of an OCI seccomp object, 8 bytes an instruction. InvalidRequest names what it cannot express."""
    default = _outcome(profile["defaultAction"], profile.get("defaultErrnoRet"))
    rules = _rules_by_name(profile, default)
    newer = _newer_outcome(profile, default)
    by_audit: dict[int, list[Segment]] = {}
    for name in profile.get("architectures") or ["SCMP_ARCH_X86_64"]:
        if name not in _ABIS:
            if name.startswith("SCMP_ARCH_"):
                continue  # of another machine; harmless here, and profiles list many
            raise InvalidRequest(f"seccomp profile: no architecture is called {name}")
        audit, numbers, first, end = _ABIS[name]
        by_audit.setdefault(audit, []).extend(_segments(rules, numbers, first, end, default, newer))
    program = _assemble(by_audit)
    if len(program) > _LIMIT:
        raise InvalidRequest(f"seccomp profile: needs {len(program)} instructions, the kernel takes {_LIMIT}")
    return struct.pack("<" + "HBBI" * len(program), *[field for instruction in program for field in instruction])


def flags_of(profile: dict[str, Any]) -> int:
    """The `flags` of an OCI seccomp object as bits for `load`."""
    bits = 0
    for name in profile.get("flags") or ():
        if name not in _FLAGS:
            raise InvalidRequest(f"seccomp profile: flag {name} is not supported")
        bits |= _FLAGS[name]
    return bits


def load(program: bytes, flags: int = 0) -> int:
    """Install `program` for the calling thread. Needs no_new_privs or CAP_SYS_ADMIN."""
    instructions = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(instructions))  # struct sock_fprog
    return syscall(_NR_SECCOMP, _SET_MODE_FILTER, flags, header, what="seccomp")


def listen(program: bytes) -> int:
    """`load`, and a descriptor by which the calls are answered that the program does not decide: seccomp_unotify(2)."""
    return load(program, _FILTER_FLAG_NEW_LISTENER)


def add_load(calls: Calls, program: bytes, flags: int = 0) -> None:
    """`load` as a call of a list."""
    header = struct.pack("HxxxxxxQ", len(program) // 8, calls.address(program))
    calls.add("load the seccomp program", _NR_SECCOMP, _SET_MODE_FILTER, flags, header)


def _outcome(action: str, data: int | None) -> int:
    if action == "SCMP_ACT_NOTIFY":
        raise Unsupported("seccomp profile: SCMP_ACT_NOTIFY is not supported", hint="use SCMP_ACT_ERRNO in the profile")
    if action not in _ACTIONS:
        raise InvalidRequest(f"seccomp profile: no action is called {action}")
    if action in _WITH_DATA:
        return _ACTIONS[action] | ((errno.EPERM if data is None else data) & 0xFFFF)
    return _ACTIONS[action]


def _newer_outcome(profile: dict[str, Any], default: int) -> int:
    if profile["defaultAction"] in ("SCMP_ACT_ALLOW", "SCMP_ACT_LOG", "SCMP_ACT_TRACE"):
        return default
    return _ACTIONS["SCMP_ACT_ERRNO"] | errno.ENOSYS


def _rules_by_name(profile: dict[str, Any], default: int) -> dict[str, list[Rule]]:
    found: dict[str, list[Rule]] = {}
    for entry in profile.get("syscalls") or ():
        outcome = _outcome(entry["action"], entry.get("errnoRet"))
        conditions = [_condition(c) for c in entry.get("args") or ()]
        if len({c.argument for c in conditions}) < len(conditions):
            alternatives = [Rule(outcome, (c,)) for c in conditions]
        else:
            alternatives = [Rule(outcome, tuple(conditions))]
        for name in entry["names"]:
            found.setdefault(name, []).extend(() if outcome == default else alternatives)
    return found


def _condition(entry: dict[str, Any]) -> Condition:
    index, op = entry["index"], entry["op"]
    if not 0 <= index < 6:
        raise InvalidRequest(f"seccomp profile: a call has no argument {index}")
    if op not in _COMPARE and op not in ("SCMP_CMP_MASKED_EQ", "SCMP_CMP_NE", "SCMP_CMP_EQ"):
        raise InvalidRequest(f"seccomp profile: no comparison is called {op}")
    return Condition(index, op, entry["value"] & (1 << 64) - 1, (entry.get("valueTwo") or 0) & (1 << 64) - 1)


def _segments(
    rules: dict[str, list[Rule]], numbers: dict[str, int], first: int, end: int, default: int, newer: int
) -> list[Segment]:
    """The segments of one ABI, whose numbers are `first` to `end`, ascending, neighbours different."""
    known = sorted((numbers[name], ways) for name, ways in rules.items() if name in numbers)
    last = known[-1][0] if known else end - 1
    found: list[Segment] = []
    here = first

    def add(start: int, outcome: int | tuple[Instruction, ...]) -> None:
        if not found or found[-1].outcome != outcome:
            found.append(Segment(start, outcome))

    for number, ways in known:
        if number > here:
            add(here, default)
        add(number, _decide(ways, default))
        here = number + 1
    if here < end:
        add(here, newer if here > last else default)
    return found


def _decide(ways: list[Rule], default: int) -> int | tuple[Instruction, ...]:
    """The outcome of one call: a word, or code that ends in returns."""
    for rule in ways:
        if not rule.conditions:
            return rule.outcome
    if not ways:
        return default
    code: list[Instruction] = []
    position = 0
    while position < len(ways):
        alike = _alike(ways, position)
        code += _any_of(alike) if len(alike) > 1 else _all_of(ways[position])
        position += len(alike)
    return (*code, (_RET, 0, 0, default))


def _alike(ways: list[Rule], position: int) -> list[Rule]:
    """The run of rules from `position` that compare one argument, all with EQ to 32-bit values, to one outcome."""
    first = ways[position]
    run = [first]

    def simple(rule: Rule) -> bool:
        if len(rule.conditions) != 1 or rule.outcome != first.outcome:
            return False
        (condition,) = rule.conditions
        return (
            condition.op == "SCMP_CMP_EQ"
            and condition.argument == first.conditions[0].argument
            and condition.value < 1 << 32
        )

    if simple(first):
        for rule in ways[position + 1 : position + 200]:
            if not simple(rule):
                break
            run.append(rule)
    return run


def _any_of(run: list[Rule]) -> list[Instruction]:
    """`argument in values`: one load of each half for all values of the run."""
    offset = _ARGS_OFFSET + 8 * run[0].conditions[0].argument
    count = len(run)
    code: list[Instruction] = [(_LD_ABS, 0, 0, offset + 4), (_JEQ, 0, count + 2, 0), (_LD_ABS, 0, 0, offset)]
    for left, rule in zip(range(count, 0, -1), run, strict=True):
        code.append((_JEQ, left - 1, 1 if left == 1 else 0, rule.conditions[0].value))
    return [*code, (_RET, 0, 0, run[0].outcome)]


def _all_of(rule: Rule) -> list[Instruction]:
    """All conditions, then the return; a condition that fails jumps behind it."""
    code: list[Instruction] = [(_RET, 0, 0, rule.outcome)]
    for condition in reversed(rule.conditions):
        code = _compare(condition, len(code)) + code
    return code


_COMPARE = {  # op -> (jump on the low half, whether the comparison is to be false)
    "SCMP_CMP_GT": (_JGT, False),
    "SCMP_CMP_GE": (_JGE, False),
    "SCMP_CMP_LE": (_JGT, True),
    "SCMP_CMP_LT": (_JGE, True),
}


def _compare(condition: Condition, size: int) -> list[Instruction]:
    """Falls through when `condition` holds, else jumps over the `size` instructions behind."""
    offset = _ARGS_OFFSET + 8 * condition.argument
    low_half: Instruction = (_LD_ABS, 0, 0, offset)
    high_half: Instruction = (_LD_ABS, 0, 0, offset + 4)
    high, low = condition.value >> 32, condition.value & 0xFFFFFFFF
    if condition.op == "SCMP_CMP_EQ":
        return [high_half, (_JEQ, 0, size + 2, high), low_half, (_JEQ, 0, size, low)]
    if condition.op == "SCMP_CMP_NE":
        return [high_half, (_JEQ, 0, 2, high), low_half, (_JEQ, size, 0, low)]
    if condition.op == "SCMP_CMP_MASKED_EQ":
        want_high, want_low = condition.second >> 32, condition.second & 0xFFFFFFFF
        return [
            high_half, (_AND, 0, 0, high), (_JEQ, 0, size + 3, want_high),
            low_half, (_AND, 0, 0, low), (_JEQ, 0, size, want_low),
        ]  # fmt: skip
    jump, inverted = _COMPARE[condition.op]
    yes, no = (size, 0) if inverted else (0, size)
    return [high_half, (_JGT, yes + 3, 0, high), (_JEQ, 0, no + 2, high), low_half, (jump, yes, no, low)]


def _assemble(by_audit: dict[int, list[Segment]]) -> list[Instruction]:
    """The whole program: the architecture first, then its tree."""
    code: list[Instruction] = [(_RET, 0, 0, _RET_KILL_THREAD)]
    for audit, segments in sorted(by_audit.items()):
        ordered = sorted(segments, key=lambda s: s.start)
        if ordered[0].start:
            ordered.insert(0, Segment(0, _RET_KILL_THREAD))
        elif audit == _AUDIT_X86_64 and all(s.start < X32_BIT for s in ordered):
            ordered.append(Segment(X32_BIT, _RET_KILL_THREAD))
        tree = [(_LD_ABS, 0, 0, _NR_OFFSET), *_tree(ordered)]
        code = [(_JEQ, 1, 0, audit), (_JA, 0, 0, len(tree)), *tree, *code]
    return [(_LD_ABS, 0, 0, _ARCH_OFFSET), *code]


def _tree(segments: list[Segment]) -> list[Instruction]:
    """Find the segment of the loaded number by halving."""
    if len(segments) == 1:
        outcome = segments[0].outcome
        return [(_RET, 0, 0, outcome)] if isinstance(outcome, int) else list(outcome)
    middle = len(segments) // 2
    left, right = _tree(segments[:middle]), _tree(segments[middle:])
    start = segments[middle].start
    if len(left) <= 255:
        return [(_JGE, len(left), 0, start), *left, *right]
    return [(_JGE, 0, 1, start), (_JA, 0, 0, len(left)), *left, *right]
