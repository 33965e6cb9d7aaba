"""Child processes: a VMM and virtiofsd with as little as they need, and small tools.

A VMM runs under a user id of its own, derived from the instance's id, without groups, with no capabilities and no way to
gain any, in a cgroup of its own, and in namespaces with no other process, no network and no IPC of others. Its root is
a tmpfs of its own: empty for a VMM that is forked, with the system's programs and libraries (read-only), a /proc and a /dev
of five nodes for one that is executed. It opens nothing by a path of ours: it inherits descriptors. It dies with the shim.
"""

from __future__ import annotations

import gc
import os
import resource
import select
import signal
import stat
from collections.abc import Callable, Sequence
from typing import NoReturn

from ambi.core.deadline import Deadline
from ambi.core.errors import DeadlineExceeded
from ambi.linux import mount, process

FIRST_UID = 0x70000000  # of a range that no distribution hands out; systemd's own end below it
UIDS = 1 << 20
LOADER_CACHE = "/etc/ld.so.cache"
NODES = {"null": (1, 3), "zero": (1, 5), "random": (1, 8), "urandom": (1, 9)}
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}


class Child:
    """A process that we started. `status` is its wait status once it has been reaped, else None."""

    __slots__ = ("name", "pid", "pidfd", "status")

    def __init__(self, name: str, pid: int) -> None:
        self.name = name
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.status: int | None = None

    def reap(self) -> bool:
        """Whether it has ended; sets `status`."""
        if self.status is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # reaped by another part of this process
                pid, status = self.pid, -1
            if pid:
                self.status = status
        return self.status is not None

    def wait(self, by: Deadline) -> bool:
        """Wait for its end; False when `by` came first."""
        if self.reap():
            return True
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        poll.poll(by.milliseconds())
        return self.reap()

    def kill(self) -> None:
        """SIGKILL and reap; nothing when it has ended."""
        if self.status is None:
            try:
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            except ProcessLookupError:
                pass
            if not self.wait(Deadline.after(30)):
                raise DeadlineExceeded(f"{self.name} (pid {self.pid}) does not end after SIGKILL")

    def close(self) -> None:
        """Forget the descriptor; call once, after the end."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    def how(self) -> str:
        """How it ended, in words."""
        if self.status is None:
            return "is running"
        if os.WIFSIGNALED(self.status):
            return f"was killed by {signal.Signals(os.WTERMSIG(self.status)).name}"
        code = os.waitstatus_to_exitcode(self.status) if self.status >= 0 else None
        return "ended" if code is None else f"ended with status {code}"


def spawn(
    argv: Sequence[str], keep: Sequence[int], output: int, prepare: Callable[[], None], *, alone: bool = False
) -> Child:
    """Run `argv`; it inherits `keep` under their numbers, /dev/null as stdin, `output` as stdout and stderr.

    prepare: called in the child before execve (join a cgroup, enter namespaces, give up privileges). What goes wrong there
    becomes a line of `output` and the exit status 126. alone: it is the first process of a pid namespace of its own.
    """

    def body() -> NoReturn:
        process.close_on_exec(3)
        for fd in keep:
            os.set_inheritable(fd, True)
        os.execve(argv[0], list(argv), ENVIRONMENT)

    return fork(os.path.basename(argv[0]), output, prepare, body, alone=alone)


def fork(name: str, output: int, prepare: Callable[[], None], body: Callable[[], NoReturn], *, alone: bool = False) -> Child:
    """As `spawn`, of a child that goes on as `body` in a copy of this process, with all of its descriptors."""
    parent = os.pidfd_open(os.getpid())
    try:
        pid = _fork_alone() if alone else os.fork()
        if pid == 0:
            _become(name, output, prepare, parent, body)
    finally:
        os.close(parent)
    return Child(name, pid)


def _fork_alone() -> int:
    """fork(2) into a new pid namespace. The C library's fork, not a raw clone: the child lives on in this very program."""
    own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        process.unshare(process.CLONE_NEWPID)  # of children alone
        try:
            return os.fork()
        finally:
            if os.getpid() != 1:
                process.setns(own, process.CLONE_NEWPID)
    finally:
        os.close(own)


