"""The last steps of any process of a container, init or exec: limits, identity, capabilities, filter, execve.

The order is the one that the kernel's rules leave: what needs privileges comes before they go, the seccomp program before
the capabilities without no_new_privs (loading it takes CAP_SYS_ADMIN then) and last with it. Nothing here imports.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
import struct
from typing import Any, NamedTuple

from ambi.core.errors import AmbiError, CommandNotExecutable, CommandNotFound, InvalidRequest, from_os_error
from ambi.linux import capabilities, paths, process, seccomp
from ambi.linux.calls import ANY, CallFailed, Calls
from runtime.users import Identity

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_CAPABILITY_SETS = ("bounding", "effective", "permitted", "inheritable", "ambient")
_NOTHING = capabilities.Sets(0, 0, 0, 0, 0)
_NR_CHDIR, _NR_UMASK, _NR_SETGROUPS, _NR_SETRESUID, _NR_SETRESGID = 80, 95, 116, 117, 119
_NR_PRCTL, _NR_PRLIMIT = 157, 302
EXECVE, CHDIR = "execute the program", "enter the working directory"  # calls of a list that are told in docker's words
_CWD_HINT = "name a directory that the image has and the user may enter: -w /DIR"


class Filter(NamedTuple):
    """A compiled seccomp program and the flags to load it with; an empty program loads nothing."""

    program: bytes
    flags: int


def environment(spec: dict[str, Any], identity: Identity) -> dict[str, str]:
    """`process.env` as a mapping, the last of a name wins; HOME from passwd when it is not given."""
    found = {}
    for entry in spec.get("env") or ():
        name, equals, value = entry.partition("=")
        if equals and name:
            found[name] = value
    found.setdefault("HOME", identity.home or "/")
    return found


def find_program(name: str, env: dict[str, str]) -> str:
    """The path of program `name`, looked up as execvp does, in the root and directory of the caller.

    Raises CommandNotFound or CommandNotExecutable in the words that docker's clients know.
    """
    if "/" in name:
        problem = _cannot_execute(name)
        if problem is None:
            return name
        kind = CommandNotFound if problem in (errno.ENOENT, errno.ENOTDIR) else CommandNotExecutable
        verb = f"stat {name}: " if kind is CommandNotFound else ""
        raise kind(f'exec: "{name}": {verb}{os.strerror(problem).lower()}')
    denied = False
    for directory in env.get("PATH", DEFAULT_PATH).split(":"):
        candidate = f"{directory or '.'}/{name}"
        problem = _cannot_execute(candidate) if name else errno.ENOENT
        if problem is None:
            return candidate
        denied = denied or problem == errno.EACCES
    if denied:
        raise CommandNotExecutable(f'exec: "{name}": permission denied')
    raise CommandNotFound(f'exec: "{name}": executable file not found in $PATH')


def _cannot_execute(path: str) -> int | None:
    """The errno of why `path` is no program, None when it looks like one."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        return error.errno
    except ValueError:  # a NUL inside
        return errno.ENOENT
    if stat.S_ISDIR(mode):
        return errno.EISDIR
    return None if mode & 0o111 else errno.EACCES


def _limit(value: int) -> int:
    return resource.RLIM_INFINITY if value >= 1 << 63 or value < 0 else value


def _lower(value: int, ceiling: int) -> int:
    if ceiling == resource.RLIM_INFINITY:
        return value
    return ceiling if value == resource.RLIM_INFINITY else min(value, ceiling)


def set_oom_score(proc: int, spec: dict[str, Any]) -> None:
    """`process.oomScoreAdj`; lowering it below what the caller has needs CAP_SYS_RESOURCE and is left out without."""
    value = spec.get("oomScoreAdj")
    if value is None:
        return
    try:
        paths.write_in_procfs(proc, f"{paths.own_directory(proc)}/oom_score_adj", str(value))
    except PermissionError:
        pass


