"""The seccomp compiler, held against an evaluator of the profile and against libseccomp, call by call."""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import os
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ambi.core.errors import InvalidRequest, Unsupported
from ambi.linux import seccomp
from ambi.linux.capabilities import NAMES
from ambi.linux.seccomp_profile import default_profile
from ambi.linux.syscall_table import I386, X32, X86_64

X86_64_AUDIT, I386_AUDIT, AARCH64_AUDIT = 0xC000003E, 0x40000003, 0xC00000B7
ALLOW, EPERM, ENOSYS, KILL = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS, 0
DOCKER = [
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID", "CAP_SETUID",
    "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
]  # fmt: skip
ALL_ARCHITECTURES = ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]


def interpret(program: bytes, audit: int, number: int, args: tuple[int, ...] = ()) -> int:
    """What the kernel's cBPF machine returns for one call."""
    full = (*args, *(0,) * (6 - len(args)))
    data = struct.pack("<IIQ6Q", number & 0xFFFFFFFF, audit, 0, *full)
    code = list(struct.iter_unpack("<HBBI", program))
    accumulator, at = 0, 0
    while True:
        op, yes, no, k = code[at]
        at += 1
        if op == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, k)
        elif op == 0x54:
            accumulator &= k
        elif op == 0x06:
            return int(k)
        elif op == 0x05:
            at += k
        elif op in (0x15, 0x25, 0x35, 0x45):
            holds = {0x15: accumulator == k, 0x25: accumulator > k, 0x35: accumulator >= k, 0x45: bool(accumulator & k)}[op]
            at += yes if holds else no
        else:
            raise AssertionError(f"instruction {op:#x}")


def profile(*entries: dict[str, Any], default: str = "SCMP_ACT_ERRNO", **more: Any) -> dict[str, Any]:
    return {"defaultAction": default, "architectures": ["SCMP_ARCH_X86_64"], "syscalls": list(entries), **more}


def allow(name: str, *args: tuple[int, str, int] | tuple[int, str, int, int]) -> dict[str, Any]:
    conditions = [
        {"index": a[0], "op": f"SCMP_CMP_{a[1]}", "value": a[2], "valueTwo": a[3] if len(a) > 3 else 0} for a in args
    ]
    return {"names": [name], "action": "SCMP_ACT_ALLOW", "args": conditions}


EDGES = [
    0,
    1,
    7,
    8,
    9,
    (1 << 32) - 1,
    1 << 32,
    (1 << 32) + 7,
    (1 << 32) + 8,
    (8 << 32) | 7,
    (8 << 32) | 8,
    (8 << 32) | 9,
    (1 << 64) - 1,
]
HOLDS: dict[str, Callable[[int, int, int], bool]] = {
    "EQ": lambda x, v, _: x == v,
    "NE": lambda x, v, _: x != v,
    "LT": lambda x, v, _: x < v,
    "LE": lambda x, v, _: x <= v,
    "GE": lambda x, v, _: x >= v,
    "GT": lambda x, v, _: x > v,
    "MASKED_EQ": lambda x, v, w: x & v == w,
}


@pytest.mark.parametrize("op", HOLDS)
@pytest.mark.parametrize("value", [0, 8, (1 << 32) + 8, (8 << 32) | 8, (1 << 64) - 1])
def test_comparisons(op: str, value: int) -> None:
    second = value & 0x8_0000_0008 if op == "MASKED_EQ" else 0
    program = seccomp.compile(profile(allow("read", (3, op, value, second))))
    for argument in EDGES:
        expected = ALLOW if HOLDS[op](argument, value, second) else EPERM
        assert interpret(program, X86_64_AUDIT, X86_64["read"], (0, 0, 0, argument)) == expected, (op, value, argument)


def test_conditions_of_one_entry_hold_together() -> None:
    program = seccomp.compile(profile(allow("read", (0, "EQ", 1), (1, "GE", 5))))
    verdicts = [interpret(program, X86_64_AUDIT, 0, args) for args in ((1, 5), (1, 4), (2, 5))]
    assert verdicts == [ALLOW, EPERM, EPERM]


def test_conditions_on_one_argument_are_alternatives() -> None:
    program = seccomp.compile(profile(allow("read", (0, "EQ", 1), (0, "EQ", 5))))
    assert [interpret(program, X86_64_AUDIT, 0, (x,)) for x in (1, 5, 3)] == [ALLOW, ALLOW, EPERM]