def _become(name: str, output: int, prepare: Callable[[], None], parent: int, body: Callable[[], NoReturn]) -> NoReturn:
    try:
        gc.freeze()  # the parent's objects are not this process's to finalize
        null = os.open("/dev/null", os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.setsid()
        process.reset_signals()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        prepare()
        process.die_with_parent()
        ended = select.poll()
        ended.register(parent, select.POLLIN)
        if not ended.poll(0):  # else it ended before the kernel was asked to tell
            body()
    except BaseException as error:
        os.write(2, f"{name}: {error}\n".encode("utf-8", "replace"))
    finally:
        os._exit(126)


def run(argv: Sequence[str]) -> tuple[int, str]:
    """Run a small tool to its end: its exit code, and what it wrote (at most 64 KiB). FileNotFoundError without it."""
    path = find_program(argv[0])
    if path is None:
        raise FileNotFoundError(2, "no such program", argv[0])
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        child = spawn((path, *argv[1:]), (), writer, lambda: None)
    finally:
        os.close(writer)
    output = b""
    try:
        while data := os.read(reader, 65536):
            output = (output + data)[:65536]
    finally:
        os.close(reader)
        child.wait(Deadline.never())
        child.close()
    return os.waitstatus_to_exitcode(child.status or 0), output.decode("utf-8", "replace")


def find_program(name: str) -> str | None:
    """The absolute path of an executable in the system's directories."""
    for directory in ENVIRONMENT["PATH"].split(":"):
        path = f"{directory}/{name}"
        if os.access(path, os.X_OK):
            return path
    return None


def user_id(instance_id: str) -> int:
    """The user and group that the VMM of an instance runs as: its own, so that no VMM can reach another."""
    return FIRST_UID + int(instance_id[:5], 16) % UIDS


def enter_vmm(user: int, *, program: str | None = None, kvm: bool = False) -> None:
    """In the child: give up everything that a VMM can do without.

    program: it is still to be executed, so the root has what that needs; `kvm`: and it opens /dev/kvm itself.
    """
    process.unshare(process.CLONE_NEWNS | process.CLONE_NEWIPC | process.CLONE_NEWNET | process.CLONE_NEWUTS)
    mount.mount(None, "/", None, mount.MS_REC | mount.MS_SLAVE)
    sources = _system_trees(program) if program else {}
    device = os.stat("/dev/kvm").st_rdev if kvm else 0
    options = (("size", "1m"), ("mode", "755"))
    root = mount.new_mount("tmpfs", "root", options, mount.MOUNT_ATTR_NOSUID | mount.MOUNT_ATTR_NOEXEC)
    mount.move_mount(root, mount.AT_FDCWD, "/proc")  # any directory that is always there
    os.chdir("/proc")
    for name, tree in sources.items():
        _place(name, tree)
    if program:
        _private_dev(user, device)
        os.mkdir("proc")
        mount.mount("proc", "proc", "proc", mount.MS_NOSUID | mount.MS_NOEXEC | mount.MS_NODEV)
    mount.mount(None, ".", None, mount.MS_REMOUNT | mount.MS_BIND | mount.MS_RDONLY | mount.MS_NOSUID | mount.MS_NOEXEC)
    mount.pivot_root(".", ".")
    mount.umount(".", mount.MNT_DETACH)
    os.chdir("/")
    os.umask(0o077)
    os.setgroups(())
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    process.no_new_privileges()


def _system_trees(program: str) -> dict[str, int | str]:
    """What a program of the system needs, by name in the root: a detached copy of a tree, or a symbolic link's target."""
    top = os.path.realpath(program).split("/")[1]
    found: dict[str, int | str] = {}
    for name in {"usr", "bin", "lib", "lib64", top}:
        if os.path.islink(f"/{name}"):
            found[name] = os.readlink(f"/{name}")
        elif os.path.isdir(f"/{name}"):
            found[name] = mount.open_tree(mount.AT_FDCWD, f"/{name}", mount.OPEN_TREE_CLONE | mount.AT_RECURSIVE)
    if os.path.exists(LOADER_CACHE):
        found[LOADER_CACHE[1:]] = mount.open_tree(mount.AT_FDCWD, LOADER_CACHE, mount.OPEN_TREE_CLONE)
    return found


def _place(name: str, tree: int | str) -> None:
    """Put what `_system_trees` found below the current directory, read-only."""
    if isinstance(tree, str):
        os.symlink(tree, name)
        return
    if stat.S_ISDIR(os.fstat(tree).st_mode):
        os.mkdir(name)
    else:
        os.makedirs(os.path.dirname(name), exist_ok=True)
        os.close(os.open(name, os.O_CREAT | os.O_WRONLY, 0o644))
    mount.move_mount(tree, mount.AT_FDCWD, name)
    flags = mount.MS_RDONLY | mount.MS_NOSUID | mount.MS_NODEV
    mount.mount(None, name, None, mount.MS_REMOUNT | mount.MS_BIND | flags)
    os.close(tree)


def _private_dev(user: int, kvm: int) -> None:
    """`dev` below the current directory; `kvm`: the device number of a node for it, or 0."""
    os.mkdir("dev")
    mount.mount("tmpfs", "dev", "tmpfs", mount.MS_NOSUID | mount.MS_NOEXEC, "size=64k,nr_inodes=16,mode=755")
    for name, (major, minor) in NODES.items():
        os.mknod(f"dev/{name}", 0o600 | stat.S_IFCHR, os.makedev(major, minor))
        os.chmod(f"dev/{name}", 0o666)
    if kvm:
        os.mknod("dev/kvm", 0o600 | stat.S_IFCHR, kvm)
        os.chown("dev/kvm", user, user)
    mount.mount(None, "dev", None, mount.MS_REMOUNT | mount.MS_RDONLY | mount.MS_NOSUID | mount.MS_NOEXEC)
