"""The container driver: the way from a launch plan to a prepared process, and back to nothing."""

from __future__ import annotations

import os
import stat
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, NoReturn

from ambi.core.deadline import Deadline
from ambi.core.driver import Features, Problem
from ambi.core.errors import Internal, InvalidRequest, NotFound, from_os_error
from ambi.core.loop import Loop
from ambi.core.model import Isolation
from ambi.core.plan import LaunchPlan
from ambi.core.undo import Undo
from ambi.linux import paths, process
from runtime import attach, cgroups, devices, features, filters, init, mounts, rootfs, spawn, tree, validate
from runtime.cgroups.v1 import Group, V1Group
from runtime.container import (
    Container,
    ContainerProcess,
    Stdio,
    adopt_child,
    close_streams,
    end_child,
    remove_files,
    terminal_streams,
)
from runtime.park import PARENT, Starter
from runtime.spare import Spares

_SWEEP_S = 5.0


class ContainerDriver:
    """Implements ambi.core.driver.Driver with namespaces, cgroups and seccomp."""

    isolation: ClassVar[Isolation] = Isolation.CONTAINER

    def __init__(self) -> None:
        self._starter: Starter | None = None
        self._host_mounts: int | None = None
        filters.warm()  # the zygote makes a driver before it forks shims, which inherit the program

    def probe(self) -> Features:
        return features.probe()

    def check(self, plan: LaunchPlan) -> list[Problem]:
        return validate.problems_of(plan)

    def use_host_mounts(self, namespace: int) -> None:
        """Where mounts of propagation `shared` are copied from: a descriptor of the mount namespace of the host."""
        self._host_mounts = namespace

    def park(self, run_dir: Path) -> None:
        """Make a starter ahead of the job, where that saves anything (cgroup version 1). See runtime/park.py.

        run_dir: the run root, unused here but for naming nothing below it. Failing is no error: create does without.
        """
        del run_dir
        if self._starter is None and cgroups.hierarchies().v1:
            try:
                self._starter = Starter.make(cgroups.hierarchies())
            except OSError:
                self._starter = None

    def unpark(self) -> None:
        """Remove what `park` made and no `create` has used, here or in a shim that was killed."""
        starter, self._starter = self._starter, None
        if starter is not None:
            starter.discard()
        Starter.sweep(cgroups.hierarchies(), PARENT)

    def create(self, plan: LaunchPlan, undo: Undo, by: Deadline, loop: Loop) -> Container:
        problems = self.check(plan)
        if problems:
            raise InvalidRequest(problems[0].message, hint=problems[0].hint)
        group = cgroups.open_group(PurePosixPath(plan.config["linux"]["cgroupsPath"]))
        starter = self._take_starter(group, plan, undo)
        try:
            return self._create(plan, group, starter, undo, by, loop)
        except OSError as error:
            raise from_os_error(f"cannot create container {plan.id[:12]}", error) from error

    def _create(
        self, plan: LaunchPlan, group: Group, starter: Starter | None, undo: Undo, by: Deadline, loop: Loop
    ) -> Container:
        undo.add(f"remove cgroup {group.path}", lambda: group.remove(Deadline.after(_SWEEP_S)))
        files, file_list = write_files(plan, undo)
        spec = plan.config["process"]
        has_terminal = bool(spec.get("terminal"))
        resources, rules = plan.config["linux"].get("resources") or {}, devices.rules_of(plan.config)
        if starter is None:
            group.create(resources, rules)
        elif isinstance(group, V1Group):
            group.limit(resources, rules)
        job = make_job(plan, group, file_list, parked=starter is not None)
        stdio = None if has_terminal else Stdio(plan.stdin)
        if stdio is not None:
            undo.add("close the streams", stdio.close_ours)
        helpers = spawn.Helpers(loop)
        undo.add("reap the helpers", helpers.reap)
        ours, pid, pidfd = self._spawn(job, plan, group, starter, stdio, helpers, by)
        undo.add("close the channel", ours.close)
        undo.add("end init", lambda: end_child(pidfd))
        undo.add("kill the rest", group.kill)
        program = filters.program_of(plan.config["linux"].get("seccomp"))
        _, fds = spawn.expect(ours, "ready", by, "preparing the container")
        streams = stdio.streams if stdio else terminal_streams(fds)
        if stdio is None:
            undo.add("close the terminal", lambda: close_streams(streams))
        first = ContainerProcess(pid, pidfd, streams, has_terminal, group)
        spares = Spares(loop, helpers, group.joins, keep="pid" in job.fresh and not (group.joins and _counts(resources)))
        view = tree.View(tree.Place(plan, job.root, pidfd, file_list), loop)
        mounting = attach.Attachments(pidfd, self._host_mounts)
        return Container(
            plan.id, first, ours, group, loop, program, files, "pid" in job.fresh, spares, helpers, view, mounting
        )

    def _spawn(
        self, job: init.Job, plan: LaunchPlan, group: Group, starter: Starter | None, stdio: Stdio | None,
        helpers: spawn.Helpers, by: Deadline,
    ) -> tuple[spawn.Channel, int, int]:  # fmt: skip
        """Start the child that will be init: (our end of the channel, pid, pidfd)."""
        joined = open_namespaces(plan.config)
        if self._host_mounts is not None and mounts.needs_host(plan.config.get("mounts") or []):
            joined.append((init.HOST_MOUNTS, os.dup(self._host_mounts)))
            job = job._replace(joined=[*job.joined, init.HOST_MOUNTS])
        if origin := mounts.origin_of(plan.config.get("mounts") or []):
            joined.append((init.OTHER_MOUNTS, open_namespace(origin)))
            job = job._replace(joined=[*job.joined, init.OTHER_MOUNTS])
        theirs = stdio.theirs if stdio else []
        cgroup = group.born_in() if starter is None else None
        try:
            fds = [fd for _, fd in joined]
            if starter is not None:
                try:
                    return starter.start(job, theirs, fds, helpers, by)
                except (OSError, Internal):  # it was killed; its cgroups are there, and what it would have done is done here
                    starter.close()
                    job = job._replace(cgroup_joins=group.joins)
            ours, end = spawn.Channel.pair()
            given = init.Descriptors(end, theirs, fds)
            if "pid" in job.joined:
                child = spawn.clone(0, lambda: _help(job, given, cgroup))
                end.close()
                pid, pidfd = adopt_child(ours, child, by, helpers)
            else:
                pid, pidfd = spawn.clone(init.clone_flags(job), lambda: init.run(job, given), cgroup=cgroup)
                end.close()
            return ours, pid, pidfd
        finally:
            if stdio is not None:
                stdio.close_theirs()
            for _, fd in joined:
                os.close(fd)
            if cgroup is not None:
                os.close(cgroup)

    def _take_starter(self, group: Group, plan: LaunchPlan, undo: Undo) -> Starter | None:
        """The parked starter, its cgroups renamed to those of `plan`; None when there is none that fits."""
        starter, self._starter = self._starter, None
        if starter is None:
            return None
        undo.add("end the starter", starter.close)
        kinds = [entry["type"] for entry in plan.config["linux"].get("namespaces") or () if entry.get("path")]
        if isinstance(group, V1Group) and "pid" not in kinds and starter.become(group):
            return starter
        starter.discard()
        return None

    def browse(self, plan: LaunchPlan, undo: Undo, by: Deadline, loop: Loop) -> Browser:
        """The root of a container that does not run. Nothing is mounted but while a request looks."""
        del by
        try:
            files, file_list = write_files(plan, undo)
            place = tree.Place(plan, rootfs.prepare(plan), None, file_list, self._host_mounts)
            return Browser(tree.View(place, loop), files)
        except OSError as error:
            raise from_os_error(f"cannot look into container {plan.id[:12]}", error) from error

    def sweep(self, plan: LaunchPlan) -> None:
        group = cgroups.open_group(PurePosixPath(plan.config["linux"]["cgroupsPath"]))
        group.kill()
        try:
            group.remove(Deadline.after(_SWEEP_S))
        except OSError as error:
            raise from_os_error(f"cannot sweep container {plan.id[:12]}", error) from error
        remove_files(plan.data_dir / "files")
        if isinstance(group, V1Group):
            Starter.sweep(cgroups.hierarchies(), group.path.parent)


