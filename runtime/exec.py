"""One more process in a running container: join what init is in, then the same last steps.

The helper, a child of the shim, joins the cgroups (version 1), and with its first job all namespaces of init by one setns.
For each job it prepares a list of system calls and has them made in a child that CLONE_PARENT makes the shim's and that
shares the helper's memory until it executes its program (ambi.linux.calls): so nothing of an interpreter is copied, and the
helper knows how execve went. It serves jobs until its channel ends.

With version 2 the helper stays in the host's cgroup namespace, and the child joins that of init once it is born in its
cgroup. Where cgroup2 is mounted with `nsdelegate`, as by systemd, nobody inside that namespace may bring a process in from
outside of it: clone3 says ENOENT (cgroup_attach_permissions in the kernel's cgroup.c).

To the shim the helper, and the child first, say:

    ("pid",)          from the child, whose pid comes with it from the kernel (SCM_CREDENTIALS)
    ("exec",)         execve has succeeded; with a terminal its master comes along
    ("error", WIRE)   AmbiError.to_wire; a child that had said its pid has ended
"""

from __future__ import annotations

import errno
import marshal
import os
import signal
import socket
import stat
import termios
from typing import Any, NamedTuple, NoReturn

from ambi.core.deadline import Deadline
from ambi.core.errors import AmbiError, Conflict
from ambi.linux import paths, process
from ambi.linux.calls import CallFailed, Calls
from runtime import finish, init, spawn, terminal, users

_FLAGS = process.CLONE_NEWNS | process.CLONE_NEWUTS | process.CLONE_NEWIPC | process.CLONE_NEWNET | process.CLONE_NEWPID
_NR_DUP2, _NR_IOCTL, _NR_SENDTO, _NR_SETSID, _NR_PRCTL, _NR_SETNS, _NR_CLOSE_RANGE = 33, 16, 44, 112, 157, 308, 436
_PID = marshal.dumps(("pid",))


class Job(NamedTuple):
    """What to run. With it come descriptors: of init (a pidfd), of the cgroup to be born in (version 2), stdio."""

    id: str
    spec: dict[str, Any]
    program: finish.Filter
    has_cgroup: bool


def serve(joins: list[str], channel: spawn.Channel) -> NoReturn:
    """The helper's whole life. joins: the directories of version 1 to join."""

    def body(doing: list[str]) -> None:
        spawn.forbid_imports()
        doing.append("join the container")
        spawn.keep_only([channel.fd])
        for directory in joins:
            with open(f"{directory}/cgroup.procs", "wb", buffering=0) as file:
                file.write(b"0")
        worker = _Worker(channel)
        while True:
            message, fds = channel.receive(Deadline.never(), "the job")
            if message is None:
                os._exit(0)
            worker.work(message, fds)

    spawn.guarded(channel, body)


class _Worker:
    def __init__(self, channel: spawn.Channel) -> None:
        self._channel = channel
        self._proc = paths.open_procfs()  # the host's, for writes that must not reach a fake
        self._root: int | None = None  # the container's, once its namespaces are joined
        self._ignored = process.ignored_signals()

    def work(self, message: spawn.Message, fds: list[int]) -> None:
        """Do one job and say how it went; nothing of it stays."""
        doing = ["join the container"]
        opened = list(fds)
        try:
            job, fds = _read(message, fds)
            init_pidfd, *rest = fds
            root = self._join(init_pidfd, _FLAGS if job.has_cgroup else _FLAGS | process.CLONE_NEWCGROUP)
            cgroup = rest.pop(0) if job.has_cgroup else None
            doing.append("set up the process")
            calls = Calls()
            calls.add("ask to die with the shim", _NR_PRCTL, process.PR_SET_PDEATHSIG, signal.SIGKILL)
            calls.add("tell the pid", _NR_SENDTO, self._channel.fd, _PID, len(_PID), socket.MSG_NOSIGNAL, 0, 0)
            if job.has_cgroup:
                calls.add("join the cgroup namespace", _NR_SETNS, init_pidfd, process.CLONE_NEWCGROUP)
            master = self._execute(job, calls, root, rest, cgroup, opened)
            self._channel.send("exec", fds=() if master is None else (master,))
        except (AmbiError, OSError, ValueError) as error:
            self._channel.send("error", finish.explain(doing[-1], error))
        finally:
            for fd in opened:
                os.close(fd)
            os.chdir("/")  # a working directory would keep what is mounted there

    def _join(self, init_pidfd: int, namespaces: int) -> int:
        if self._root is None:
            try:
                process.setns(init_pidfd, namespaces)
            except ProcessLookupError:  # it has ended, and the shim does not know yet
                raise Conflict("cannot exec in a stopped container") from None
            self._root = os.open("/", paths.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        return self._root

    def _execute(
        self, job: Job, calls: Calls, root: int, stdio: list[int], cgroup: int | None, opened: list[int]
    ) -> int | None:
        """Run it after `calls`; the master of its terminal, if it has one. `opened` gets what is opened on the way."""
        spec = job.spec
        identity = users.identify(root, spec["user"])
        env = finish.environment(spec, identity)
        finish.enter_directory(spec)
        path = finish.find_program(spec["args"][0], env)
        master = None
        calls.add("make a session", _NR_SETSID, ignored=errno.EPERM)
        if spec.get("terminal"):
            master, slave = terminal.open_pair(root)
            opened += [master, slave]
            terminal.set_initial_size(master, spec)
            os.fchown(slave, identity.uid, -1)
            calls.add("take the terminal", _NR_IOCTL, slave, termios.TIOCSCTTY, 0)
            stdio = [slave] * 3
        for number, fd in enumerate(stdio):
            if stat.S_ISFIFO(os.fstat(fd).st_mode):
                os.fchown(fd, identity.uid, -1)
            calls.add("set up stdio", _NR_DUP2, fd, number)
        calls.add("close what is not the process's", _NR_CLOSE_RANGE, 3, 0xFFFFFFFF, 0)
        finish.limits(calls, spec)
        powers = finish.take_identity(calls, spec, identity)
        finish.change_directory(calls, spec)
        finish.give_up_privileges(calls, powers, job.program)
        calls.default_signals(self._ignored)
        self._spawn(job, calls, path, env, cgroup)
        return master

    def _spawn(self, job: Job, calls: Calls, path: str, env: dict[str, str], cgroup: int | None) -> None:
        spec = job.spec
        try:
            calls.execve(finish.EXECVE, path, spec["args"], env)
            init.new_keyring(job.id)
            finish.set_oom_score(self._proc, spec)
            init.set_security_label(self._proc, spec)
            before = signal.pthread_sigmask(signal.SIG_BLOCK, spawn.ALL_SIGNALS)
            try:
                calls.spawn(process.CLONE_PARENT, cgroup=cgroup)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        except CallFailed as error:
            raise finish.explain_call(spec, error) from error
        except ValueError as error:  # a NUL inside an argument
            raise finish.explain_execve(spec["args"][0], error) from error


def _read(message: spawn.Message, fds: list[int]) -> tuple[Job, list[int]]:
    """The job, which a descriptor holds when it is large, and the other descriptors."""
    data = message[1]
    if not data:
        text, *fds = fds
        data = os.pread(text, os.fstat(text).st_size, 0)
    id, spec, program, has_cgroup = marshal.loads(data)
    return Job(id, spec, finish.Filter(*program), has_cgroup), fds