def enter_directory(spec: dict[str, Any]) -> None:
    """chdir to `process.cwd`, and prove that it lies below the root (CVE-2024-21626 was a leaked descriptor as cwd)."""
    cwd = spec.get("cwd") or "/"
    try:
        os.chdir(cwd)
        here = os.getcwd()
    except OSError as error:
        raise _bad_directory(cwd, error) from error
    if not here.startswith("/"):
        raise InvalidRequest(f'cannot use working directory "{cwd}": it is outside the root', hint=_CWD_HINT)


def _bad_directory(cwd: str, error: OSError) -> InvalidRequest:
    return InvalidRequest(f'cannot use working directory "{cwd}": {(error.strerror or "").lower()}', hint=_CWD_HINT)


def capability_sets(spec: dict[str, Any]) -> capabilities.Sets:
    """`process.capabilities`, without those that this process cannot give."""
    given = spec.get("capabilities")
    if given is None:
        return _NOTHING
    try:
        masks = [capabilities.mask_of(given.get(name) or []) for name in _CAPABILITY_SETS]
    except ValueError as error:
        raise InvalidRequest(f"process.capabilities: {error}") from error
    return capabilities.Sets(*masks)


class Powers(NamedTuple):
    """What is left to do once the identity is taken. The sets are what the process ends with."""

    effective: int
    permitted: int
    inheritable: int
    ambient: int
    restrict: bool


_bounding: int | None = None


def bounding_set() -> int:
    """The bounding set of this process and of its children; asked for once, for it takes a call a capability."""
    global _bounding
    if _bounding is None:
        _bounding = capabilities.bounding()
    return _bounding


def warm() -> None:
    """Do what is done once in a process, so that children find it done."""
    bounding_set()
    Calls().make()


def take_identity(calls: Calls, spec: dict[str, Any], identity: Identity) -> Powers:
    """Append to `calls` what makes the process `identity`, with all capabilities still; the bounding set is limited.

    By system calls, and not by the C library's functions: those wait for every other thread to do the same, and after a raw
    clone the library counts threads that only the parent has.
    """
    sets, now, own = capability_sets(spec), bounding_set(), capabilities.permitted()
    for number in range((now & ~sets.bounding).bit_length()):
        if now >> number & 1 and not sets.bounding >> number & 1:
            calls.add("limit the capabilities", _NR_PRCTL, process.PR_CAPBSET_DROP, number)
    umask = spec["user"].get("umask")
    calls.add("set the umask", _NR_UMASK, 0o022 if umask is None else umask)
    calls.add("keep capabilities", _NR_PRCTL, process.PR_SET_KEEPCAPS, 1)
    count = len(identity.groups)
    calls.add("set the groups", _NR_SETGROUPS, count, struct.pack(f"{count}I", *identity.groups))
    calls.add("set the group", _NR_SETRESGID, *(identity.gid,) * 3)
    calls.add("set the user", _NR_SETRESUID, *(identity.uid,) * 3)
    inheritable = sets.inheritable & own & sets.bounding & now
    capabilities.add_set_process(calls, own, own, inheritable)
    permitted = sets.permitted & own & now
    ambient = sets.ambient & permitted & inheritable
    return Powers(sets.effective & permitted, permitted, inheritable, ambient, bool(spec.get("noNewPrivileges")))


def give_up_privileges(calls: Calls, powers: Powers, program: Filter) -> None:
    """Append to `calls` what is left to do after `take_identity`, the seccomp program included."""
    if not powers.restrict:
        _filter(calls, program)
    capabilities.add_set_process(calls, powers.effective, powers.permitted, powers.inheritable)
    for number in range(powers.ambient.bit_length()):
        if powers.ambient >> number & 1:
            calls.add("set ambient capabilities", _NR_PRCTL, process.PR_CAP_AMBIENT, process.PR_CAP_AMBIENT_RAISE, number)
    # forgotten by the kernel when ids and capabilities changed
    calls.add("ask to die with the shim", _NR_PRCTL, process.PR_SET_PDEATHSIG, signal.SIGKILL)
    if powers.restrict:
        calls.add("give up new privileges", _NR_PRCTL, process.PR_SET_NO_NEW_PRIVS, 1)
        _filter(calls, program)