class Browser:
    """What `browse` returns."""

    def __init__(self, view: tree.View, files: Path) -> None:
        self.tree = view.tree
        self._view, self._files = view, files

    def delete(self, by: Deadline) -> None:
        del by
        self._view.end()
        remove_files(self._files)


def _counts(resources: dict[str, Any]) -> bool:
    """Whether `resources` limit what a helper of ours would take from the container."""
    memory, pids = resources.get("memory") or {}, (resources.get("pids") or {}).get("limit") or 0
    return bool(memory.get("limit")) or pids > 0


def _help(job: init.Job, given: init.Descriptors, cgroup: int | None) -> NoReturn:
    """The helper where a pid namespace is joined: it enters it and makes init, a child of the shim, inside."""

    def body(doing: list[str]) -> None:
        doing.append("join the pid namespace")
        process.setns(given.joined[job.joined.index("pid")], process.CLONE_NEWPID)
        child = spawn.clone(init.clone_flags(job) | process.CLONE_PARENT, lambda: init.run(job, given), cgroup=cgroup)
        given.channel.send("pid", child.pid)
        os._exit(0)

    spawn.guarded(given.channel, body)


def make_job(plan: LaunchPlan, group: Group, files: list[tuple[str, str]], *, parked: bool) -> init.Job:
    """What init needs to know of `plan`. Mounts the layers, for which it runs in the shim."""
    namespaces = plan.config["linux"].get("namespaces") or ()
    config = {**plan.config, "linux": {**plan.config["linux"], "seccomp": None}}  # compiled here, not there
    tree = [(",".join(h.controllers).removeprefix("name="), f"{h.mount}{group.path}") for h in cgroups.hierarchies().v1]
    return init.Job(
        id=plan.id,
        config=config,
        root=rootfs.prepare(plan),
        scratch=str(plan.run_dir),
        files=files,
        cgroup_joins=[] if parked else group.joins,
        cgroup_tree=tree,
        fresh=[entry["type"] for entry in namespaces if not entry.get("path")],
        joined=[entry["type"] for entry in namespaces if entry.get("path")],
    )


