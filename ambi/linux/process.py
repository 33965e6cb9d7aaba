"""Processes: clone3(2), namespaces, prctl(2), descriptors and keyrings.

`clone3` is the raw call with Python's fork handlers around it and the interpreter's lock held: else a child of a process
with threads could wait for ever for a lock whose holder it does not have. The C library's handlers, for malloc's locks, are
not run: use it in a single-threaded process, for a child that ends in execve or `os._exit` whatever happens, with all
signals blocked around it.
"""

from __future__ import annotations

import ctypes
import os
import signal
from typing import NamedTuple

from ambi.linux.libc import libc, syscall

# linux/sched.h
CLONE_FS = 0x00000200
CLONE_PARENT = 0x00008000
CLONE_NEWTIME = 0x00000080
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
CLONE_PIDFD = 0x00001000
CLONE_INTO_CGROUP = 0x200000000

# linux/prctl.h
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_GET_DUMPABLE = 3
PR_SET_KEEPCAPS = 8
PR_SET_NAME = 15
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
PR_CAP_AMBIENT_CLEAR_ALL = 4

CLOSE_RANGE_CLOEXEC = 4
_KEYCTL_JOIN_SESSION_KEYRING = 1
_NR_SETGROUPS, _NR_SETRESUID, _NR_SETRESGID = 116, 117, 119
_NR_PRCTL, _NR_KEYCTL, _NR_UNSHARE, _NR_SETNS, _NR_CLONE3, _NR_CLOSE_RANGE = 157, 250, 272, 308, 435, 436

NAMESPACES = {  # type in config.json -> (flag, file below /proc/PID/ns)
    "cgroup": (CLONE_NEWCGROUP, "cgroup"),
    "ipc": (CLONE_NEWIPC, "ipc"),
    "mount": (CLONE_NEWNS, "mnt"),
    "network": (CLONE_NEWNET, "net"),
    "pid": (CLONE_NEWPID, "pid"),
    "time": (CLONE_NEWTIME, "time"),
    "user": (CLONE_NEWUSER, "user"),
    "uts": (CLONE_NEWUTS, "uts"),
}

_holding_syscall = ctypes.PyDLL(None, use_errno=True).syscall  # keeps the interpreter's lock during the call
_holding_syscall.restype = ctypes.c_long
_holding_syscall.argtypes = [ctypes.c_long, ctypes.c_void_p, ctypes.c_size_t]
libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4


class clone_args(ctypes.Structure):  # struct clone_args, linux/sched.h
    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            "flags", "pidfd", "child_tid", "parent_tid", "exit_signal", "stack", "stack_size", "tls", "set_tid",
            "set_tid_size", "cgroup",
        )
    ]  # fmt: skip


class Child(NamedTuple):
    """What `clone3` returns: `pid` (0 in the child) and `pidfd` (CLOEXEC, of the parent; -1 in the child)."""

    pid: int
    pidfd: int


def clone3(flags: int, *, cgroup: int | None = None) -> Child:
    """A child with the namespaces of `flags`, born in the v2 cgroup whose directory is open as `cgroup`.

    With CLONE_PARENT the child is a sibling, and ends with the caller's own exit signal. For processes of one thread:
    Python's locks are looked after, as in os.fork; what another thread holds of the C library's stays locked in the child.
    """
    pidfd = ctypes.c_int(-1)
    arguments = clone_args(flags=flags | CLONE_PIDFD, pidfd=ctypes.addressof(pidfd))
    if not flags & CLONE_PARENT:
        arguments.exit_signal = signal.SIGCHLD
    if cgroup is not None:
        arguments.flags |= CLONE_INTO_CGROUP
        arguments.cgroup = cgroup
    python = ctypes.pythonapi
    python.PyOS_BeforeFork()
    pid = _holding_syscall(_NR_CLONE3, ctypes.addressof(arguments), ctypes.sizeof(arguments))
    code = ctypes.get_errno()
    if pid == 0:
        python.PyOS_AfterFork_Child()
    else:
        python.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(code, os.strerror(code), "clone3")
    return Child(pid, pidfd.value if pid else -1)


def unshare(flags: int) -> None:
    syscall(_NR_UNSHARE, flags, what="unshare")


def setns(fd: int, flags: int) -> None:
    """Join the namespace(s) of `fd`: a namespace file, or a pidfd for all that `flags` names at once (Linux 5.8)."""
    syscall(_NR_SETNS, fd, flags, what="setns")


def prctl(option: int, value: int = 0, third: int = 0, fourth: int = 0) -> int:
    """prctl(2) of an option with integer arguments."""
    return syscall(_NR_PRCTL, option, value, third, fourth, 0, what=f"prctl {option}")


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the kernel send `number` when the parent ends. Changing ids or capabilities forgets it: ask again then."""
    prctl(PR_SET_PDEATHSIG, number)


def set_dumpable(value: bool) -> None:
    """Whether others with the same ids may ptrace this process and follow its /proc/PID/exe; execve sets it again."""
    prctl(PR_SET_DUMPABLE, int(value))


def no_new_privileges() -> None:
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def become_subreaper() -> None:
    prctl(PR_SET_CHILD_SUBREAPER, 1)


def close_on_exec(first: int, last: int = 0xFFFFFFFF) -> None:
    """Mark all descriptors from `first` to `last` CLOEXEC (close_range(2), Linux 5.11)."""
    syscall(_NR_CLOSE_RANGE, first, last, CLOSE_RANGE_CLOEXEC, what="close_range")


def close_range(first: int, last: int = 0xFFFFFFFF) -> None:
    """Close all descriptors from `first` to `last`."""
    syscall(_NR_CLOSE_RANGE, first, last, 0, what="close_range")


def new_session_keyring(name: str) -> None:
    """Leave the inherited session keyring for a fresh one called `name`."""
    syscall(_NR_KEYCTL, _KEYCTL_JOIN_SESSION_KEYRING, name.encode(), 0, 0, 0, what="keyctl")


def set_domain_name(name: str) -> None:
    encoded = name.encode()
    syscall(171, encoded, len(encoded), what="setdomainname")


def become(uid: int, gid: int, groups: tuple[int, ...]) -> None:
    """Take all three user ids, all three group ids and exactly `groups`.

    By system calls, and not by the C library's functions: those wait for every other thread to do the same, and after a raw
    clone the library counts threads that only the parent has.
    """
    array = (ctypes.c_uint32 * max(1, len(groups)))(*groups)
    syscall(_NR_SETGROUPS, len(groups), ctypes.addressof(array), what="setgroups")
    syscall(_NR_SETRESGID, gid, gid, gid, what="setresgid")
    syscall(_NR_SETRESUID, uid, uid, uid, what="setresuid")


def reset_signals() -> None:
    """Default dispositions for all signals (Python ignores two) and an empty mask: what a program expects at its start."""
    for number in range(1, 65):
        if number in (32, 33):  # of the C library
            continue
        if signal.getsignal(number) != signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def ignored_signals() -> list[int]:
    """The signals that are ignored here, and would be by a program executed from here."""
    return [n for n in range(1, 65) if n not in (32, 33) and signal.getsignal(n) is signal.SIG_IGN]


def start_time(pid: int) -> int:
    """Field 22 of /proc/PID/stat: clock ticks since boot, which tells a reused pid from the first."""
    with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
        return int(os.read(file.fileno(), 4096).rpartition(b")")[2].split()[19])
