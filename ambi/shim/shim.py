"""The shim: supervises one run of one instance; parent of init, owner of stdio and log, keeper of the exit status.

    new ──start──> running ──init ended, output read──> ended (exit.json, exit event, delete), then the process exits
      └──delete, a failed start, or nobody is left who could ask──────────────────────────────────┘

Requests are handled between two turns of the loop. A driver may turn the loop inside a call of its own; then only pumps and
its own watches run.
"""

from __future__ import annotations

import gc
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ambi.core.deadline import Deadline
from ambi.core.driver import Created, Driver
from ambi.core.errors import AmbiError, Conflict, Internal, InvalidRequest, NotFound, Unsupported, from_os_error
from ambi.core.loop import Loop
from ambi.core.model import ExitStatus
from ambi.core.plan import LaunchPlan
from ambi.core.undo import Undo
from ambi.shim import abilities, drivers, leave, logread, netns, record, trees
from ambi.shim.attach import Attach, Hub
from ambi.shim.control import Control, Request
from ambi.shim.log import LogWriter
from ambi.shim.session import Session
from ambi.shim.waits import Understudies

T = TypeVar("T")

DELETE_SECONDS = 30.0  # what a driver may take to remove things when nobody said otherwise
START_SECONDS = 120.0
KEPT_EXECS = 128
EXEC_GRACE_SECONDS = 1.0  # how long the exit of init waits for the ends of its execs
KILLED = 137  # by SIGKILL: it may have been for memory
LOST = ExitStatus(KILLED, "killed; its end could not be observed")


class Spec(NamedTuple):
    """What the zygote was asked for. home: a descriptor of the engines' mount namespace."""

    id: str
    isolation: str
    data_dir: str
    run_dir: str
    run_root: str
    home: int


