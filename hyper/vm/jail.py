"""Child processes: QEMU and virtiofsd with as little as they need, and small tools.

A VMM runs under a user id of its own, derived from the instance's id, without groups, with no capabilities and no way to
gain any, in a cgroup of its own, and in namespaces with no network, no IPC of others and a /dev of five nodes. It opens
nothing by a path of ours: it inherits descriptors. It dies with the shim.
"""

from __future__ import annotations

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
        left = by.remaining()
        poll.poll(None if left is None else int(left * 1000 + 0.999))
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


def spawn(argv: Sequence[str], keep: Sequence[int], output: int, prepare: Callable[[], None]) -> Child:
    """Run `argv`; it inherits `keep` under their numbers, /dev/null as stdin, `output` as stdout and stderr.

    prepare: called in the child before execve (join a cgroup, enter namespaces, give up privileges). What goes wrong there
    becomes a line of `output` and the exit status 126.
    """
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        _become(argv, keep, output, prepare, parent)
    return Child(os.path.basename(argv[0]), pid)


def _become(argv: Sequence[str], keep: Sequence[int], output: int, prepare: Callable[[], None], parent: int) -> NoReturn:
    try:
        null = os.open("/dev/null", os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.setsid()
        process.reset_signals()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        prepare()
        process.die_with_parent()
        if os.getppid() != parent:
            os._exit(126)
        process.close_on_exec(3)
        for fd in keep:
            os.set_inheritable(fd, True)
        os.execve(argv[0], list(argv), ENVIRONMENT)
    except BaseException as error:
        os.write(2, f"{argv[0]}: {error}\n".encode("utf-8", "replace"))
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


def enter_vmm(user: int, kvm: bool) -> None:
    """In the child: give up everything that QEMU can do without."""
    process.unshare(process.CLONE_NEWNS | process.CLONE_NEWIPC | process.CLONE_NEWNET | process.CLONE_NEWUTS)
    mount.mount(None, "/", None, mount.MS_REC | mount.MS_SLAVE)
    _private_dev(user, kvm)
    os.chdir("/")
    os.umask(0o077)
    os.setgroups(())
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    process.no_new_privileges()


def _private_dev(user: int, kvm: bool) -> None:
    nodes = dict(NODES)
    if kvm:
        device = os.stat("/dev/kvm").st_rdev
        nodes["kvm"] = (os.major(device), os.minor(device))
    mount.mount("tmpfs", "/dev", "tmpfs", mount.MS_NOSUID | mount.MS_NOEXEC, "size=64k,nr_inodes=16,mode=755")
    for name, (major, minor) in nodes.items():
        path = f"/dev/{name}"
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(major, minor))
        os.chmod(path, 0o666 if name != "kvm" else 0o600)
        if name == "kvm":
            os.chown(path, user, user)
    mount.mount(None, "/dev", None, mount.MS_REMOUNT | mount.MS_RDONLY | mount.MS_NOSUID | mount.MS_NOEXEC)
