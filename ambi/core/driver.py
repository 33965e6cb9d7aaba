"""The contract between the shim and what isolates: one driver per isolation, see docs/design/0002-driver.md.

Order of calls, in one shim, from one thread:

    driver.probe() / check(plan)          any time, no side effects
    created = driver.create(plan, undo, by, loop)     everything ready, nothing of the workload has run
    created.init.on_exit = ...            the shim sets its callbacks and takes init.streams
    created.start(by)                     the workload's program runs; raises CommandNotFound/CommandNotExecutable
    created.exec(process, stdin, by)      any number, while running
    created.delete(by)                    after init's exit, or instead of start; kills what is left
    driver.sweep(plan)                    in any later process, when the shim died; idempotent

`tests/conformance/` runs the same bodies over every driver.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from ambi.core.deadline import Deadline
from ambi.core.errors import AmbiError
from ambi.core.loop import Loop
from ambi.core.model import ExitStatus, Isolation, Status, Usage
from ambi.core.plan import LaunchPlan
from ambi.core.undo import Undo


class Streams(NamedTuple):
    """The host's ends of a process's stdio. The receiver owns and closes them; all are CLOEXEC and non-blocking.

    Without a terminal: stdin is a writable pipe or socket (None when the process reads /dev/null), stdout and stderr are
    readable. With one: stdin and stdout are the same descriptor and stderr is None. End of output is EOF, or EIO from a
    terminal. Closing stdin gives the process EOF. A full stdout blocks the process and nothing else.
    """

    stdin: int | None
    stdout: int
    stderr: int | None


class Process(Protocol):
    """A process of the workload, init or an exec.

    pid: on the host for a container, in the guest for a VM.
    streams: valid from `create` or `exec` on.
    exit: None until it has ended and been reaped.
    on_exit: called once from the loop, after `exit` is set; output may still be unread in the streams.
    """

    @property
    def pid(self) -> int: ...
    @property
    def streams(self) -> Streams: ...
    @property
    def exit(self) -> ExitStatus | None: ...

    on_exit: Callable[[ExitStatus], None] | None

    def signal(self, number: int) -> None:
        """Send a signal; a process that has ended is no error."""

    def resize(self, rows: int, columns: int) -> None:
        """Set the terminal's size; without a terminal InvalidRequest."""


class Created(Protocol):
    """A prepared or running workload."""

    @property
    def init(self) -> Process: ...

    def start(self, by: Deadline) -> None: ...

    def exec(self, process: dict[str, Any], stdin: bool, by: Deadline) -> Process:
        """Run one more program: an OCI `process` object (terminal, user, args, env, cwd, capabilities, noNewPrivileges).

        Raises CommandNotFound, CommandNotExecutable, InvalidRequest (user, cwd), Conflict (not running).
        """

    def state(self) -> Status:
        """CREATED, RUNNING, PAUSED or EXITED."""

    def usage(self) -> Usage: ...

    def processes(self) -> list[dict[str, Any]]:
        """One entry a process: pid, ppid, uid, user, tty, stime_ns, cpu_ns, command. For `top`."""

    def delete(self, by: Deadline) -> None:
        """Kill what is left and remove everything that `create` made, but for what the upper and `data_dir` hold."""


# Abilities that not every driver has, looked for with getattr; a shim answers Unsupported for one that is missing.


class Pausable(Protocol):
    """Of a Created: freeze and thaw the workload. Both are idempotent; `state()` tells PAUSED."""

    def pause(self, by: Deadline) -> None: ...

    def resume(self, by: Deadline) -> None: ...


class Updatable(Protocol):
    """Of a Created."""

    def update(self, resources: dict[str, Any], by: Deadline) -> list[str] | None:
        """Change limits while it runs: an OCI `linux.resources` with only what changes. Returns what could not be done yet.

        Raises Unsupported naming the limit that cannot be changed now; nothing is changed then.
        """


class Growable(Protocol):
    """Of a Created whose writable layer is a disk."""

    def grow(self, disk_bytes: int, by: Deadline) -> None:
        """Make the disk and its file system larger. Raises InvalidRequest when it would shrink."""


class Alarmed(Protocol):
    """Of a Created that can tell, while the workload runs on, that the kernel has killed one of its processes for memory."""

    on_oom: Callable[[], None] | None  # called from the loop, perhaps several times