class Shim:
    """State of one supervised run; `turn` is called until `done`."""

    def __init__(self, spec: Spec, loop: Loop, control: Control, driver: Driver | None = None) -> None:
        self.spec = spec
        self.loop = loop
        self.control = control
        self.done = False
        self._phase = "new"  # then "running", "ended"
        self._driver = driver
        self._created: Created | None = None
        self._namespaces: dict[str, int] = {}  # what `start` came with, by kind: held until we end
        self._hub = Hub(loop, spec.data_dir, terminal=False, stdin_once=False)
        self._hub.on_detach = lambda: self.control.event({"event": "detach", "exec_id": None})
        self._waits = Understudies(loop)
        self._browser = trees.Browser(loop)
        self._log: LogWriter | None = None
        self._init: Session | None = None
        self._size: tuple[int, int] | None = None
        self._execs: dict[str, Session] = {}
        self._past_execs: dict[str, tuple[int, ExitStatus]] = {}  # the last KEPT_EXECS that ended: pid and exit
        self._mounts: dict[str, dict[str, Any]] = {}  # notes of what was mounted while it runs, by destination
        self._oom_told = False
        self._slow: list[Hub] = []  # of ended execs that still have clients
        self._deletions: list[Request] = []
        self._todo: deque[Callable[[], None]] = deque()  # for the next turn, outside of a driver's calls

    def turn(self) -> None:
        """One round: wait for something, then handle what came."""
        self.loop.step()
        while self._todo or self.control.requests:
            if self._todo:
                self._todo.popleft()()
            else:
                self._handle(self.control.requests.popleft())
        if self._phase == "new" and not self.control.connected and not self._hub.clients:
            try:
                self._browser.close()
            except AmbiError as error:
                trace(error)
            self.done = True

    # Requests

    def _handle(self, request: Request) -> None:
        name = request.body.get("op")
        handler = HANDLERS.get(name) if isinstance(name, str) else None
        try:
            if handler is None:
                raise InvalidRequest(f"shim knows no operation {name!r}")
            result = handler(self, request)
        except AmbiError as error:
            request.fail(error)
        except OSError as error:
            request.fail(from_os_error(f"shim of {self.spec.id[:12]} cannot do '{name}'", error))
        except Exception as error:  # a bug in a driver must not take the instance with it
            request.fail(Internal(f"'{name}' failed: {describe(error)}", hint="the run root's zygote.log has more"))
            trace(error)
        else:
            if result is not None:
                request.answer(result)

    def start(self, request: Request) -> dict[str, Any]:
        if self._phase != "new":
            raise Conflict(f"instance {self.spec.id[:12]} has been started already")
        self._browser.close()
        by = Deadline.after(_seconds(request, START_SECONDS))
        self._namespaces = netns.taken(request.body, request.message)
        try:
            pid = self._launch(by, request.body.get("snapshot"))
        except BaseException:
            if self._init is not None:
                self._init.abandon()
            else:
                self._hub.end()
            self.done = True
            raise
        finally:
            if (mounts := self._namespaces.pop("mount", None)) is not None:  # held, it would keep the other's root mounted
                os.close(mounts)
        self._phase = "running"
        gc.freeze()  # what is there now stays for the whole run
        return {"pid": pid}

    def _launch(self, by: Deadline, snapshot: str | None) -> int:
        plan = netns.given(LaunchPlan.load(Path(self.spec.data_dir)), self._namespaces)
        supervision = plan.supervision
        terminal = bool((plan.config.get("process") or {}).get("terminal"))
        self._hub.terminal, self._hub.stdin_once = terminal, supervision.stdin_once
        if supervision.log is not None:
            self._log = LogWriter(str(supervision.log), supervision.log_max_bytes, supervision.log_max_files)
        driver = self._driver or drivers.load(plan.isolation.value)
        getattr(driver, "use_host_mounts", lambda _: None)(self.spec.home)
        with Undo() as undo:
            if snapshot is None:
                created = driver.create(plan, undo, by, self.loop)
            else:
                created = abilities.restorable(driver).restore(plan, Path(snapshot), undo, by, self.loop)
            undo.keep()
        self._created = created
        abilities.hear_oom(created, self._out_of_memory)
        try:
            self._init = Session(self.loop, self._hub, self._log, lambda _: self._todo.append(self._init_ended))
            self._init.run(created.init)
            if self._size is not None and terminal:
                created.init.resize(*self._size)
            created.start(by)
        except BaseException as error:
            failure = self._delete()
            if failure is not None:
                error.add_note(failure.message)
            raise
        return created.init.pid

    def attach(self, request: Request) -> dict[str, Any]:
        options = Attach.from_wire(request.body)
        if self._phase == "ended":
            raise Conflict(f"instance {self.spec.id[:12]} has ended")
        sock = _take_socket(request)
        self._hub.attach(sock, options, self._past() if options.logs else ())
        return {}

    def wait(self, request: Request) -> dict[str, Any]:
        chunked = _flag(request, "chunked")
        if self._phase == "ended":
            raise Conflict(f"instance {self.spec.id[:12]} has ended")
        self._waits.add(_take_socket(request), request.origin, chunked=chunked)
        return {}

    def _past(self) -> Iterator[tuple[int, bytes]]:
        """What has been logged so far, and what is printed but waits for its newline."""
        supervision = LaunchPlan.load(Path(self.spec.data_dir)).supervision
        if supervision.log is None:
            return
        for entry in logread.entries(supervision.log):
            yield (2 if entry.stream == "stderr" else 1), entry.line
        if self._log is not None:
            for stream in (1, 2):
                if held := self._log.held(stream):
                    yield stream, held

    def exec(self, request: Request) -> dict[str, Any]:
        body = request.body
        exec_id, process = _field(request, "exec_id", str), _field(request, "process", dict)
        if self._created is None or self._phase != "running":
            raise Conflict(f"instance {self.spec.id[:12]} is not running")
        if exec_id in self._execs:
            raise Conflict(f"exec {exec_id} runs already")
        hub = Hub(self.loop, self.spec.data_dir, terminal=bool(process.get("terminal")), stdin_once=True)
        hub.on_detach = lambda: self.control.event({"event": "detach", "exec_id": exec_id})
        if body.get("attach") is not None:
            options = Attach.from_wire(_field(request, "attach", dict))
            hub.attach(_take_socket(request), options)
        session = Session(self.loop, hub, None, lambda s: self._todo.append(lambda: self._exec_ended(exec_id, s)))
        session.on_end = lambda status: self._exec_ending(exec_id, status)
        by = Deadline.after(_seconds(request, START_SECONDS))
        try:
            started = self._created.exec(process, bool(body.get("stdin")), by)
        except AmbiError as error:
            hub.output(1, f"{error.message}\r\n".encode())
            hub.end()
            raise
        except BaseException:
            hub.end()
            raise
        self._execs[exec_id] = session
        session.run(started)
        return {"pid": started.pid}

    def signal(self, request: Request) -> dict[str, Any]:
        number = _field(request, "signal", int)
        if not 0 < number < 65:
            raise InvalidRequest(f"there is no signal {number}")
        session = self._session(request.body.get("exec_id"))
        if session.process is not None:
            session.process.signal(number)
        return {}

    def resize(self, request: Request) -> dict[str, Any]:
        size = _field(request, "rows", int), _field(request, "columns", int)
        if not all(0 < n < 65536 for n in size):
            raise InvalidRequest(f"a terminal cannot have {size[0]} rows and {size[1]} columns")
        if self._phase == "new" and request.body.get("exec_id") is None:
            self._size = size
            return {}
        session = self._session(request.body.get("exec_id"))
        if session.process is not None:
            session.process.resize(*size)
        return {}

    def state(self, _request: Request) -> dict[str, Any]:
        status = self._running().state().value if self._phase == "running" else {"new": "created"}.get(self._phase, "exited")
        init = self._init
        return {
            "status": status,
            "pid": self._created.init.pid if self._created else 0,
            "exit": init.exit._asdict() if init and init.exit else None,
            "execs": self._exec_states(),
            "mounts": list(self._mounts.values()),
        }

    def _exec_states(self) -> dict[str, Any]:
        running = {n: {"pid": s.process.pid if s.process else 0, "exit": None} for n, s in self._execs.items()}
        return running | {n: {"pid": pid, "exit": status._asdict()} for n, (pid, status) in self._past_execs.items()}

    def usage(self, _request: Request) -> dict[str, Any]:
        return self._running().usage()._asdict()

    def inspect(self, _request: Request) -> dict[str, Any]:
        """{} of a driver that has nothing to say."""
        found = getattr(self._running(), "inspect", None)
        return found() if found else {}

    def processes(self, _request: Request) -> dict[str, Any]:
        return {"processes": self._running().processes()}

    def tree(self, request: Request) -> None:
        """Answered when it is done."""
        if self._phase == "ended":
            raise Conflict(f"instance {self.spec.id[:12]} has ended")
        if request.body.get("verb") == trees.LEAVE:
            self._leave(request)
            return
        found: object = self._created
        if self._phase == "new":
            plan = LaunchPlan.load(Path(self.spec.data_dir))
            driver = self._driver or drivers.load(plan.isolation.value)
            getattr(driver, "use_host_mounts", lambda _: None)(self.spec.home)
            found = self._browser.open(driver, plan, Deadline.after(_seconds(request, START_SECONDS)))
        trees.begin(found, request)

    def _leave(self, request: Request) -> None:
        """Nobody looks any more into the root that was prepared: let go of it, and end when that was all."""
        self._browser.close()
        self.done = self._phase == "new" and not self._hub.clients
        request.answer({"ends": self.done})

    def netns(self, request: Request) -> None:
        """A namespace of the instance, a descriptor of which goes with the answer."""
        pid = self._running().init.pid if self.spec.isolation == "container" else None
        kind = request.body.get("kind", "network")
        fd = netns.opened(kind, self._namespaces.get(kind), pid)
        try:
            request.answer({}, [fd])
        finally:
            os.close(fd)

    def pause(self, request: Request) -> dict[str, Any]:
        self._able("pause")(Deadline.after(_seconds(request, START_SECONDS)))
        return {}

    def resume(self, request: Request) -> dict[str, Any]:
        self._able("resume")(Deadline.after(_seconds(request, START_SECONDS)))
        return {}

    def save(self, request: Request) -> dict[str, Any]:
        save = self._able("save_and_end" if _flag(request, "ends") else "save")
        by = Deadline.after(_seconds(request, START_SECONDS))
        return {"manifest": save(Path(_field(request, "home", str)), _field(request, "notes", dict), by)}

    def update(self, request: Request) -> dict[str, Any]:
        by = Deadline.after(_seconds(request, START_SECONDS))
        return {"warnings": self._able("update")(_field(request, "resources", dict), by) or []}

    def grow(self, request: Request) -> dict[str, Any]:
        self._able("grow")(_field(request, "disk_bytes", int), Deadline.after(_seconds(request, START_SECONDS)))
        return {}

    def mount(self, request: Request) -> dict[str, Any]:
        mount, note = _field(request, "mount", dict), _field(request, "note", dict)
        destination = mount.get("destination")
        if not isinstance(destination, str) or not destination:
            raise InvalidRequest("a mount without a destination")
        self._able("attach")(mount, Deadline.after(_seconds(request, START_SECONDS)))
        self._mounts[destination] = note
        return {}

    def unmount(self, request: Request) -> dict[str, Any]:
        destination, force = _field(request, "destination", str), _flag(request, "force")
        self._able("detach")(destination, Deadline.after(_seconds(request, START_SECONDS)), force=force)
        self._mounts.pop(destination, None)
        return {}

    def _able(self, ability: str) -> Callable[..., Any]:
        """A method that not every driver has, see ambi/core/driver.py."""
        found: Callable[..., Any] | None = getattr(self._running(), ability, None)
        if found is None:
            raise Unsupported(
                f"a {self.spec.isolation} cannot do this: {ability}", hint="run it in the other kind of isolation"
            )
        return found

    def plug_nic(self, request: Request) -> dict[str, Any]:
        netns.plug(self._running(), _field(request, "name", str), Deadline.after(_seconds(request, START_SECONDS)))
        return {}

    def unplug_nic(self, request: Request) -> dict[str, Any]:
        netns.unplug(self._running(), _field(request, "name", str), Deadline.after(_seconds(request, START_SECONDS)))
        return {}

    def delete(self, request: Request) -> None:
        """Answered at the end of the run, which this brings about."""
        by_s = _seconds(request, DELETE_SECONDS)
        self._browser.close()
        self._deletions.append(request)
        if self._phase == "new":
            self._end(None)
        elif self._phase == "running" and self._init is not None and self._init.exit is None:
            assert self._init.process is not None
            abilities.thaw(self._running(), Deadline.after(by_s))
            self._init.process.signal(9)
            self.loop.later(by_s, self._force)

    # The end of a run

    def _force(self) -> None:
        """SIGKILL has not been enough in time: end the run without init's own report."""
        if self._phase == "running" and self._init is not None:
            self._init.end(LOST)

    def _init_ended(self) -> None:
        """The ends of the execs come first, when they come soon: they died with init."""
        if self._execs:
            self.loop.later(EXEC_GRACE_SECONDS, lambda: self._todo.append(self._run_ended))
        else:
            self._run_ended()

    def _exec_ended(self, exec_id: str, session: Session) -> None:
        assert session.exit is not None and session.process is not None
        self._execs.pop(exec_id, None)
        self._past_execs[exec_id] = (session.process.pid, session.exit)
        if len(self._past_execs) > KEPT_EXECS:
            del self._past_execs[next(iter(self._past_execs))]
        self._slow = [hub for hub in (*self._slow, session.hub) if hub.clients]
        if session.exit.code == KILLED:
            self._tell_exec_end(exec_id, session.exit)
        if self._init is not None and self._init.finished and not self._execs:
            self._run_ended()

    def _exec_ending(self, exec_id: str, status: ExitStatus) -> None:
        """Tell of it before its client sees the end of its stream, and asks the engine for the exit code."""
        if status.code != KILLED:  # else the driver is asked why, which is no time for now
            self._tell_exec_end(exec_id, status)

    def _tell_exec_end(self, exec_id: str, status: ExitStatus) -> None:
        self._tell_oom(status)
        self.control.event({"event": "exec_exit", "exec_id": exec_id, "exit": status._asdict()})

    def _tell_oom(self, status: ExitStatus) -> None:
        """Say once that the instance ran out of memory; an exec that was killed may be how it shows."""
        oom = status.oom_killed
        if not oom and status.code == KILLED and self._phase == "running" and self._created is not None:
            try:
                oom = self._created.usage().oom_kills > 0
            except AmbiError:  # init is gone, and its own status will tell
                return
        if oom:
            self._out_of_memory()

    def _out_of_memory(self) -> None:
        if not self._oom_told:
            self._oom_told = True
            self.control.event({"event": "oom"})

    def _run_ended(self) -> None:
        if self._phase == "running" and self._init is not None and self._init.exit is not None:
            self._end(self._init.exit)

    def _end(self, status: ExitStatus | None) -> None:
        """The order of PROTOCOL.md, "How a run ends"; `status` is None when nothing has run."""
        self._phase = "ended"
        for session in self._execs.values():
            session.end(LOST)
        self._hub.end()
        if self._log is not None:
            self._log.close()
        waiting = None
        if status is not None:
            status = leave.write_exit(self.spec.data_dir, status)
            self._tell_oom(status)
            if not self.control.event({"event": "exit", "exit": status._asdict()}):
                notice = leave.Notice(leave.Parting(self.spec.id, self.spec.run_root, self.spec.home), status)
                waiting = notice if notice.send() else None
        failure = self._delete()
        if status is not None:
            self._waits.answer(status.code, self.control.serves)
        for request in self._deletions:
            if failure is None:
                request.answer({})
            else:
                request.fail(failure)
        if waiting is not None:
            waiting.wait(self.loop, lambda: self.control.connected)
        self.done = True

    def _delete(self) -> AmbiError | None:
        if self._created is None:
            return None
        by_s = max((_seconds(r, DELETE_SECONDS) for r in self._deletions), default=DELETE_SECONDS)
        try:
            self._created.delete(Deadline.after(by_s))
        except AmbiError as error:
            trace(error)
            return error
        except Exception as error:
            trace(error)
            return Internal(f"cannot remove what the run of {self.spec.id[:12]} left: {describe(error)}")
        return None

    def hubs(self) -> list[Hub]:
        """The hubs that may still have clients to serve."""
        return [self._hub, *self._slow, *(session.hub for session in self._execs.values())]

    # Small things

    def _running(self) -> Created:
        if self._created is None or self._phase != "running":
            raise Conflict(f"instance {self.spec.id[:12]} is not running")
        return self._created

    def _session(self, exec_id: Any) -> Session:
        if exec_id is not None:
            if not isinstance(exec_id, str) or exec_id not in self._execs:
                raise NotFound(f"no such exec: {exec_id}")
            return self._execs[exec_id]
        if self._init is None or self._phase != "running":
            raise Conflict(f"instance {self.spec.id[:12]} is not running")
        return self._init


