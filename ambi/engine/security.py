"""Capabilities, seccomp, masked paths: Docker's words into config.json's."""

from __future__ import annotations

import functools
import json
from typing import Any, NamedTuple

from ambi.core.errors import InvalidRequest
from ambi.engine import annotation
from ambi.engine.body import Body
from ambi.linux.capabilities import NAMES
from ambi.linux.seccomp_profile import default_profile

# moby: oci/caps/defaults.go
DEFAULT_CAPABILITIES = (
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID", "CAP_SETUID",
    "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
)  # fmt: skip
# moby: oci/defaults.go
MASKED_PATHS = (
    "/proc/asound", "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
    "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap",
)  # fmt: skip
READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")

_PROFILE_LIMIT = 1 << 20


class SecurityOptions(NamedTuple):
    """What `--security-opt` asks for. seccomp: a profile's JSON text, "unconfined", or "" for the default."""

    no_new_privileges: bool
    seccomp: str


def parse_options(host: Body) -> SecurityOptions:
    """Raises InvalidRequest for what is not known."""
    privileges, seccomp = False, ""
    for item in host.strings("SecurityOpt"):
        name, separator, value = item.partition("=")
        if not separator:
            name, _, value = item.partition(":")
        if name == "no-new-privileges":
            if value not in ("", "true", "false"):
                raise InvalidRequest(f"invalid --security-opt: {item}", hint="for example --security-opt no-new-privileges")
            privileges = value != "false"
        elif name == "seccomp" and value:
            seccomp = value if value != "builtin" else ""
        elif (name, value) not in (("apparmor", "unconfined"), ("label", "disable")):
            raise InvalidRequest(
                f"--security-opt {item} is not supported",
                hint="no-new-privileges, seccomp=FILE|unconfined and systempaths=unconfined are",
            )
    return SecurityOptions(privileges, seccomp)


def capabilities(host: Body) -> tuple[str, ...]:
    """The set that CapAdd, CapDrop and Privileged make of Docker's defaults, in the order of their numbers."""
    if host.flag("Privileged"):
        return NAMES
    add, drop = _names(host, "CapAdd"), _names(host, "CapDrop")
    if "ALL" in add:
        wanted = set(NAMES) - drop
    elif "ALL" in drop:
        wanted = add
    else:
        wanted = (set(DEFAULT_CAPABILITIES) - drop) | add
    return tuple(name for name in NAMES if name in wanted)


def _names(host: Body, key: str) -> set[str]:
    found = set()
    for item in host.strings(key):
        name = item.upper()
        if name != "ALL" and not name.startswith("CAP_"):
            name = f"CAP_{name}"
        if name != "ALL" and name not in NAMES:
            raise InvalidRequest(
                f'invalid {key}: unknown capability: "{name}"', hint="`man 7 capabilities` lists them, for example NET_ADMIN"
            )
        found.add(name)
    return found


def capability_sets(names: tuple[str, ...]) -> dict[str, list[str]]:
    """As Docker gives them: nothing inheritable, nothing ambient."""
    return {"bounding": list(names), "effective": list(names), "permitted": list(names)}


def seccomp(host: Body, options: SecurityOptions, names: tuple[str, ...]) -> dict[str, Any] | None:
    """The `linux.seccomp` member, None for no filter."""
    if options.seccomp == "unconfined" or (host.flag("Privileged") and not options.seccomp):
        return None
    if not options.seccomp:
        return _default(names, annotation.has_vsock(host))
    if len(options.seccomp) > _PROFILE_LIMIT:
        raise InvalidRequest("--security-opt seccomp: the profile is larger than 1 MiB", hint="give a smaller profile")
    try:
        profile = json.loads(options.seccomp)
        return convert(profile, names)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidRequest(f"Decoding seccomp profile failed: {error}", hint="give a path to a JSON profile") from error


@functools.lru_cache(maxsize=64)
def _default(names: tuple[str, ...], vsock: bool) -> dict[str, Any]:
    """Shared between instances with the same capabilities; never changed by anyone."""
    return default_profile(names, vsock=vsock)


_ARCHITECTURES = ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]


def convert(profile: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Docker's profile format (`archMap`, rules with `includes` and `excludes`) as an OCI seccomp object."""
    architectures = profile.get("architectures") or []
    for entry in profile.get("archMap") or []:
        if entry["architecture"] == "SCMP_ARCH_X86_64":
            architectures = ["SCMP_ARCH_X86_64", *(entry.get("subArchitectures") or [])]
    result: dict[str, Any] = {
        "defaultAction": profile["defaultAction"],
        "architectures": architectures or _ARCHITECTURES,
        "syscalls": [_rule(rule) for rule in profile.get("syscalls") or [] if _applies(rule, names)],
    }
    for key in ("defaultErrnoRet", "flags"):
        if profile.get(key) is not None:
            result[key] = profile[key]
    return result


def _rule(rule: dict[str, Any]) -> dict[str, Any]:
    found = {"names": rule.get("names") or [rule["name"]], "action": rule["action"]}
    for key in ("args", "errnoRet"):
        if rule.get(key) is not None:
            found[key] = rule[key]
    return found


def _applies(rule: dict[str, Any], names: tuple[str, ...]) -> bool:
    includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
    if includes.get("arches") and not {"amd64", "x86_64"} & set(includes["arches"]):
        return False
    if {"amd64", "x86_64"} & set(excludes.get("arches") or []):
        return False
    if not set(includes.get("caps") or []) <= set(names) or set(excludes.get("caps") or []) & set(names):
        return False
    return _kernel() >= _version(includes["minKernel"]) if includes.get("minKernel") else True


@functools.cache
def _kernel() -> tuple[int, int]:
    import os

    return _version(os.uname().release)


def _version(text: str) -> tuple[int, int]:
    major, _, rest = text.partition(".")
    minor = rest.partition(".")[0]
    return int(major), int("".join(c for c in minor.partition("-")[0] if c.isdigit()) or 0)


def paths(host: Body, key: str, default: tuple[str, ...]) -> list[str]:
    """MaskedPaths or ReadonlyPaths: null means Docker's own, an empty list none; a privileged instance has none."""
    if host.data.get(key) is not None:
        return host.strings(key)
    return [] if host.flag("Privileged") else list(default)