def _filter(calls: Calls, program: Filter) -> None:
    if program.program:
        seccomp.add_load(calls, program.program, program.flags)


def change_directory(calls: Calls, spec: dict[str, Any]) -> None:
    """Append to `calls` that the user enters `process.cwd`, which `enter_directory` has proven; with no descriptor open."""
    calls.add(CHDIR, _NR_CHDIR, os.fsencode(spec.get("cwd") or "/") + b"\0")


def limits(calls: Calls, spec: dict[str, Any]) -> None:
    """Append to `calls` the `process.rlimits`; without CAP_SYS_RESOURCE a hard limit that would have to rise stays."""
    for entry in spec.get("rlimits") or ():
        number = getattr(resource, entry["type"], None)
        if not isinstance(number, int):
            raise InvalidRequest(f"process.rlimits: no limit is called {entry['type']}")
        soft, hard = (_limit(entry[name]) for name in ("soft", "hard"))
        reachable = _lower(hard, resource.getrlimit(number)[1])
        calls.add("set limits", _NR_PRLIMIT, 0, number, _rlimit(_lower(soft, reachable), reachable), 0)
        if reachable != hard:
            calls.add("set limits", _NR_PRLIMIT, 0, number, _rlimit(soft, hard), 0, ignored=ANY)


def _rlimit(soft: int, hard: int) -> bytes:
    return struct.pack("QQ", *(value & 0xFFFFFFFFFFFFFFFF for value in (soft, hard)))  # struct rlimit64


def explain_call(spec: dict[str, Any], error: CallFailed) -> AmbiError:
    """What a failed call of the list means to the user."""
    if error.what == EXECVE:
        return explain_execve(spec["args"][0], error)
    if error.what == CHDIR:
        return _bad_directory(spec.get("cwd") or "/", error)
    return from_os_error(f"cannot {error.what}", error)


def explain_execve(shown: str, error: OSError | ValueError) -> AmbiError:
    """Why the program called `shown` could not be executed, in docker's words."""
    if not isinstance(error, OSError):  # a NUL inside an argument
        return InvalidRequest(f'exec: "{shown}": {error}')
    text = (error.strerror or "").lower()
    if error.errno == errno.ENOENT:
        return CommandNotFound(f'exec: "{shown}": {text}')
    if error.errno in (errno.EACCES, errno.ENOEXEC, errno.EPERM, errno.ETXTBSY, errno.EISDIR, errno.ELOOP):
        return CommandNotExecutable(f'exec: "{shown}": {text}')
    return from_os_error(f'exec: "{shown}"', error)


def execute(path: str | int, arguments: list[str], env: dict[str, str]) -> None:
    """execve; returns only by raising."""
    try:
        os.execve(path, arguments, env)
    except (OSError, ValueError) as error:
        raise explain_execve(arguments[0], error) from error


def own_stdio(identity: Identity) -> None:
    """Give the pipes behind stdio to the user, so that it can open /dev/stdout again; other files stay as they are."""
    for number in range(3):
        if stat.S_ISFIFO(os.fstat(number).st_mode):
            os.fchown(number, identity.uid, -1)


def explain(what: str, error: BaseException) -> dict[str, str | None]:
    """`error`, met while doing `what`, as it crosses to the shim."""
    if isinstance(error, AmbiError):
        return error.to_wire()
    if isinstance(error, OSError):
        return from_os_error(f"cannot {what}", error).to_wire()
    return {"kind": "Internal", "message": f"cannot {what}: {type(error).__name__}: {error}", "hint": None}
