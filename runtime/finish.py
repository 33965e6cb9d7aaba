"""The last steps of any process of a container, init or exec: limits, identity, capabilities, filter, execve.

The order is the one that the kernel's rules leave: what needs privileges comes before they go, the seccomp program before
the capabilities without no_new_privs (loading it takes CAP_SYS_ADMIN then) and last with it. Nothing here imports.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
from typing import Any, NamedTuple

from ambi.core.errors import AmbiError, CommandNotExecutable, CommandNotFound, InvalidRequest, from_os_error
from ambi.linux import capabilities, paths, process, seccomp
from runtime.users import Identity

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_CAPABILITY_SETS = ("bounding", "effective", "permitted", "inheritable", "ambient")
_NOTHING = capabilities.Sets(0, 0, 0, 0, 0)
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


def set_limits(spec: dict[str, Any]) -> None:
    """`process.rlimits`; without CAP_SYS_RESOURCE a hard limit that would have to rise stays where it is."""
    for entry in spec.get("rlimits") or ():
        number = getattr(resource, entry["type"], None)
        if not isinstance(number, int):
            raise InvalidRequest(f"process.rlimits: no limit is called {entry['type']}")
        soft, hard = (_limit(entry[name]) for name in ("soft", "hard"))
        try:
            resource.setrlimit(number, (soft, hard))
        except (ValueError, PermissionError):
            ceiling = resource.getrlimit(number)[1]
            hard = _lower(hard, ceiling)
            resource.setrlimit(number, (_lower(soft, hard), hard))


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
        raise InvalidRequest(
            f'cannot use working directory "{cwd}": {(error.strerror or "").lower()}', hint=_CWD_HINT
        ) from error
    if not here.startswith("/"):
        raise InvalidRequest(f'cannot use working directory "{cwd}": it is outside the root', hint=_CWD_HINT)


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


def give_up_privileges(spec: dict[str, Any], identity: Identity, program: Filter) -> None:
    """From root with everything to what `spec` asks for, its seccomp program included."""
    sets = capability_sets(spec)
    now = capabilities.bounding()
    restrict = bool(spec.get("noNewPrivileges"))
    own_all = capabilities.permitted()
    capabilities.limit_bounding(sets.bounding, now)
    os.umask(0o022 if spec["user"].get("umask") is None else spec["user"]["umask"])
    process.prctl(process.PR_SET_KEEPCAPS, 1)
    process.become(identity.uid, identity.gid, identity.groups)
    capabilities.set_process(own_all, own_all, sets.inheritable & own_all & sets.bounding & now)
    enter_directory(spec)
    if program.program and not restrict:
        seccomp.load(program.program, program.flags)
    permitted = sets.permitted & own_all & now
    inheritable = sets.inheritable & own_all & sets.bounding & now
    capabilities.set_process(sets.effective & permitted, permitted, inheritable)
    if sets.ambient:
        capabilities.set_ambient(sets.ambient & permitted & inheritable)
    process.die_with_parent()  # forgotten by the kernel when ids and capabilities changed
    if restrict:
        process.no_new_privileges()
        if program.program:
            seccomp.load(program.program, program.flags)


def execute(path: str | int, arguments: list[str], env: dict[str, str]) -> None:
    """execve; returns only by raising."""
    shown = arguments[0]
    try:
        os.execve(path, arguments, env)
    except OSError as error:
        text = (error.strerror or "").lower()
        if error.errno == errno.ENOENT:
            raise CommandNotFound(f'exec: "{shown}": {text}') from error
        if error.errno in (errno.EACCES, errno.ENOEXEC, errno.EPERM, errno.ETXTBSY, errno.EISDIR, errno.ELOOP):
            raise CommandNotExecutable(f'exec: "{shown}": {text}') from error
        raise from_os_error(f'exec: "{shown}"', error) from error
    except ValueError as error:  # a NUL inside an argument
        raise InvalidRequest(f'exec: "{shown}": {error}') from error


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