@pytest.mark.parametrize("count", [2, 3, 199, 200, 201, 350])
def test_many_values_of_one_argument(count: int) -> None:
    program = seccomp.compile(profile(*[allow("read", (2, "EQ", 10 * n)) for n in range(count)]))
    for n in range(count + 1):
        expected = ALLOW if n < count else EPERM
        assert interpret(program, X86_64_AUDIT, 0, (0, 0, 10 * n)) == expected
        assert interpret(program, X86_64_AUDIT, 0, (0, 0, 10 * n + 1)) == EPERM
        assert interpret(program, X86_64_AUDIT, 0, (0, 0, (1 << 32) | 10 * n)) == EPERM


def test_unconditional_entry_wins() -> None:
    program = seccomp.compile(profile(allow("read", (0, "EQ", 1)), allow("read")))
    assert interpret(program, X86_64_AUDIT, 0, (2,)) == ALLOW


def test_newer_calls_are_missing_and_not_denied() -> None:
    program = seccomp.compile(profile(allow("read"), allow("openat2")))
    last = X86_64["openat2"]
    assert [interpret(program, X86_64_AUDIT, n) for n in (last, last - 1, last + 1, 0x3FFFFFFF)] == [
        ALLOW,
        EPERM,
        ENOSYS,
        ENOSYS,
    ]


def test_other_architectures_are_killed() -> None:
    program = seccomp.compile(profile(allow("read")))
    assert interpret(program, AARCH64_AUDIT, 0) == KILL
    assert interpret(program, I386_AUDIT, I386["read"]) == KILL
    assert interpret(program, X86_64_AUDIT, X32["read"]) == KILL


def test_every_architecture_has_its_own_numbers() -> None:
    program = seccomp.compile({**profile(allow("execve"), allow("ioctl")), "architectures": ALL_ARCHITECTURES})
    for audit, numbers in ((X86_64_AUDIT, X86_64), (X86_64_AUDIT, X32), (I386_AUDIT, I386)):
        for name, number in numbers.items():
            expected = ALLOW if name in ("execve", "ioctl") else None
            found = interpret(program, audit, number)
            assert (found == ALLOW) == (expected == ALLOW), name


@pytest.mark.parametrize(
    "action,data,word",
    [
        ("SCMP_ACT_KILL", None, 0),
        ("SCMP_ACT_KILL_PROCESS", None, 0x80000000),
        ("SCMP_ACT_TRAP", None, 0x30000),
        ("SCMP_ACT_ERRNO", None, EPERM),
        ("SCMP_ACT_ERRNO", 38, ENOSYS),
        ("SCMP_ACT_TRACE", 7, 0x7FF00007),
        ("SCMP_ACT_LOG", None, 0x7FFC0000),
    ],
)
def test_actions(action: str, data: int | None, word: int) -> None:
    entry = {"names": ["read"], "action": action, **({} if data is None else {"errnoRet": data})}
    program = seccomp.compile(profile(entry, default="SCMP_ACT_ALLOW"))
    assert interpret(program, X86_64_AUDIT, 0) == word
    assert interpret(program, X86_64_AUDIT, 1) == ALLOW


@pytest.mark.parametrize(
    "broken,error",
    [
        (profile(default="SCMP_ACT_SOMETHING"), InvalidRequest),
        (profile(default="SCMP_ACT_NOTIFY"), Unsupported),
        (profile(allow("read", (6, "EQ", 0))), InvalidRequest),
        (profile(allow("read", (0, "ABOUT", 0))), InvalidRequest),
        ({**profile(), "architectures": ["VAX"]}, InvalidRequest),
        (profile(*[allow("read", (0, "GT", 5 * n), (1, "GT", n)) for n in range(800)]), InvalidRequest),
    ],
)
def test_refusals(broken: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match="seccomp profile"):
        seccomp.compile(broken)