def open_namespaces(config: dict[str, Any]) -> list[tuple[str, int]]:
    """(type, descriptor) of each namespace that is given by path, in their order; proven to be namespaces."""
    found: list[tuple[str, int]] = []
    try:
        for entry in config["linux"].get("namespaces") or ():
            path = entry.get("path")
            if not path:
                continue
            found.append((entry["type"], open_namespace(path)))
    except BaseException:
        for _, fd in found:
            os.close(fd)
        raise
    return found


def open_namespace(path: str) -> int:
    """A descriptor of the namespace at `path`. Raises NotFound, InvalidRequest."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NotFound(f"linux.namespaces: {path} does not exist") from error
    if paths.filesystem_type(fd) != paths.NSFS_MAGIC:
        os.close(fd)
        raise InvalidRequest(f"linux.namespaces: {path} is not a namespace")
    return fd


def write_files(plan: LaunchPlan, undo: Undo) -> tuple[Path, list[tuple[str, str]]]:
    """Write `plan.files` below `data_dir/files`: the directory, and (path inside, path on the host) of each."""
    directory = plan.data_dir / "files"
    if not plan.files:
        return directory, []
    undo.add(f"remove {directory}", lambda: remove_files(directory))
    remove_files(directory)
    directory.mkdir(mode=0o700)
    written = []
    for number, file in enumerate(plan.files):
        path = f"{directory}/{number}"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as output:
            output.write(file.content.encode())
        os.chmod(path, stat.S_IMODE(file.mode))
        written.append((str(file.path), path))
    return directory, written
