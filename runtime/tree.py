"""Looking into the root of a container: `tree` of ambi/shim/PROTOCOL.md, "Trees".

Each request is a child of the shim, which makes a private copy of the container's mounts in which no device and no program
can be used, goes there by chroot, gives up every right that the job does not need, and executes ambi-tree: a static program
that loads nothing (CVE-2019-14271) and that no path leads out of the root, whoever changes it meanwhile (CVE-2018-15664).
Only `diff` and `layer` look at the upper directory itself, by names of one component.
"""

from __future__ import annotations

import fcntl
import os
import resource
import select
import signal
import struct
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from ambi.core.deadline import Deadline
from ambi.core.errors import AmbiError, Conflict, Internal, InvalidRequest, Unsupported, from_os_error, from_wire
from ambi.core.loop import POLLIN, Loop
from ambi.core.plan import LaunchPlan
from ambi.linux import capabilities, memfd, mount, process
from ambi.linux.tree.program import PROGRAM
from runtime import mounts, rootfs, spawn, users
from runtime.finish import explain

TreeDone = Callable[[dict[str, Any] | AmbiError], None]
VERBS = ("stat", "get", "put", "diff", "layer", "export")
READS, WRITES, NEITHER = "put", ("get", "diff", "layer", "export"), ("stat",)
FOLLOW, NO_OVERWRITE_DIR_NON_DIR, COPY_IDS = 1, 2, 4
GRACE_SECONDS = 3.0  # a copy that is nearly done when its container ends is finished
_ANSWER_FD, _UPPER_FD, _PROGRAM_FD = 3, 4, 5
_FIELD = struct.Struct("<HHI")
_ANSWER_LIMIT = 64 << 10
_LOOK = ("CAP_DAC_READ_SEARCH",)
_CHANGE = ("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_MKNOD", "CAP_SETFCAP")
_COMPARE = (*_LOOK, "CAP_SYS_ADMIN")  # which the attributes of overlay ask for
_ATTRIBUTES = mount.MOUNT_ATTR_NODEV | mount.MOUNT_ATTR_NOSUID | mount.MOUNT_ATTR_NOEXEC


class Request(NamedTuple):
    """A request of the protocol, checked. fd: the stream, None without one."""

    verb: str
    path: str
    flags: int
    fd: int | None

    @classmethod
    def parse(cls, body: dict[str, Any], fd: int | None) -> Request:
        """Raises InvalidRequest."""
        verb, path = body.get("verb"), body.get("path", "/")
        if verb not in VERBS:
            raise InvalidRequest(f"'tree' knows no verb {verb!r}")
        if not isinstance(path, str) or not path.startswith("/") or "\0" in path:
            raise InvalidRequest(f"'tree' wants an absolute path, not {path!r:.200}")
        if (fd is None) != (verb in NEITHER):
            raise InvalidRequest(f"'tree' {verb} wants {'no' if verb in NEITHER else 'one'} stream")
        flags = FOLLOW if body.get("follow") else 0
        flags |= NO_OVERWRITE_DIR_NON_DIR if body.get("no_overwrite_dir_non_dir") else 0
        flags |= COPY_IDS if body.get("copy_ids") else 0
        return cls(verb, path, flags, fd)


class Place(NamedTuple):
    """Where to look: in the running container of `init`, or the root that `plan` describes. root: of rootfs.prepare.
    host: see `mounts.attach_all`."""

    plan: LaunchPlan
    root: tuple[str, list[str], str]
    init: int | None
    files: list[tuple[str, str]]
    host: int | None = None


class View:
    """The requests about one root. Implements ambi.core.driver.Browsable."""

    def __init__(self, place: Place, loop: Loop) -> None:
        self._place, self._loop = place, loop
        self._jobs: set[_Job] = set()

    def tree(self, request: dict[str, Any], fd: int | None, done: TreeDone) -> None:
        try:
            self._begin(Request.parse(request, fd), done)
        except AmbiError as error:
            self._later(done, error)
        except OSError as error:
            self._later(done, from_os_error("cannot look into the root", error))
        finally:
            if fd is not None:
                os.close(fd)

    def _begin(self, request: Request, done: TreeDone) -> None:
        if request.verb in ("diff", "layer") and self._place.root[0] != "overlay":
            raise Unsupported(f"{request.verb}: this root is a directory, of which nobody knows what has changed")
        read, write = os.pipe()
        try:
            child = spawn.clone(0, lambda: _live(self._place, request, write))
        except BaseException:
            os.close(read)
            raise
        finally:
            os.close(write)
        self._jobs.add(_Job(child.pidfd, read, self._loop, done, self._jobs.discard))

    def _later(self, done: TreeDone, error: AmbiError) -> None:
        self._loop.later(0, lambda: done(error))

    def end(self) -> None:
        """End what is under way, after a moment in which it may end itself: nothing of it holds a mount afterwards."""
        by = Deadline.after(GRACE_SECONDS)
        for job in list(self._jobs):
            job.end(by)


