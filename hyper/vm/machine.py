"""One virtual machine: its VMM, its agent, and the workload in it. Implements ambi.core.driver.Created."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from ambi.core.deadline import Deadline
from ambi.core.errors import AmbiError, Conflict, Corrupt, Unavailable, Unsupported
from ambi.core.loop import POLLIN, Loop
from ambi.core.model import Status, Usage
from ambi.core.plan import LaunchPlan, Layers
from hyper import translate
from hyper.guest.protocol import INIT_ID, VERSION, HelloTag, Items, Message, NetTag, Type
from hyper.vm import disk, live, saving, snapshots, tree
from hyper.vm.attach import Attachments, Home
from hyper.vm.cgroup import Cgroup
from hyper.vm.console import Console
from hyper.vm.guest_process import GuestProcess
from hyper.vm.link import Answer, Link
from hyper.vm.monitor import Monitor
from hyper.vm.nic import Network, device_mac
from hyper.vm.restoring import Restoring
from hyper.vm.saving import Line
from hyper.vm.share import Server
from hyper.vm.sizes import Sizes
from hyper.vm.tree import Look, TreeDone

VMM_DIED = 137  # the exit code of every process of a VM whose VMM ended
POWER_OFF_S = 10.0
# Keys of SysRq, each with the seconds that it has: sync, read-only, off. The kernel does not tell when it is done, and QEMU
# loses a key that comes while it has not taken the one before.
SYSRQ = (("s", 0.5), ("u", 1.0), ("o", 5.0))
LOOK_GRACE_S = 3.0  # a copy that is nearly done when the workload ends is finished
ANSWER_S = 5.0  # for figures; a busy guest may be slow to answer, and the last ones then stand
MAX_EXECS = 1024
GO_ON_S = 60.0  # for a guest that stood still to go on
CONSOLE_FILE = "console"
CLOCK_S = 0.1  # between the host's clock and the guest's, at the most


class Parts:
    """What the driver made before it hands the VM over. All of it is the VM's to end."""

    __slots__ = ("cgroup", "console", "host_mounts", "line", "monitor", "network", "servers")

    def __init__(
        self,
        monitor: Monitor,
        console: Console,
        cgroup: Cgroup,
        servers: list[Server],
        network: Network | None,
        line: Line,
        host_mounts: int | None,
    ) -> None:
        self.monitor = monitor
        self.line = line
        self.console = console
        self.cgroup = cgroup
        self.servers = servers
        self.network = network
        self.host_mounts = host_mounts


