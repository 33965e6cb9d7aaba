"""How the worker gives up everything but its descriptors.

Entered after all imports and before the first untrusted byte: private mount, network, IPC, UTS and PID namespaces with an
empty root, an id of its own without capabilities, no_new_privs, limits, and a seccomp filter that opens, connects, forks
and executes nothing. What is not allowed on a host (namespaces inside a container, say) is left out; the ids, capabilities
and the filter never are when the engine runs as root.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ambi.linux import capabilities, mount, process, seccomp
from images.layers.limits import MAX_APPARENT, MEMORY

_UID_BASE = 0x70000000  # no distribution allocates there; the pid is added, so that workers cannot touch one another

_CALLS = [
    "brk", "clock_gettime", "close", "exit", "exit_group", "fstat", "ftruncate", "futex", "getpid", "getrandom", "gettid",
    "lseek", "madvise", "mremap", "munmap", "newfstatat", "pread64", "pwrite64", "read", "recvfrom", "recvmsg",
    "restart_syscall",
    "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sched_yield", "sendmsg", "sendto", "sigaltstack", "write", "writev",
]  # fmt: skip
_PROT_EXEC = 4


def enter(keep: int, helper: Callable[[Callable[[], object]], None] | None = None) -> None:
    """Jail this process, which keeps the descriptor `keep` and its standard ones. Returns in a child; the parent waits.

    helper: starts another thread, which first calls what it is given: the filter is each thread's own.
    """
    process.die_with_parent()
    uid = _UID_BASE + os.getpid()
    _namespaces(keep)
    process.close_range(3, keep - 1) if keep > 3 else None
    process.close_range(keep + 1)
    _limits()
    if os.geteuid() == 0:
        os.setgroups(())
        capabilities.limit_bounding(0, capabilities.bounding())
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    capabilities.set_process(0, 0, 0)
    process.die_with_parent()  # forgotten when the ids changed
    process.set_dumpable(False)
    process.no_new_privileges()
    program = seccomp.compile(_profile())
    if helper is not None:
        helper(lambda: seccomp.load(program))
    seccomp.load(program)


def _namespaces(keep: int) -> None:
    if not _unshare(process.CLONE_NEWNS):
        return
    mount.mount(None, "/", None, mount.MS_REC | mount.MS_PRIVATE)
    for flag in (process.CLONE_NEWNET, process.CLONE_NEWIPC, process.CLONE_NEWUTS):
        _unshare(flag)
    if _unshare(process.CLONE_NEWPID):
        _continue_in_child(keep)
    # Any directory will do as a place; in this namespace alone it is an empty file system.
    mount.mount(
        Path("ambi-worker"), "/proc", "tmpfs", mount.MS_NOSUID | mount.MS_NODEV | mount.MS_RDONLY, "size=4k,mode=0555"
    )
    os.chroot("/proc")
    os.chdir("/")


def _unshare(flag: int) -> bool:
    try:
        process.unshare(flag)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.ENOSPC, errno.EINVAL):  # not root, the host's limit, not in this kernel
            return False
        raise
    return True


def _continue_in_child(keep: int) -> None:
    """Fork into the new PID namespace; this process only waits, and ends as the child does."""
    child = os.fork()
    if child == 0:
        process.die_with_parent()
        return
    os.close(keep)
    _, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0x7F)


def _limits() -> None:
    for what, limit in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, MAX_APPARENT + (64 << 30)),
        (resource.RLIMIT_NOFILE, 32),
    ):
        hard = resource.getrlimit(what)[1]
        value = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(what, (value, value))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def _profile() -> dict[str, Any]:
    no_code = [{"index": 2, "value": _PROT_EXEC, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [
            {"names": _CALLS, "action": "SCMP_ACT_ALLOW"},
            {"names": ["mmap", "mprotect"], "action": "SCMP_ACT_ALLOW", "args": no_code},
        ],
    }