def test_flags() -> None:
    assert seccomp.flags_of({"flags": ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW"]}) == 6
    with pytest.raises(InvalidRequest, match="WHATEVER"):
        seccomp.flags_of({"flags": ["WHATEVER"]})


# Against libseccomp, which runc uses

_OPERATIONS = {"NE": 1, "LT": 2, "LE": 3, "EQ": 4, "GE": 5, "GT": 6, "MASKED_EQ": 7}


class arg_cmp(ctypes.Structure):  # struct scmp_arg_cmp, seccomp.h
    _fields_ = [("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64)]


def _by_libseccomp(library: Any, config: dict[str, Any]) -> bytes:
    context = library.seccomp_init(EPERM)
    for token in (0x40000003, 0x4000003E):  # SCMP_ARCH_X86, SCMP_ARCH_X32 (which carries no 64-bit mark)
        library.seccomp_arch_add(context, token)
    for entry in config["syscalls"]:
        action = ALLOW if entry["action"] == "SCMP_ACT_ALLOW" else 0x50000 | entry["errnoRet"]
        for name in entry["names"]:
            number = library.seccomp_syscall_resolve_name(name.encode())
            conditions = [
                arg_cmp(a["index"], _OPERATIONS[a["op"].removeprefix("SCMP_CMP_")], a["value"], a.get("valueTwo", 0))
                for a in entry.get("args", ())
            ]
            if number != -1:
                array = (arg_cmp * max(1, len(conditions)))(*conditions)
                library.seccomp_rule_add_array(context, ctypes.c_uint32(action), number, len(conditions), array)
    fd = os.memfd_create("filter")
    assert library.seccomp_export_bpf(context, fd) == 0
    program = os.pread(fd, 1 << 20, 0)
    os.close(fd)
    library.seccomp_release(context)
    return program


@pytest.fixture(scope="module")
def library() -> Iterator[Any]:
    name = ctypes.util.find_library("seccomp")
    assert name, "libseccomp2 is not installed (Debian package libseccomp2)"
    found = ctypes.CDLL(name)
    found.seccomp_init.restype = ctypes.c_void_p
    found.seccomp_init.argtypes = [ctypes.c_uint32]
    found.seccomp_arch_add.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
    found.seccomp_export_bpf.argtypes = [ctypes.c_void_p, ctypes.c_int]
    found.seccomp_release.argtypes = [ctypes.c_void_p]
    found.seccomp_rule_add_array.argtypes = [
        ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.POINTER(arg_cmp),
    ]  # fmt: skip
    yield found


@pytest.mark.parametrize(
    "held", [[], DOCKER, list(NAMES), ["CAP_SYS_ADMIN"], ["CAP_SYSLOG"]], ids=["none", "docker", "all", "admin", "syslog"]
)
def test_default_profile_as_libseccomp_makes_it(library: Any, held: list[str]) -> None:
    config = default_profile(held)
    theirs, ours = _by_libseccomp(library, config), seccomp.compile(config)
    numbers_there = {n: library.seccomp_syscall_resolve_name(n.encode()) for n in {*X86_64, *I386}}
    known = {
        n for n, there in numbers_there.items() if there >= 0 or (n not in X86_64 and there != -1)
    }  # below -1: i386 alone
    arguments = [
        (x,) for x in (0, 1, 8, 9, 16, 37, 38, 39, 40, 41, 0x20000, 0x20008, 0x7E020000, 0x11, 0x10000000, 0xFFFFFFFF)
    ]
    for audit, numbers in ((X86_64_AUDIT, X86_64), (I386_AUDIT, I386), (X86_64_AUDIT, X32)):
        for name in known & set(numbers):
            for args in arguments if name in ("socket", "personality", "clone", "clone3") else [(0,)]:
                verdicts = [interpret(p, audit, numbers[name], args) for p in (theirs, ours)]
                assert verdicts[0] == verdicts[1], (name, audit, args)


@pytest.mark.parametrize(
    "capability,name",
    [
        ("CAP_SYS_ADMIN", "mount"), ("CAP_SYS_PTRACE", "kcmp"), ("CAP_SYS_MODULE", "init_module"),
        ("CAP_SYS_TIME", "settimeofday"), ("CAP_DAC_READ_SEARCH", "open_by_handle_at"), ("CAP_SYS_CHROOT", "chroot"),
        ("CAP_BPF", "bpf"), ("CAP_SYSLOG", "syslog"),
        ("CAP_SYS_NICE", "mbind"), ("CAP_SYS_BOOT", "reboot"), ("CAP_SYS_RAWIO", "iopl"), ("CAP_PERFMON", "perf_event_open"),
    ],
)  # fmt: skip
def test_capabilities_open_their_calls(capability: str, name: str) -> None:
    without, within = (seccomp.compile(default_profile(held)) for held in ([], [capability]))
    assert interpret(without, X86_64_AUDIT, X86_64[name]) == EPERM
    assert interpret(within, X86_64_AUDIT, X86_64[name]) == ALLOW


def test_clone_of_the_default_profile() -> None:
    program = seccomp.compile(default_profile(DOCKER))
    assert interpret(program, X86_64_AUDIT, X86_64["clone"], (0x11,)) == ALLOW
    assert interpret(program, X86_64_AUDIT, X86_64["clone"], (0x10000011,)) == EPERM
    assert interpret(program, X86_64_AUDIT, X86_64["clone3"]) == ENOSYS


def test_the_kernel_takes_it() -> None:
    pid = os.fork()
    if pid == 0:
        from ambi.linux import process

        process.no_new_privileges()
        seccomp.load(seccomp.compile(default_profile(DOCKER)))
        try:
            process.unshare(process.CLONE_NEWUSER)
        except PermissionError:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