class VirtualMachine:
    """A VM from its VMM's first moment to its removal."""

    def __init__(self, plan: LaunchPlan, parts: Parts, agent: Any, loop: Loop, restoring: Restoring | None = None) -> None:
        self._plan = plan
        self._parts = parts
        self._loop = loop
        self._running = False
        self._paused = False
        self._usage = Usage(0, 0, 0, 0, 0, 0, 0, 0)
        self._next_id = INIT_ID + 1
        self._execs: dict[int, GuestProcess] = {}
        self._looks: list[Look] = []
        self._failure = ""
        self._deleted = False
        self.vsock_cid: int | None = None  # its number at the host
        self._link = Link(loop, agent, parts.monitor.child.pidfd, self)
        loop.watch(parts.monitor.child.pidfd, POLLIN, self._vmm_ended)
        terminal = bool(plan.config["process"].get("terminal"))
        self.init = GuestProcess(loop, self._link, INIT_ID, terminal=terminal, stdin=plan.stdin)
        self._sizes = Sizes(parts.monitor, parts.cgroup, self._link, translate.shape(plan).vcpus)
        home = Home(plan.run_dir, parts.cgroup, parts.host_mounts)
        self._attachments = Attachments(home, parts.monitor, self._link, parts.servers)
        self._restoring = restoring
        if restoring:
            self.init.hold()
            self._next_id = self._link.stale = restoring.snapshot.next_id
            self._sizes.on_line = 0  # as many as when it was saved, which nobody has noted

    # from boot to the workload

    def boot(self, by: Deadline) -> None:
        """Wait for the agent, and have it make the workload's root. Raises what it says, or why the VM did not come up."""
        try:
            self._link.sync(by)
            hello = self._link.request(Type.HELLO, _hello())
            network = self._parts.network
            nics = [self._link.request(Type.NET, items) for items in network.requests()] if network else []
            setup = self._link.request(Type.SETUP, translate.setup(self._plan))
            answer = self._link.wait(hello, by, "the guest's agent")
            if answer.kind is not Type.HELLO_OK or answer.fields.number(1) != VERSION:
                raise Corrupt("the guest's agent speaks another protocol", hint="build it again: `python -m hyper.guest`")
            for request in (*nics, setup):
                self._link.wait(request, by, "the guest's agent")
            path = self._disk()
            if path is not None and disk.has_room(path):
                self._sizes.fill_disk(path.stat().st_size, by)
        except Unavailable as error:
            raise self._explained(error) from error

    def meet(self, by: Deadline) -> None:
        """Of a machine that goes on from a snapshot, in the place of `boot`: tell the guest what has changed around it."""
        assert self._restoring is not None
        try:
            self._link.sync(by)
            requests = [self._link.request(Type.HELLO, _hello())]
            network = self._parts.network
            here = network.known() if network else {}
            for name, number in self._restoring.snapshot.devices.items():
                if here.get(name) != number:
                    requests.append(self._link.request(Type.UNPLUG, ((NetTag.MAC, device_mac(number)),)))
            requests += [self._link.request(Type.NET, items) for items in (network.requests() if network else ())]
            for request in requests:
                self._link.wait(request, by, "the guest's agent")
        except Unavailable as error:
            raise self._explained(error) from error

    def _explained(self, error: Unavailable) -> Unavailable:
        """`error` with what the console says about it."""
        self._keep_console()
        reason = self._failure or error.message
        last = self._parts.console.last_line()
        what = "restore" if self._restoring is not None else "boot"
        text = f"cannot {what} the virtual machine: {reason}" + (f": {last}" if last and last not in reason else "")
        return type(error)(text, hint=f"its console: {self._plan.run_dir / CONSOLE_FILE}")

    def start(self, by: Deadline) -> None:
        if self._restoring is not None and not self._running:
            self._go_on(self._restoring, by)
            return
        if self._running or self.init.exit is not None:
            raise Conflict("the virtual machine has been started already")
        items = translate.process(self._plan.config["process"], self._plan.config, stdin=self._plan.stdin)
        clock = self._set_clock()  # HELLO's may have waited for a guest that was not yet awake
        sent = time.monotonic()
        request = self._link.request(Type.RUN, items, ident=INIT_ID)
        self._link.wait(clock, by, "the guest's agent")
        if time.monotonic() - sent > CLOCK_S:
            clock = self._set_clock()
            self._link.wait(clock, by, "the guest's agent")
        answer = self._link.wait(request, by, "the guest's agent")
        self._parts.cgroup.limit(translate.cpu_limits(self._plan))  # not sooner: a boot is not the workload's
        self._running = True
        self.init.started(answer.fields.number(1))

    def _set_clock(self) -> Answer:
        return self._link.request(Type.TIME, ((1, time.time_ns()),))

    def _go_on(self, restoring: Restoring, by: Deadline) -> None:
        """The workload runs already: from here on it is ours, and so are its disks."""

        def taken(message: Message) -> None:
            if message.kind is Type.OK:
                self.init.renew()

        clock = self._set_clock()
        request = self._link.request(Type.RESUME, ident=INIT_ID, done=taken)
        self._link.wait(clock, by, "the guest's agent")
        try:
            pid = self._link.wait(request, by, "the guest's agent").fields.number(1)
        except Conflict:
            if self.init.exit is None:  # else it has run to its end meanwhile
                raise
            pid = 0
        if restoring.snapshot.paused:
            self._link.wait(self._link.request(Type.THAW), by, "the guest's agent")
        self._parts.cgroup.limit(translate.cpu_limits(self._plan))
        restoring.take_place()
        self._running = True
        self.init.started(pid)

    def exec(self, process: dict[str, Any], stdin: bool, by: Deadline) -> GuestProcess:
        self._check_running()
        items = translate.process(process, self._plan.config, stdin=stdin)
        self._execs = {ident: p for ident, p in self._execs.items() if p.exit is None}
        if len(self._execs) >= MAX_EXECS:
            raise Conflict(f"the virtual machine runs {MAX_EXECS} commands already")
        self._next_id, ident = self._next_id + 1, self._next_id
        started = GuestProcess(self._loop, self._link, ident, terminal=bool(process.get("terminal")), stdin=stdin)
        self._execs[ident] = started
        try:
            answer = self._link.wait(self._link.request(Type.EXEC, items, ident=ident), by, "the guest's agent")
        except BaseException:
            started.signal(signal.SIGKILL)  # should it start after all
            del self._execs[ident]
            started.abandon()
            raise
        started.started(answer.fields.number(1))
        return started

    def tree(self, request: dict[str, Any], fd: int | None, done: TreeDone) -> None:
        """See ambi.core.driver.Browsable."""
        try:
            verb = tree.check(request, fd)
            if self._link.ended:
                raise Conflict("the virtual machine is not running")
        except AmbiError as error:
            if fd is not None:
                os.close(fd)
            self._loop.later(0, lambda failure=error: done(failure))  # type: ignore[misc]
            return
        self._next_id, ident = self._next_id + 1, self._next_id
        self._looks = [look for look in self._looks if not look.over]
        self._looks.append(Look(self._loop, self._link, ident, verb, fd, done))
        self._looks[-1].begin(tree.items(self._plan, request))

    def _check_running(self) -> None:
        state = self.state()
        if state is not Status.RUNNING:
            raise Conflict(f"the virtual machine is {'paused' if state is Status.PAUSED else 'not running'}")

    def _check_alive(self) -> None:
        """It runs, be it paused."""
        if not self._paused:
            self._check_running()

    # changes while it runs

    def pause(self, by: Deadline) -> None:
        """Freeze the workload in the guest. Its agent goes on, so figures, looks into the root and SIGKILL work as ever."""
        if not self._paused:
            self._check_running()
            self._link.wait(self._link.request(Type.FREEZE), by, "the guest's agent")
            self._paused = True

    def resume(self, by: Deadline) -> None:
        if self._paused:
            self._link.wait(self._link.request(Type.THAW), by, "the guest's agent")
            self._paused = False

    def update(self, resources: dict[str, Any], by: Deadline) -> list[str]:
        self._check_alive()
        plan = live.updated(self._plan, resources, self._parts.monitor.hotplug_bytes)
        items = live.limits(plan, resources)
        before = self._sizes.more
        more = live.more_memory(plan) if "memory" in resources and self._parts.monitor.hotplug_bytes else before
        if "cpu" in resources:
            self._sizes.set_cpus(live.cpus(plan), by)
        if more > before:
            self._sizes.grow_memory(more, by)
        try:
            if items:
                self._link.wait(self._link.request(Type.LIMITS, items), by, "the guest's agent")
            self._parts.cgroup.limit(translate.cpu_limits(plan))
        except BaseException:
            if more > before:
                self._sizes.shrink_memory(before, Deadline.after(ANSWER_S))
            raise
        self._plan = plan
        left = self._sizes.shrink_memory(more, by) if more < before else 0
        return [f"{left >> 20} MiB of the guest's memory are in use and come back later; the limit holds"] if left else []

    def grow(self, disk_bytes: int, by: Deadline) -> None:
        """See ambi.core.driver.Growable."""
        self._check_alive()
        path = self._disk()
        if path is None:
            raise Unsupported("the root of this virtual machine is a directory of the host, which has no size")
        self._sizes.grow_disk(path, disk_bytes, by)

    def _disk(self) -> Path | None:
        rootfs = self._plan.rootfs
        return rootfs.upper / disk.FILE if isinstance(rootfs, Layers) else None

    def save(self, home: Path, notes: dict[str, str], by: Deadline) -> dict[str, Any]:
        """See ambi.core.driver.Saving."""
        self._check_saving()
        try:
            manifest = self._save(home, notes, by)
        except BaseException:
            snapshots.discard(home)  # a guest that goes on may want the space
            raise
        finally:
            self._wake()
        return _with_time(manifest)

    def save_and_end(self, home: Path, notes: dict[str, str], by: Deadline) -> dict[str, Any]:
        """See ambi.core.driver.Saving."""
        self._check_saving()
        try:
            manifest = _with_time(self._save(home, notes, by))
            snapshots.publish(home, manifest, by)
        except BaseException:
            snapshots.discard(home)
            self._wake()
            raise
        self._loop.later(0, self._end_saved)
        return manifest

    def _end_saved(self) -> None:
        """What it has said before it was saved is not said again when it goes on, so it is taken."""
        self._link.drain()
        self._link.fail("it was saved, and then ended")

    def _check_saving(self) -> None:
        self._check_alive()
        saving.refuse_shares(self._plan)
        self._sizes.refuse_saving()
        self._attachments.refuse_saving()

    def _save(self, home: Path, notes: dict[str, str], by: Deadline) -> dict[str, Any]:
        self._link.wait(self._link.request(Type.PING), by, "the guest's agent")  # behind it no answer is on its way
        parts = self._parts
        manifest = saving.save(parts.line, self._plan, parts.monitor, home, by)
        parts.line.homes.append(home)
        devices = parts.network.known() if parts.network else {}
        mine = {"devices": devices, "next_id": self._next_id, "paused": self._paused, "notes": notes}
        return {**manifest, **mine}

    def _wake(self) -> None:
        """After a save. A machine that cannot go on is of no more use."""
        try:
            self._parts.line.backend.go_on(self._parts.monitor, Deadline.after(GO_ON_S))
        except AmbiError as error:
            reason = f"it did not go on after it was saved: {error.message}"
            self._loop.later(0, lambda: self._link.fail(reason))

    def attach(self, mount: dict[str, Any], by: Deadline) -> None:
        self._check_alive()
        self._attachments.attach(mount, by)

    def detach(self, destination: str, by: Deadline, *, force: bool) -> None:
        self._check_alive()
        self._attachments.detach(destination, by, force=force)

    def plug_nic(self, name: str, by: Deadline) -> None:
        network = self._network()
        self._check_alive()
        self._link.wait(self._link.request(Type.NET, network.plug(name)), by, "the guest's agent")

    def unplug_nic(self, name: str, by: Deadline) -> None:
        network = self._network()
        self._check_alive()
        device = network.unplug(name)
        if device is not None:
            self._link.wait(self._link.request(Type.UNPLUG, ((NetTag.MAC, device),)), by, "the guest's agent")

    def _network(self) -> Network:
        if self._parts.network is None:
            raise Conflict(
                "the virtual machine was started without a network", hint="restart it: it then has one that can be connected"
            )
        return self._parts.network

    # questions

    def state(self) -> Status:
        if self.init.exit is not None or self._deleted:
            return Status.EXITED
        if self._paused:
            return Status.PAUSED
        return Status.RUNNING if self._running else Status.CREATED

    def usage(self) -> Usage:
        try:
            fields = self._ask(Type.STATS)
            read, written = self._parts.monitor.block_bytes(Deadline.after(ANSWER_S))
        except Unavailable:
            return self._usage
        numbers = [fields.number(tag) for tag in range(1, 8)]
        cpu, user, system, used, cache, pids, kills = numbers
        limit = translate.memory_limit(self._plan, self._sizes.more)
        self._usage = Usage(cpu, user, system, used, cache, limit, pids, kills, read, written)
        return self._usage

    def processes(self) -> list[dict[str, Any]]:
        rows = (row.split(" ", 6) for row in self._ask(Type.PROCESSES).texts(1))
        try:
            return [_process_row(row) for row in rows]
        except (ValueError, IndexError) as error:
            raise Corrupt("the guest's list of processes is damaged") from error

    def inspect(self) -> dict[str, Any]:
        found = self._parts.monitor.inspect(Deadline.after(ANSWER_S))
        return found if self.vsock_cid is None else {**found, "vsock_cid": self.vsock_cid}

    def _ask(self, kind: Type) -> Any:
        return self._link.wait(self._link.request(kind), Deadline.after(ANSWER_S), "the guest's agent").fields

    # the end

    def log(self, text: str) -> None:
        """A line of the agent's own."""
        self._parts.console.note(b"agent: " + text.encode("utf-8", "replace")[:1000] + b"\n")

    def stuck(self, reason: str) -> None:
        """The agent does not answer: the kernel is asked to write its disk and to power off, and then its VMM is killed."""
        if self._link.ended or translate.disposable(self._plan):
            self._link.fail(reason)
            return
        at = 0.0
        for key, seconds in SYSRQ:
            self._loop.later(at, lambda key=key: self._press(key))  # type: ignore[misc]
            at += seconds
        self._loop.later(at, lambda: self._link.fail(reason))

    def _press(self, key: str) -> None:
        try:
            if not self._link.ended:
                self._parts.monitor.sysrq(key, self._parts.console.write, Deadline.after(ANSWER_S))
        except AmbiError:  # the VMM has ended, or does so when the time is over
            pass

    def _vmm_ended(self, _: int) -> None:
        self._link.drain()
        self._link.fail("the VMM ended")

    def lost(self, reason: str) -> None:
        """The guest is of no more use: end its VMM, and with it every process."""
        vmm = self._parts.monitor.child
        if vmm.wait(Deadline.after(0.2)):
            cause = self._parts.monitor.why()
            reason = f"the VMM {vmm.how()}" + (f" ({cause})" if cause else "")
        else:
            vmm.kill()
        self._loop.unwatch(vmm.pidfd)
        self._parts.console.drain()
        line = self._parts.console.cause()
        self._failure = reason if not line or self._deleted else f"{reason}: {line}"
        if self.init.exit is None:
            self._keep_console()
        for process in (self.init, *self._execs.values()):
            process.lost(VMM_DIED, self._failure)
        for look in self._looks:
            look.lost(self._failure)

    def _keep_console(self) -> None:
        self._parts.console.drain()
        self._parts.console.save(self._plan.run_dir / CONSOLE_FILE)

    def delete(self, by: Deadline) -> None:
        if self._deleted:
            return
        self._deleted = True
        self._loop.run(
            lambda: self._link.ended is not None or all(x.over for x in self._looks), Deadline.after(LOOK_GRACE_S)
        )
        left = by.remaining()
        soon = Deadline.after(POWER_OFF_S if left is None else min(left / 2, POWER_OFF_S))
        if not self._link.ended and not translate.disposable(self._plan):
            self._power_off(soon, by)
        self.destroy()

    def _power_off(self, soon: Deadline, by: Deadline) -> None:
        """The agent has until `soon`, and then the kernel until `by`."""
        self._link.tell(Type.POWER_OFF, 0)
        if self._ended(soon):
            return
        for key, seconds in SYSRQ:
            left = by.remaining()
            self._press(key)
            if self._ended(Deadline.after(seconds if left is None else min(seconds, left))):
                return

    def _ended(self, by: Deadline) -> bool:
        try:
            self._link.wait_for_end(by)
        except AmbiError:
            return False
        return True

    def abandon(self) -> None:
        """Undo `create`: nobody has taken the streams of init."""
        self._deleted = True
        self.destroy()
        self.init.abandon()

    def destroy(self) -> None:
        """Kill what is left and remove all of it."""
        self._loop.unwatch(self._parts.monitor.child.pidfd)
        self._parts.monitor.child.kill()
        self._link.fail("the virtual machine was removed")
        self._link.close()
        for process in (self.init, *self._execs.values()):
            process.close()
        for look in self._looks:
            look.close()
        self._parts.monitor.close()
        if self._parts.network:
            self._parts.network.close()
        self._parts.console.close()
        for server in self._parts.servers:
            server.end()
        self._parts.monitor.child.close()
        self._parts.cgroup.kill()
        self._parts.cgroup.remove()
        if self._restoring is not None:
            self._restoring.abandon()


def _hello() -> Items:
    return (
        (HelloTag.LOWEST, VERSION),
        (HelloTag.HIGHEST, VERSION),
        (HelloTag.CLOCK_NS, time.time_ns()),
        (HelloTag.ENTROPY, os.urandom(64)),
    )


def _with_time(manifest: dict[str, Any]) -> dict[str, Any]:
    """`still_ns` as how long the guest has stood still until now."""
    return {**manifest, "still_ns": time.monotonic_ns() - manifest["still_ns"]}


def _process_row(row: list[str]) -> dict[str, Any]:
    pid, ppid, uid, stime_ns, cpu_ns = (int(word) for word in row[:5])
    return {
        "pid": pid, "ppid": ppid, "uid": uid, "user": str(uid), "tty": row[5], "stime_ns": stime_ns, "cpu_ns": cpu_ns,
        "command": row[6],
    }  # fmt: skip
