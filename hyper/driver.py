"""The driver of isolation `vm`: a VMM with our kernel and agent, the plan's layers as its disks.

create() boots the guest and makes the workload's root in it, start() runs the workload. The VMM (backends.py)
is a child of the shim, without rights of its own, and dies with it; everything the host knows of the guest comes through one
socket (vm/link.py).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

from ambi.core.deadline import Deadline
from ambi.core.driver import Features, Problem
from ambi.core.errors import NotFound, Unsupported
from ambi.core.loop import Loop
from ambi.core.model import Isolation
from ambi.core.plan import LaunchPlan
from ambi.core.undo import Undo
from hyper import backends, boot_files, probe, translate, validate
from hyper.probe import Host
from hyper.vm import launch, restoring, share
from hyper.vm.cgroup import Cgroup
from hyper.vm.machine import CONSOLE_FILE, VirtualMachine

NO_VIRTIOFSD = Problem("bind mounts into a virtual machine need virtiofsd", share.INSTALL)
TCG_LINE = "virtual machines run emulated (TCG), many times slower than with KVM"


preload = backends.preload  # of a zygote


class VmDriver:
    """Implements ambi.core.driver.Driver."""

    isolation: ClassVar[Isolation] = Isolation.VM

    def __init__(self) -> None:
        self._host_mounts: int | None = None

    def use_host_mounts(self, namespace: int) -> None:
        """Where the sources of binds are found: a descriptor of the mount namespace of the host."""
        self._host_mounts = namespace

    def probe(self) -> Features:
        host = probe.host()
        qemu = probe.find_qemu() or f"not found: {backends.NO_QEMU.hint}"
        problem = backends.problem(host)
        if problem:
            return Features(problem, {"qemu": qemu})
        accelerator = "kvm" if host.kvm else f"tcg ({TCG_LINE}: {host.kvm_problem})"
        details = {
            "monitor": "ambi's own" if backends.name(host) == backends.OURS else "QEMU",
            "qemu": qemu,
            "accelerator": accelerator,
            "virtiofsd": share.program() or f"not found, so no bind mounts: {share.INSTALL}",
        }
        return Features(None, details)

    def check(self, plan: LaunchPlan) -> list[Problem]:
        return self._problems(plan, probe.host(plan.guest_dir))

    def _problems(self, plan: LaunchPlan, host: Host) -> list[Problem]:
        problem = backends.problem(host)
        found = [problem] if problem else []
        try:
            boot_files.find(plan.guest_dir, translate.shape(plan).kernel)
        except NotFound as error:
            found.append(Problem(error.message, error.hint))
        found += validate.problems(plan)
        if not found and translate.shares(plan) and share.program() is None:
            found.append(NO_VIRTIOFSD)
        return found

    def create(self, plan: LaunchPlan, undo: Undo, by: Deadline, loop: Loop) -> VirtualMachine:
        host = probe.host(plan.guest_dir)
        problems = self._problems(plan, host)
        if problems:
            raise Unsupported(problems[0].message, hint=problems[0].hint)
        machine = launch.launch(backends.load(host), host, plan, undo, by, loop, self._host_mounts)
        machine.boot(by)
        return machine

    def restore(self, plan: LaunchPlan, home: Path, undo: Undo, by: Deadline, loop: Loop) -> VirtualMachine:
        """See ambi.core.driver.Restorable."""
        snapshot, plan = restoring.read(home, plan)
        host = probe.host(plan.guest_dir)
        problems = self._problems(plan, host)
        if problems:
            raise Unsupported(problems[0].message, hint=problems[0].hint)
        backend = backends.load(host)
        saved = restoring.Restoring(snapshot, plan, backend.snapshots(), kvm=host.kvm, undo=undo, by=by)
        machine = launch.launch(backend, host, plan, undo, by, loop, self._host_mounts, saved)
        machine.meet(by)
        return machine

    def browse(self, plan: LaunchPlan, undo: Undo, by: Deadline, loop: Loop) -> Browser:
        """The plan's root in a guest that runs nothing. What is changed there is kept, whatever the workload's would be."""
        process = {**plan.config["process"], "terminal": False}
        annotations = {**(plan.config.get("annotations") or {}), translate.DISPOSABLE_ANNOTATION: "0"}
        config = {**plan.config, "process": process, "annotations": annotations}
        return Browser(self.create(plan._replace(config=config, stdin=False), undo, by, loop))

    def sweep(self, plan: LaunchPlan) -> None:
        cgroup = Cgroup(plan.config["linux"]["cgroupsPath"])
        cgroup.kill()
        cgroup.remove()
        for tag in (share.ROOT_TAG, share.BINDS_TAG):
            (plan.run_dir / f"virtiofs-{tag}").unlink(missing_ok=True)
        try:
            os.rmdir(plan.run_dir / share.BINDS_TAG)
        except OSError:  # never made
            pass
        (plan.run_dir / CONSOLE_FILE).unlink(missing_ok=True)
        restoring.sweep(plan)


class Browser:
    """What `browse` returns: a guest to be looked into, and its end."""

    def __init__(self, machine: VirtualMachine) -> None:
        self.tree = machine.tree
        self._machine = machine

    def delete(self, by: Deadline) -> None:
        self._machine.delete(by)
        self._machine.init.abandon()