class Mountable(Protocol):
    """Of a Created: what is mounted in the running root for the rest of the run."""

    def attach(self, mount: dict[str, Any], by: Deadline) -> None:
        """Mount one more: an entry of config.json's `mounts`, a bind or `ambi.disk`. A missing destination is made.

        Raises NotFound (the source), InvalidRequest (the destination), Conflict (something was attached there, it does not
        run, no room), Unsupported. Nothing is mounted then.
        """

    def detach(self, destination: str, by: Deadline, *, force: bool) -> None:
        """Unmount what was attached at `destination`. force: also while it is in use; who uses it has it until he lets go.

        Raises NotFound, Conflict (in use, or something was mounted over it).
        """


class Pluggable(Protocol):
    """Of a Created whose workload does not see what the engine does in its network namespace: a VM."""

    def plug_nic(self, name: str, by: Deadline) -> None:
        """Give the workload the interface `name` that has just appeared in the namespace."""

    def unplug_nic(self, name: str, by: Deadline) -> None:
        """Take it away; the engine deletes the interface afterwards. One that is not there is no error."""


class Inspectable(Protocol):
    """Of a Created: what is worth knowing of the machine behind it, for people who look into it."""

    def inspect(self) -> dict[str, Any]:
        """Plain JSON: {"vmm": name, "accelerator": name, ...} with the back-end's own figures."""


class Saving(Protocol):
    """Of a Created: its machine and its disks, as they are at one moment, as files."""

    def save(self, home: Path, notes: dict[str, str], by: Deadline) -> dict[str, Any]:
        """Write a snapshot's files into the draft of `home` (hyper/vm/snapshots.py); it runs on when this returns.

        notes: what the caller wants to find in it again. The result is the manifest, with which somebody else, who has the
        time, publishes it. It is a difference to the last one of this run that is still there, where it can be. Raises an
        AmbiError: Conflict (it does not run), Unsupported
        (what it has cannot be saved); it runs on then, too, and the draft is the caller's to discard.
        """

    def save_and_end(self, home: Path, notes: dict[str, str], by: Deadline) -> dict[str, Any]:
        """The same and published, and what runs ends with it: not one instruction of it comes after the snapshot."""


class Restorable(Protocol):
    """Of a Driver whose Created are Saving."""

    def restore(self, plan: LaunchPlan, home: Path, undo: Undo, by: Deadline, loop: Loop) -> Created:
        """In the place of `create`: the workload runs on from the snapshot at `home`, and `start` takes it over.

        Until `start` returns nothing of the instance has changed. Raises as `create`, and Corrupt (a file is damaged, which
        is named), Unsupported (another host, back-end or version), Conflict (no workload runs in it).
        """


class Browsable(Protocol):
    """Of a Created, and of what `Driver.browse(plan, undo, by, loop)` returns for an instance that does not run."""

    def tree(self, request: dict[str, Any], fd: int | None, done: Callable[[dict[str, Any] | AmbiError], None]) -> None:
        """Look into or change the root; ambi/shim/PROTOCOL.md, "Trees", has the requests and answers.

        fd: where the tar stream goes to or comes from; taken over. done: called once, from the loop.
        """


class Propagating(Protocol):
    """Of a Driver whose workloads can share mounts with the host."""

    def use_host_mounts(self, namespace: int) -> None:
        """A descriptor of the host's mount namespace, for the next `create`; it stays the caller's."""


class Problem(NamedTuple):
    """Why a plan cannot work here, and what to do."""

    message: str
    hint: str | None = None


class Features(NamedTuple):
    """What a driver can do on this host.

    problem: why it is unusable (None when usable). details: what `doctor` prints, name to value.
    """

    problem: Problem | None
    details: dict[str, str]


class Driver(Protocol):
    """Runs prepared OCI workloads in one kind of isolation. Lives in the shim, never in the engine.

    A driver creates nothing that the plan does not name, pulls no image, allocates no address and prints nothing.
    Made by a factory without arguments; importing its module must be cheap, see ambi/shim/README.md.
    """

    isolation: ClassVar[Isolation]

    def probe(self) -> Features: ...

    def check(self, plan: LaunchPlan) -> list[Problem]:
        """No side effects; an empty list means create should work."""

    def create(self, plan: LaunchPlan, undo: Undo, by: Deadline, loop: Loop) -> Created:
        """Raises Unsupported, InvalidRequest, NotFound (a mount's source), DeadlineExceeded, CommandNotFound."""

    def sweep(self, plan: LaunchPlan) -> None:
        """Remove whatever a dead shim left of `plan`: processes, cgroups, mounts, sockets. Idempotent."""
