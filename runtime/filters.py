"""Compiled seccomp programs, kept: nearly all containers share one profile, and a zygote compiles it for all of them."""

from __future__ import annotations

from typing import Any

from ambi.linux import seccomp, seccomp_profile
from runtime.finish import Filter

# What Docker gives a container that asks for nothing: the capabilities that nearly every profile is made for.
DOCKER_CAPABILITIES = (
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID", "CAP_SETUID",
    "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
)  # fmt: skip
_KEPT = 16
_programs: dict[str, Filter] = {}


def program_of(profile: dict[str, Any] | None) -> Filter:
    """The program of an OCI seccomp object, empty for None; errors as ambi.linux.seccomp.compile."""
    if not profile:
        return Filter(b"", 0)
    key = repr(profile)
    found = _programs.get(key)
    if found is None:
        found = Filter(seccomp.compile(profile), seccomp.flags_of(profile))
        if len(_programs) >= _KEPT:
            _programs.clear()
        _programs[key] = found
    return found


def warm() -> None:
    """Compile the usual profile ahead, once in a process and its forks."""
    if not _programs:
        program_of(seccomp_profile.default_profile(DOCKER_CAPABILITIES))
