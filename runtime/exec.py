"""One more process in a running container: join what init is in, then the same last steps.

The helper, a child of the shim, joins the cgroups (version 1) and all namespaces of init in one setns(2); its own child,
which CLONE_PARENT makes the shim's, is the process.
"""

from __future__ import annotations

import marshal
import os
from typing import Any, NamedTuple, NoReturn

from ambi.core.deadline import Deadline
from ambi.core.errors import Conflict
from ambi.linux import paths, process
from runtime import finish, init, spawn, terminal, users

_FLAGS = (
    process.CLONE_NEWNS
    | process.CLONE_NEWUTS
    | process.CLONE_NEWIPC
    | process.CLONE_NEWNET
    | process.CLONE_NEWPID
    | process.CLONE_NEWCGROUP
)


class Job(NamedTuple):
    """What to run and where. cgroup: a descriptor to be born in (version 2); joins: directories to join (version 1)."""

    id: str
    spec: dict[str, Any]
    init_pidfd: int
    joins: list[str]
    cgroup: int | None


def help_to(job: Job, channel: spawn.Channel, stdio: list[int]) -> NoReturn:
    """The helper's whole life: it says ("pid", N) and ends."""

    def body(doing: list[str]) -> None:
        spawn.forbid_imports()
        doing.append("join the container")
        keep = [channel.fd, job.init_pidfd, *stdio] + ([] if job.cgroup is None else [job.cgroup])
        spawn.keep_only(keep)
        _join_cgroups(job.joins)
        _make(job, channel, stdio)

    spawn.guarded(channel, body)


def help_later(joins: list[str], channel: spawn.Channel) -> NoReturn:
    """The life of a helper that is there before its job, see `spare`: the same, but for a wait in the cgroups."""

    def body(doing: list[str]) -> None:
        spawn.forbid_imports()
        doing.append("join the container")
        spawn.keep_only([channel.fd])
        _join_cgroups(joins)
        message, fds = channel.receive(Deadline.never(), "the job")
        if message is None:
            os._exit(0)
        text, init_pidfd, *stdio = fds
        job = Job(*marshal.loads(os.pread(text, 1 << 26, 0)))
        os.close(text)
        _make(job._replace(init_pidfd=init_pidfd), channel, stdio)

    spawn.guarded(channel, body)


def _join_cgroups(directories: list[str]) -> None:
    for directory in directories:
        with open(f"{directory}/cgroup.procs", "wb", buffering=0) as file:
            file.write(b"0")


def _make(job: Job, channel: spawn.Channel, stdio: list[int]) -> NoReturn:
    """Join the namespaces, make the process, say so and end."""
    proc = paths.open_procfs()
    try:
        process.setns(job.init_pidfd, _FLAGS)
    except ProcessLookupError:  # it has ended, and the shim does not know yet
        raise Conflict("cannot exec in a stopped container") from None
    child = spawn.clone(process.CLONE_PARENT, lambda: _run(job, channel, stdio, proc), cgroup=job.cgroup)
    channel.send("pid", child.pid)
    os._exit(0)


def _run(job: Job, channel: spawn.Channel, stdio: list[int], proc: int) -> NoReturn:
    spawn.guarded(channel, lambda doing: _steps(job, channel, stdio, proc, doing))


def _steps(job: Job, channel: spawn.Channel, stdio: list[int], proc: int, doing: list[str]) -> None:
    spec = job.spec
    doing.append("set up the process")
    for number, fd in enumerate(stdio):
        os.dup2(fd, number)
    spawn.keep_only([channel.fd, proc])
    os.umask(0)
    root = os.open("/", paths.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    identity = users.identify(root, spec["user"])
    env = finish.environment(spec, identity)
    finish.enter_directory(spec)
    path = finish.find_program(spec["args"][0], env)
    master, slave = terminal.open_pair(root) if spec.get("terminal") else (None, None)
    if master is not None:
        terminal.set_initial_size(master, spec)
    channel.send("ready", fds=() if master is None else (master,))
    program = spawn.wait_for_start(channel)
    init.take_terminal(slave, identity)
    init.new_keyring(job.id)
    finish.set_oom_score(proc, spec)
    finish.set_limits(spec)
    init.set_security_label(proc, spec)
    process.close_on_exec(3)
    finish.give_up_privileges(spec, identity, program)
    process.reset_signals()
    channel.send("exec")
    finish.execute(path, spec["args"], env)
