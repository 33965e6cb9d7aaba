"""The system calls of a running monitor: all else is refused with EPERM. Loaded last, for every thread at once.

There is no way to name a file, a process or an address on a network: nothing opens, connects, executes, forks, signals
others or maps memory that could be executed. Descriptors are those that the monitor was given.
"""

from __future__ import annotations

from typing import Any

from ambi.linux import seccomp

DATA = (
    "read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 lseek close fstat newfstatat fcntl dup "
    "fsync fdatasync fallocate ftruncate sendmsg recvmsg sendto recvfrom shutdown eventfd2 poll ppoll memfd_create"
)
MEMORY = "munmap mremap madvise brk"  # mmap and mprotect: not for code
THREADS = (
    "futex sched_yield rt_sigreturn rt_sigprocmask rt_sigaction sigaltstack set_robust_list rseq membarrier gettid getpid "
    "exit exit_group restart_syscall"
)
ABOUT = "clock_gettime clock_nanosleep nanosleep gettimeofday getrandom uname"
IOCTL_TYPES = (0xAE, 0xAF, ord("T"))  # KVM, vhost, tun: the second byte of the number
IOCTL_TYPE_MASK = 0xFF00
PROT_EXEC = 4
EPERM = 1
PATHLESS = 0x1000  # AT_EMPTY_PATH: newfstatat of a descriptor


def profile(pid: int) -> dict[str, Any]:
    """As `linux.seccomp` of config.json. pid: the monitor's own, the only one whose threads it may signal."""
    allow = {"action": "SCMP_ACT_ALLOW"}
    names = [name for group in (DATA, MEMORY, THREADS, ABOUT) for name in group.split() if name != "newfstatat"]
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": EPERM,
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [
            {"names": names, **allow},
            {"names": ["newfstatat"], **allow, "args": [_masked(3, PATHLESS, PATHLESS)]},
            {"names": ["mmap", "mprotect"], **allow, "args": [_masked(2, PROT_EXEC, 0)]},
            {"names": ["tgkill"], **allow, "args": [{"index": 0, "value": pid, "op": "SCMP_CMP_EQ"}]},
            *(
                {"names": ["ioctl"], **allow, "args": [_masked(1, IOCTL_TYPE_MASK, kind << 8)]}
                for kind in IOCTL_TYPES
            ),
        ],
    }  # fmt: skip


def _masked(index: int, mask: int, value: int) -> dict[str, Any]:
    return {"index": index, "value": mask, "valueTwo": value, "op": "SCMP_CMP_MASKED_EQ"}


def load(pid: int) -> None:
    """Install it for all threads of this process, which must have given up its privileges."""
    seccomp.load(seccomp.compile(profile(pid)), 1)  # SECCOMP_FILTER_FLAG_TSYNC