class _Job:
    """A child that looks, until its end."""

    def __init__(self, pidfd: int, answer: int, loop: Loop, done: TreeDone, forget: Callable[[_Job], object]) -> None:
        self._pidfd, self._answer, self._loop, self._done, self._forget = pidfd, answer, loop, done, forget
        loop.watch(pidfd, POLLIN, lambda _: self._ended())

    def end(self, by: Deadline) -> None:
        """Kill it when it has not ended at `by`."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        try:
            if not poll.poll(int((by.remaining() or 0) * 1000)):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._ended()

    def _ended(self) -> None:
        self._loop.unwatch(self._pidfd)
        result = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
        assert result is not None  # without WNOHANG
        os.close(self._pidfd)
        os.set_blocking(self._answer, False)
        try:
            answer = os.read(self._answer, _ANSWER_LIMIT)
        except BlockingIOError:
            answer = b""
        os.close(self._answer)
        self._forget(self)
        self._done(read_answer(answer, done=result.si_code == os.CLD_EXITED and result.si_status == 0))


def read_answer(data: bytes, *, done: bool) -> dict[str, Any] | AmbiError:
    """The fields that ambi-tree answers with, see ambi/linux/tree/tree.h."""
    fields: dict[int, bytes] = {}
    at = 0
    while len(data) - at >= _FIELD.size:
        tag, _, length = _FIELD.unpack_from(data, at)
        at += _FIELD.size
        fields[tag] = data[at : at + length]
        at += length
    if 16 in fields:
        kind, message, hint = (fields.get(tag, b"").decode("utf-8", "replace") for tag in (16, 17, 18))
        return from_wire({"kind": kind, "message": message, "hint": hint or None})
    if not done:
        return Internal("the process that looks into the root died", hint="`dmesg` may say why")
    if not fields:
        return {}
    size, mode, mtime = (int.from_bytes(fields.get(tag, b""), "little") for tag in (1, 2, 3))
    signed = mtime - (1 << 64) if mtime >> 63 else mtime
    return {"size": size, "mode": mode, "mtime_ns": signed, "link": fields.get(4, b"").decode("utf-8", "surrogateescape")}


def excluded(plan: LaunchPlan) -> list[str]:
    """What is mounted in the root, and so is no part of its changes."""
    return [entry["destination"] for entry in plan.config.get("mounts") or ()] + [str(f.path) for f in plan.files] + ["/dev"]


def _live(place: Place, request: Request, answer: int) -> NoReturn:
    doing = ["look into the root"]
    try:
        _steps(place, request, answer, doing)
    except BaseException as error:
        wire = explain(doing[-1], error)
        parts = [(16, wire["kind"]), (17, wire["message"]), (18, wire["hint"] or "")]
        data = b"".join(
            _FIELD.pack(tag, 0, len(text)) + text for tag, text in ((t, (s or "").encode()[:8000]) for t, s in parts)
        )
        os.write(answer, data)
    os._exit(125)


def _steps(place: Place, request: Request, answer: int, doing: list[str]) -> None:
    """The descriptors in their places, the root, the rights, the program."""
    spawn.forbid_imports()
    compares = request.verb in ("diff", "layer")
    program = memfd.sealed("ambi-tree", PROGRAM)
    owner = place.plan.config["process"].get("user") or {}
    doing.append("enter the root")
    if compares:
        root, upper = _below(place), os.open(f"{place.root[2]}/fs", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    else:
        root, upper = _merged(place, whole=request.verb == "export"), None
    identity = users.identify(root, owner) if request.flags & COPY_IDS else None
    os.fchdir(root)
    os.chroot(".")
    flags = request.flags if identity and (identity.uid or identity.gid) else request.flags & ~COPY_IDS
    ids = (identity.uid, identity.gid) if identity else (0, 0)
    arguments = ["ambi-tree", request.verb, request.path, *(str(n) for n in (flags, *ids))]
    arguments += excluded(place.plan) if compares else []
    doing.append("start the program that looks into the root")
    program = _arrange(request, program, answer, upper)
    rights = _COMPARE if compares else _CHANGE if request.verb == "put" else _LOOK
    _give_up(capabilities.mask_of(rights))
    os.execve(program, arguments, {})


def _copy(root: int | str) -> int:
    """A detached copy of the mount at `root` alone, in which files are files and nothing else."""
    directory, path = (root, "") if isinstance(root, int) else (mount.AT_FDCWD, root)
    made = mount.open_tree(directory, path, mount.OPEN_TREE_CLONE)
    mount.mount_setattr(made, set=_ATTRIBUTES, propagation=mount.MS_PRIVATE)
    return made


def _merged(place: Place, *, whole: bool) -> int:
    """The root as the container sees it. whole: the root's file system alone, with what the container has mounts over.

    In a namespace of this process, not in a detached copy, in which a mount that appears when it is looked at has no place.
    """
    if place.init is None:
        root = _assembled(place, alone=whole)
    else:
        try:
            process.setns(place.init, process.CLONE_NEWNS)
        except ProcessLookupError:
            raise Conflict("the container has just ended") from None
        process.unshare(process.CLONE_NEWNS)
        root = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    if whole:
        return _copy(root)
    mount.mount_setattr(root, set=_ATTRIBUTES, propagation=mount.MS_PRIVATE, recursive=True)
    return root


def _assembled(place: Place, *, alone: bool) -> int:
    """The root of a container that does not run, with its binds and files, in a namespace of this process."""
    _own_namespace()
    kind, lowers, source = place.root
    scratch = str(place.plan.run_dir)
    root = rootfs.assemble(kind, lowers, source, scratch, disposable=False)
    readonly = bool((place.plan.config.get("root") or {}).get("readonly"))
    if not alone:
        parsed = [mounts.parse(entry) for entry in place.plan.config.get("mounts") or () if _is_bind(entry)]
        mounts.attach_all(root, parsed, [], place.host)
        for path, file in place.files:
            mounts.bind_file(root, file, path)
    if readonly:
        mount.mount_setattr(root, set=mount.MOUNT_ATTR_RDONLY)
    return root


def _is_bind(entry: dict[str, Any]) -> bool:
    options = entry.get("options") or ()
    return entry.get("type") == "bind" or "bind" in options or "rbind" in options


def _below(place: Place) -> int:
    """What is below the upper directory: one layer, or an overlay of all, which nobody can write to."""
    _own_namespace()
    _, lowers, _ = place.root
    scratch = str(place.plan.run_dir)
    if not lowers:
        mount.mount("tmpfs", scratch, "tmpfs", mount.MS_RDONLY, "size=0")
    elif len(lowers) == 1:
        return _copy(lowers[0])
    else:
        rootfs.assemble_lowers(lowers, scratch)
    return _copy(scratch)


def _own_namespace() -> None:
    process.unshare(process.CLONE_NEWNS)
    mount.mount(None, "/", None, mount.MS_SLAVE | mount.MS_REC)


def _arrange(request: Request, program: int, answer: int, upper: int | None) -> int:
    """The descriptors where ambi-tree expects them, and no others: the program's is returned."""
    stream, answer_fd, upper_fd, program_fd = (_high(fd) for fd in (request.fd, answer, upper, program))
    reader, writer = (_high(fd) for fd in os.pipe())  # for the streams that there are not
    os.dup2(stream if request.verb == READS else reader, 0)
    os.dup2(stream if request.verb in WRITES else writer, 1)
    os.dup2(writer, 2)
    os.dup2(answer_fd, _ANSWER_FD)
    os.dup2(upper_fd if upper is not None else reader, _UPPER_FD)
    os.dup2(program_fd, _PROGRAM_FD, inheritable=False)
    process.close_range(_PROGRAM_FD + 1)
    return _PROGRAM_FD


def _high(fd: int | None) -> int:
    """The same open file, at a number that nothing here wants; -1 for none."""
    return -1 if fd is None else fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 64)


def _give_up(mask: int) -> None:
    """Every right but those of `mask`."""
    now = capabilities.bounding()
    own = capabilities.permitted() & mask
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    process.no_new_privileges()
    capabilities.limit_bounding(own, now)
    capabilities.set_process(own, own, 0)
    process.die_with_parent()
    process.reset_signals()
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
