"""What the engine gives out and takes in: immutable values, safe to share between threads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ambi.core.model import ExecId, InstanceId, Isolation, Status, Workload
from ambi.engine.mountpoints import Point
from ambi.engine.netstate import NetState

if TYPE_CHECKING:
    from ambi.engine.health import Health

WaitCondition = Literal["not-running", "next-exit", "removed"]


class CreateSpec(NamedTuple):
    """What a client asks for: Docker's Config, HostConfig and NetworkingConfig, as parsed JSON.

    In an `Instance` the same, with what Docker itself fills in: command, environment, labels, user, working directory and
    so on of the image, and a host name.
    """

    config: dict[str, Any]
    host: dict[str, Any]
    networking: dict[str, Any] = {}


class State(NamedTuple):
    """The state of an instance. Times are wall clock nanoseconds since the epoch, 0 for never.

    pid: of init, on the host for a container; 0 when it does not run. error: why the last start failed or, from
    `ExitStatus.reason`, what ended the run from outside; else "". exit_code: of the last run.
    """

    status: Status
    pid: int = 0
    exit_code: int = 0
    error: str = ""
    oom_killed: bool = False
    started_ns: int = 0
    finished_ns: int = 0

    @property
    def running(self) -> bool:
        return self.status in (Status.RUNNING, Status.PAUSED)

    @property
    def alive(self) -> bool:
        """Docker's `Running`: a restart that is waited for counts."""
        return self.running or self.status is Status.RESTARTING


class Instance(NamedTuple):
    """A snapshot of one instance.

    image: what the user typed; image_id: `sha256:...`. argv: what runs, entrypoint and command merged.
    exec_ids: of execs that have not ended. log_path: of the json-file log, None without one.
    data_dir, run_dir: the instance's own directories, see ambi/engine/README.md. net: on which networks it is.
    mounts: all but those of `--tmpfs`.
    health: of the last run, None without a check.
    """

    id: InstanceId
    name: str
    workload: Workload
    isolation: Isolation
    image: str
    image_id: str
    spec: CreateSpec
    argv: tuple[str, ...]
    created_ns: int
    state: State
    restart_count: int
    exec_ids: tuple[ExecId, ...]
    data_dir: Path
    run_dir: Path
    log_path: Path | None
    net: NetState = NetState()
    mounts: tuple[Point, ...] = ()
    health: Health | None = None

    @property
    def tty(self) -> bool:
        """Whether the output is a terminal's, which is never framed."""
        return bool(self.spec.config.get("Tty"))

    @property
    def labels(self) -> Mapping[str, str]:
        return self.spec.config.get("Labels") or {}


class Attach(NamedTuple):
    """How a client is attached.

    stdin, stdout, stderr: which streams. logs: what was logged so far comes first. stream: then live output (else the
    connection ends after the logs). framed: 8-byte heads, else raw. detach_keys: bytes that end the attachment, None for
    Docker's ctrl-p ctrl-q, b"" for none; looked for with a terminal only.
    """

    stdin: bool
    stdout: bool
    stderr: bool
    logs: bool = False
    stream: bool = True
    framed: bool = True
    detach_keys: bytes | None = None


class LogQuery(NamedTuple):
    """Which log entries. since_ns, until_ns: wall clock, inclusive, None for no bound; tail: the last N lines, None: all."""

    stdout: bool = True
    stderr: bool = True
    follow: bool = False
    tail: int | None = None
    since_ns: int | None = None
    until_ns: int | None = None


class LogEntry(NamedTuple):
    """One line as it was written, its newline included when it had one, however long."""

    stream: Literal["stdout", "stderr"]
    time_ns: int
    line: bytes


class Exec(NamedTuple):
    """A snapshot of one exec. config: Docker's ExecConfig as it came; exit_code: None until it has ended; pid: 0 before."""

    id: ExecId
    instance_id: InstanceId
    config: dict[str, Any]
    running: bool
    exit_code: int | None
    pid: int

    @property
    def tty(self) -> bool:
        return bool(self.config.get("Tty"))


class Event(NamedTuple):
    """Something that happened. type: `container` or `image`; actor_id: its id (of an image: its name or id, as Docker's)."""

    time_ns: int
    type: str
    action: str
    actor_id: str
    attributes: dict[str, str]


class Check(NamedTuple):
    """One line of `doctor`. hint: the fix, "" when there is nothing to fix."""

    name: str
    status: Literal["ok", "warning", "problem"]
    detail: str
    hint: str = ""


class EngineInfo(NamedTuple):
    """The engine about itself: versions, places, counts. `layer_form`: "erofs" or "dir" and why."""

    version: str
    pid: int
    zygote_pid: int
    started_ns: int
    data_root: Path
    run_root: Path
    socket: Path
    running: int
    paused: int
    stopped: int
    images: int
    layer_form: tuple[str, str]
    cgroup_version: int
    engine_id: str
