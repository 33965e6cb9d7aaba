"""What runs between clone and execve of a container's first process.

The order is the runtime-spec's: cgroup, root, mounts, devices, console, pivot, read-only root, wait for the start, last
steps. The host's procfs is opened before the pivot, for writes that must not reach a fake. Nothing here imports or reads
a file of the container, but /etc/passwd and /etc/group.
"""

from __future__ import annotations

import errno
import os
import socket
from typing import Any, NamedTuple, NoReturn

from ambi.linux import memfd, mount, net, paths, process
from ambi.linux.calls import Calls
from runtime import devices, finish, mounts, rootfs, spawn, terminal, users
from runtime.tini import PROGRAM as TINI

INIT_ANNOTATION = "ambi.init"
DISPOSABLE_ANNOTATION = "ambi.disposable"
HOST_MOUNTS = "host mounts"
OTHER_MOUNTS = "other mounts"


class Job(NamedTuple):
    """All that the child needs, prepared by the shim; made of plain values only, so that it can be marshalled.

    root: what rootfs.prepare returned. scratch: a directory to mount it on. files: (path inside, source on the host).
    cgroup_joins: directories to join by migration. cgroup_tree: (name, host directory) for a mount of type cgroup.
    fresh, joined: types of namespaces to make, and to enter by the descriptors that come along, in this order. HOST_MOUNTS
    and OTHER_MOUNTS (another container's) may be among them, from which some mounts are copied, and which are not entered.
    """

    id: str
    config: dict[str, Any]
    root: tuple[str, list[str], str]
    scratch: str
    files: list[tuple[str, str]]
    cgroup_joins: list[str]
    cgroup_tree: list[tuple[str, str]]
    fresh: list[str]
    joined: list[str]


class Descriptors(NamedTuple):
    """What the child gets: its end of the channel, stdio (empty with a terminal), namespaces to join."""

    channel: spawn.Channel
    stdio: list[int]
    joined: list[int]


def clone_flags(job: Job) -> int:
    """The namespaces that init is cloned with. The cgroup namespace comes later: it is rooted where init is by then."""
    flags = 0
    for kind in job.fresh:
        if kind != "cgroup":
            flags |= process.NAMESPACES[kind][0]
    return flags


def run(job: Job, given: Descriptors) -> NoReturn:
    """The whole life of the child; see runtime/spawn.py for what it says on the way."""
    spawn.guarded(given.channel, lambda doing: _run(job, given, doing))


def _run(job: Job, given: Descriptors, doing: list[str]) -> None:
    spawn.forbid_imports()
    spec = job.config["process"]
    for number, fd in enumerate(given.stdio):
        os.dup2(fd, number)
    spawn.keep_only([given.channel.fd, *given.joined])
    doing.append("join cgroups and namespaces")
    _enter_cgroups(job)
    _enter_namespaces(job, given)
    doing.append("prepare the root file system")
    os.umask(0)
    proc = paths.open_procfs()
    root = _make_root(job)
    sources = {kind: fd for kind, fd in zip(job.joined, given.joined, strict=True) if kind in (HOST_MOUNTS, OTHER_MOUNTS)}
    wanted = [mounts.parse(m) for m in job.config.get("mounts") or ()]
    mounts.attach_all(root, wanted, job.cgroup_tree, sources.get(HOST_MOUNTS), sources.get(OTHER_MOUNTS))
    for fd in sources.values():
        os.close(fd)
    doing.append("create devices and files")
    master, slave = _fill(job, root, spec)
    doing.append("set sysctls")
    _set_sysctls(job, proc)
    doing.append("set the host name")
    _set_names(job)
    doing.append("hide paths")
    linux = job.config.get("linux") or {}
    mounts.make_readonly(root, linux.get("readonlyPaths") or [])
    mounts.mask(root, linux.get("maskedPaths") or [])
    identity = users.identify(root, spec["user"])
    doing.append("enter the root")
    _make_cwd(root, spec)
    if (job.config.get("root") or {}).get("readonly"):
        mount.mount_setattr(root, set=mount.MOUNT_ATTR_RDONLY)
    rootfs.pivot(root, linux.get("rootfsPropagation") or "")
    env = finish.environment(spec, identity)
    finish.enter_directory(spec)
    path = finish.find_program(spec["args"][0], env)
    given.channel.send("ready", fds=() if master is None else (master,))
    program = spawn.wait_for_start(given.channel)
    _last_steps(job, given, doing, proc, identity, slave, env, path, program)