HANDLERS: dict[str, Callable[[Shim, Request], dict[str, Any] | None]] = {
    "start": Shim.start,
    "attach": Shim.attach,
    "wait": Shim.wait,
    "exec": Shim.exec,
    "signal": Shim.signal,
    "resize": Shim.resize,
    "state": Shim.state,
    "usage": Shim.usage,
    "inspect": Shim.inspect,
    "processes": Shim.processes,
    "tree": Shim.tree,
    "netns": Shim.netns,
    "pause": Shim.pause,
    "resume": Shim.resume,
    "save": Shim.save,
    "update": Shim.update,
    "grow": Shim.grow,
    "mount": Shim.mount,
    "unmount": Shim.unmount,
    "plug_nic": Shim.plug_nic,
    "unplug_nic": Shim.unplug_nic,
    "delete": Shim.delete,
}


def supervise(spec: Spec, sock: socket.socket, driver: Driver | None = None) -> int:
    """Be the shim of `spec`, with `sock` as the first control connection. Returns the process's exit status.

    driver: one that was parked in this process for the isolation of `spec`.
    """
    if os.getsid(0) != os.getpid():
        os.setsid()
    os.makedirs(spec.run_dir, 0o700, exist_ok=True)
    record.write(spec.run_dir)
    loop = Loop()
    control = Control(loop, os.path.join(spec.run_dir, record.SOCKET))
    control.add(sock)
    shim = Shim(spec, loop, control, driver)
    while not shim.done:
        shim.turn()
    control.close()
    leave.serve_on(shim.hubs())
    return 0


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def trace(error: BaseException) -> None:
    """A line for the zygote's log with the calls that led to `error`; `traceback` would cost memory in each shim."""
    calls, at = [], error.__traceback__
    while at is not None:
        calls.append(f"{os.path.basename(at.tb_frame.f_code.co_filename)}:{at.tb_lineno}")
        at = at.tb_next
    try:
        os.write(2, f"shim[{os.getpid()}]: {describe(error)} ({' > '.join(calls)})\n".encode(errors="replace"))
    except OSError:  # the log's disk is full: there is nowhere else to say so
        pass


def _field(request: Request, name: str, kind: type[T]) -> T:
    value = request.body.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InvalidRequest(f"'{request.body.get('op')}' wants '{name}' as {kind.__name__}, not {value!r:.80}")
    return value


def _flag(request: Request, name: str) -> bool:
    value = request.body.get(name)
    if not isinstance(value, bool):
        raise InvalidRequest(f"'{request.body.get('op')}' wants '{name}' as bool, not {value!r:.80}")
    return value


def _seconds(request: Request, default: float) -> float:
    """`by_s`: how long this may take."""
    value = request.body.get("by_s")
    if value is None:
        return default
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1e6:
        raise InvalidRequest(f"'by_s' is {value!r:.80}, not a time in seconds")
    return float(value)


def _take_socket(request: Request) -> socket.socket:
    if len(request.message.fds) != 1:
        raise InvalidRequest(f"'{request.body.get('op')}' wants one descriptor, not {len(request.message.fds)}")
    return socket.socket(fileno=request.message.fds.pop())
