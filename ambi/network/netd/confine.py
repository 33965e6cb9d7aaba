"""What netd gives up before it reads the first byte of an instance or of a client."""

from __future__ import annotations

import os
from typing import Any

from ambi.linux import capabilities, process, seccomp

_UID = 0x6FFFFF35  # no distribution allocates there, and workers are above 0x70000000
_PR_SET_KEEPCAPS = 8  # linux/prctl.h
# To bind ports below 1024 and sockets to bridges; to find out which process has a port (proc(5), /proc/PID/fd).
_KEPT = ["CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH"]
# CAP_SYS_PTRACE is for reading /proc alone, and nothing here makes or changes files, processes or namespaces.
_REFUSED = [
    "execve", "execveat", "fork", "vfork", "clone", "clone3", "ptrace", "process_vm_readv", "process_vm_writev",
    "pidfd_getfd", "pidfd_send_signal", "process_madvise", "kcmp", "perf_event_open", "bpf", "userfaultfd", "io_uring_setup",
    "mount", "umount2", "move_mount", "open_tree", "fsopen", "fsmount", "pivot_root", "chroot", "setns", "unshare",
    "open_by_handle_at", "unlink", "unlinkat", "rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat",
    "mkdir", "mkdirat", "mknod", "mknodat", "chmod", "fchmodat", "chown", "fchownat", "creat", "truncate", "keyctl",
    "add_key", "init_module", "finit_module", "kexec_load", "kexec_file_load", "reboot", "swapon", "swapoff",
]  # fmt: skip


def confine() -> None:
    """An id of its own where it runs as root, few capabilities, and a seccomp filter. Descriptors stay open."""
    keep = capabilities.mask_of(_KEPT) & capabilities.permitted()
    if os.geteuid() == 0:
        capabilities.limit_bounding(keep, capabilities.bounding())
        process.prctl(_PR_SET_KEEPCAPS, 1)
        process.become(_UID, _UID, ())
    capabilities.set_process(keep, keep, 0)
    process.set_dumpable(False)
    process.no_new_privileges()
    seccomp.load(seccomp.compile(_profile()))


def _profile() -> dict[str, Any]:
    return {
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{"names": _REFUSED, "action": "SCMP_ACT_ERRNO"}],
    }