def _last_steps(
    job: Job,
    given: Descriptors,
    doing: list[str],
    proc: int,
    identity: users.Identity,
    slave: int | None,
    env: dict[str, str],
    path: str,
    program: finish.Filter,
) -> None:
    spec = job.config["process"]
    arguments: list[str] = spec["args"]
    doing.append("set up the process")
    take_terminal(slave, identity)
    new_keyring(job.id)
    finish.set_oom_score(proc, spec)
    set_security_label(proc, spec)
    target: str | int = path
    if (job.config.get("annotations") or {}).get(INIT_ANNOTATION) == "1":
        target = memfd.sealed("ambi-init", TINI)
        arguments = ["ambi-init", path, *arguments]
    process.close_on_exec(3)
    calls = Calls()
    finish.limits(calls, spec)
    powers = finish.take_identity(calls, spec, identity)
    calls.make()
    finish.enter_directory(spec)  # as the user, with descriptors of ours open: proven once more
    calls = Calls()
    finish.give_up_privileges(calls, powers, program)
    calls.default_signals(process.ignored_signals())
    calls.make()
    given.channel.send("exec")
    finish.execute(target, arguments, env)


def take_terminal(slave: int | None, identity: users.Identity) -> None:
    """The terminal as controlling terminal, or a session without one; stdio belongs to the user either way."""
    if slave is not None:
        os.fchown(slave, identity.uid, -1)
        terminal.take(slave)
        return
    try:
        os.setsid()
    except PermissionError:  # leads a session already
        pass
    finish.own_stdio(identity)


def new_keyring(name: str) -> None:
    try:
        process.new_session_keyring(f"_ses.{name}")
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EDQUOT, errno.EPERM):
            raise


def set_security_label(proc: int, spec: dict[str, Any]) -> None:
    """`apparmorProfile` and `selinuxLabel`, from execve on; an absent security module fails, see runtime/driver.py."""
    if spec.get("apparmorProfile"):
        paths.write_in_procfs(proc, f"{paths.own_directory(proc)}/attr/apparmor/exec", f"exec {spec['apparmorProfile']}")
    if spec.get("selinuxLabel"):
        paths.write_in_procfs(proc, f"{paths.own_directory(proc)}/attr/exec", spec["selinuxLabel"])


def _enter_cgroups(job: Job) -> None:
    for directory in job.cgroup_joins:
        with open(f"{directory}/cgroup.procs", "wb", buffering=0) as file:
            file.write(b"0")
    if "cgroup" in job.fresh:
        process.unshare(process.CLONE_NEWCGROUP)


def _enter_namespaces(job: Job, given: Descriptors) -> None:
    for kind, fd in zip(job.joined, given.joined, strict=True):
        if kind in (HOST_MOUNTS, OTHER_MOUNTS):
            continue
        if kind != "pid":  # joined by the helper: a process never changes its own
            process.setns(fd, process.NAMESPACES[kind][0])
        os.close(fd)
    if "network" in job.fresh:
        net.loopback_up()


def _make_root(job: Job) -> int:
    mount.mount(None, "/", None, mount.MS_SLAVE | mount.MS_REC)
    kind, lowers, source = job.root
    disposable = (job.config.get("annotations") or {}).get(DISPOSABLE_ANNOTATION) == "1"
    return rootfs.assemble(kind, lowers, source, job.scratch, disposable=disposable)


def _fill(job: Job, root: int, spec: dict[str, Any]) -> tuple[int | None, int | None]:
    """Devices, links, our files and the console. Returns (master, slave) of the terminal."""
    devices.make_nodes(root, devices.nodes_of(job.config))
    devices.make_links(root)
    for path, source in job.files:
        mounts.bind_file(root, source, path)
    if not spec.get("terminal"):
        return None, None
    master, slave = terminal.open_pair(root)
    terminal.set_initial_size(master, spec)
    terminal.bind_console(root, slave)
    return master, slave


def _set_sysctls(job: Job, proc: int) -> None:
    for key, value in ((job.config.get("linux") or {}).get("sysctl") or {}).items():
        paths.write_in_procfs(proc, f"sys/{key.replace('.', '/')}", value)


def _set_names(job: Job) -> None:
    if job.config.get("hostname"):
        socket.sethostname(job.config["hostname"])
    if job.config.get("domainname"):
        process.set_domain_name(job.config["domainname"])


def _make_cwd(root: int, spec: dict[str, Any]) -> None:
    """The working directory is made when the image lacks it, as docker does; entering it will say why it could not be."""
    try:
        os.close(paths.make_directories(root, spec.get("cwd") or "/"))
    except OSError:
        pass
