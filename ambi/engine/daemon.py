"""The engine as a process: lock, format, socket, log, signals.

    python -I -m ambi.engine [--data-root D] [--run-root R] [--socket S] [--detach]

SIGTERM and SIGINT end it; instances run on. A second engine on the same roots is refused.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import logging.handlers
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from ambi.core.errors import AmbiError, Conflict, Corrupt, Forbidden, InvalidRequest, Unsupported, from_os_error
from ambi.core.roots import DEFAULT_DATA_ROOT, DEFAULT_RUN_ROOT, DEFAULT_SOCKET, FORMAT, Roots
from ambi.engine import service

log = logging.getLogger("ambi.engine")

SERVER = "ambi.api.server"  # on the floor above, so loaded by name: its `serve(engine, path)` returns what `close` ends
_LOG_BYTES, _LOG_FILES = 8 << 20, 3
_USAGE = "usage: python -I -m ambi.engine [--data-root DIRECTORY] [--run-root DIRECTORY] [--socket PATH] [--detach]"


class Options(NamedTuple):
    roots: Roots
    detach: bool


def parse(argv: list[str]) -> Options:
    """Raises InvalidRequest. `--name value` and `--name=value`."""
    values = {
        "--data-root": str(DEFAULT_DATA_ROOT), "--run-root": str(DEFAULT_RUN_ROOT), "--socket": str(DEFAULT_SOCKET),
    }  # fmt: skip
    detach, rest, given = False, list(argv), set()
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if word == "--detach":
            detach = True
        elif name in values and (equals or rest):
            values[name] = value if equals else rest.pop(0)
            given.add(name)
        else:
            raise InvalidRequest(f"unknown or incomplete option: {word}", hint=_USAGE)
    if "--run-root" in given and "--socket" not in given:
        values["--socket"] = os.path.join(values["--run-root"], "ambi.sock")
    return Options(Roots.of(values["--data-root"], values["--run-root"], values["--socket"]), detach)


def main(argv: list[str]) -> int:
    """Run the engine until it is told to end. Returns the process's exit status; errors are printed, one line each."""
    try:
        options = parse(argv)
        if os.geteuid() != 0:
            raise Forbidden("the engine must run as root", hint="use sudo, or join the group `ambi` of a running engine")
        if options.detach:
            return _detached(options.roots)
        run(options.roots)
    except AmbiError as error:
        return _report(error)
    except OSError as error:
        return _report(from_os_error("the engine cannot run", error))
    return 0


def _report(error: AmbiError) -> int:
    print(f"error: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)
    if log.hasHandlers():  # else logging's last resort would print it once more
        log.error("%s", error)
    return error.exit_status


def run(roots: Roots) -> None:
    """Serve until SIGTERM or SIGINT."""
    own = service.taken()
    prepare(roots)
    with Lock(roots):
        check_format(roots)
        _log_to(roots.data / "engine.log")
        _write_start_file(roots, own)
        _raise_descriptor_limit()
        _serve(roots, _on_signals(), own)


def _serve(roots: Roots, stop: int, own: service.Service | None) -> None:
    """Until there is something to read from the descriptor `stop`."""
    from importlib import import_module

    from ambi.engine.engine import Engine

    serve = import_module(SERVER).serve
    engine = Engine.open(roots)
    try:
        server = serve(engine, roots.socket)
        log.info("serving at %s, pid %d", roots.socket, os.getpid())
        if own:
            own.tell("READY=1")
        try:
            os.read(stop, 1)
        finally:
            if own:
                own.tell("STOPPING=1")
            server.close()
            roots.socket.unlink(missing_ok=True)
    finally:
        idle = not engine.list(False, {})
        engine.close()
        _remove_cgroup(time.monotonic() + (2 if idle else 0))
        log.info("ended")


def prepare(roots: Roots) -> None:
    """Make the directories. The run root can be entered by members of the socket's group; what is in it cannot."""
    for path, mode in ((roots.data, 0o711), (roots.run, 0o711)):
        try:
            path.mkdir(mode=mode, parents=True, exist_ok=True)
        except OSError as error:
            raise from_os_error(f"cannot make the directory {path}", error) from error


class Lock:
    """Holds `engine.lock` of a run root, with our pid in it, and one of the data root. Raises Conflict when taken."""

    def __init__(self, roots: Roots) -> None:
        self._paths = (roots.engine_lock, roots.data / "engine.lock")
        self._fds: list[int] = []

    def __enter__(self) -> Lock:
        for path in self._paths:
            self._take(path)
        return self

    def _take(self, path: Path) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._fds.append(fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(fd, 32, 0).decode(errors="replace").strip()
            self.__exit__()
            if error.errno != errno.EWOULDBLOCK:
                raise
            raise Conflict(
                f"another engine (pid {owner or 'unknown'}) uses {path.parent}",
                hint="use it, stop it with `ambi engine stop`, or give --data-root, --run-root and --socket of your own",
            ) from error
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)

    def __exit__(self, *_: object) -> None:
        while self._fds:
            os.close(self._fds.pop())


def check_format(roots: Roots) -> None:
    """Write `format.json` of a new data root; raise Unsupported for a newer one, Corrupt for an unreadable one."""
    from ambi.engine.create import write_whole

    try:
        text = roots.format_file.read_text()
    except FileNotFoundError:
        if roots.state_db.exists():
            raise Corrupt(
                f"data root {roots.data} has a state.db but no format.json",
                hint=f"""echo '{{"format": {FORMAT}}}' > {roots.format_file}, if it is a data root of this version""",
            ) from None
        write_whole(roots.format_file, json.dumps({"format": FORMAT}) + "\n")
        return
    try:
        found = int(json.loads(text)["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise Corrupt(f"{roots.format_file} is damaged: {error}", hint=f'it should be {{"format": {FORMAT}}}') from error
    if found > FORMAT:
        raise Unsupported(
            f"data root {roots.data} has format {found}, this ambi knows up to {FORMAT}",
            hint="use the newer ambi, or another --data-root",
        )


def start_argv(roots: Roots) -> list[str]:
    """How to start this engine again from nothing."""
    places = ["--data-root", str(roots.data), "--run-root", str(roots.run), "--socket", str(roots.socket)]
    return [sys.executable, "-I", "-m", "ambi.engine", *places]


def _write_start_file(roots: Roots, own: service.Service | None) -> None:
    from ambi.engine.create import write_whole

    argv = (own and own.start_argv) or start_argv(roots)
    write_whole(roots.engine_json, json.dumps({"argv": argv, "pid": os.getpid()}) + "\n")


def _log_to(path: Path) -> None:
    """Log to a rotated file, and to stderr when that is somebody's."""
    handlers: list[logging.Handler] = [
        logging.handlers.RotatingFileHandler(path, maxBytes=_LOG_BYTES, backupCount=_LOG_FILES)
    ]
    if os.isatty(2):
        handlers.append(logging.StreamHandler())
    logging.raiseExceptions = False  # a full disk is no reason to write tracebacks to where nobody reads
    logging.basicConfig(
        level=logging.INFO, handlers=handlers, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    threading.excepthook = lambda args: log.error(
        "thread %s",
        args.thread.name if args.thread else "?",
        exc_info=(args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback),
    )


def _raise_descriptor_limit() -> None:
    """Up to the hard limit, which needs no privilege: every instance and client takes a few."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:
        log.warning("cannot raise the limit of open files: %s", error)


def _on_signals() -> int:
    """A descriptor that can be read from once we are told to end.

    The kernel may interrupt any thread with a signal, while Python runs its handler in the main one, and only once that
    leaves its system call. So the byte is written by the C handler, wherever that runs.
    """
    stop, told = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _noted)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    return stop


def _noted(number: int, frame: FrameType | None) -> None:
    """A handler, so that the signal is caught; what it does is done by the wake-up descriptor."""


def _detached(roots: Roots) -> int:
    """Start an engine that outlives the caller: its own session, nothing of the caller's terminal and, where possible, not
    its cgroup. Returns when it serves; its first words are passed on when it does not come up.
    """
    import subprocess

    prepare(roots)
    read, write = os.pipe()
    if os.fork() == 0:
        os.close(read)
        os.setsid()
        _leave_cgroup()
        subprocess.Popen(start_argv(roots), stdin=subprocess.DEVNULL, stdout=write, stderr=write, cwd="/", close_fds=True)
        os._exit(0)
    os.wait()
    os.close(write)
    return _await_service(roots, read)


def _await_service(roots: Roots, output: int) -> int:
    import select
    import socket
    import time

    text = b""
    end = time.monotonic() + 60.0
    while time.monotonic() < end:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                folder = os.open(roots.socket.parent, os.O_PATH)
                try:
                    probe.connect(f"/proc/self/fd/{folder}/{roots.socket.name}")
                finally:
                    os.close(folder)
                return 0
            except OSError:  # not yet: what it says meanwhile is read below
                pass
        if select.select([output], [], [], 0.02)[0]:
            block = os.read(output, 4096)
            if not block:
                sys.stderr.write(text.decode(errors="replace"))
                return 125
            text += block
    print(f"error: the engine does not answer at {roots.socket}\nhint: see {roots.data}/engine.log", file=sys.stderr)
    return 125


# In the hierarchies by which systemd ends sessions and services; the resource controllers of cgroup v1 stay as they are.
_CGROUP_ROOTS = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/systemd"), Path("/sys/fs/cgroup/unified"))


def _leave_cgroup() -> None:
    """Move to a cgroup of our own, so that the end of the caller's session or service does not end the engine."""
    for root in _CGROUP_ROOTS:
        own = root / "ambi" / "engine"
        try:
            if (root / "cgroup.procs").exists():
                own.mkdir(parents=True, exist_ok=True)
                (own / "cgroup.procs").write_text(str(os.getpid()))
        except OSError:  # not ours to make, or it takes no processes
            continue


def _remove_cgroup(end: float) -> None:
    """Undo `_leave_cgroup` at the end of the engine. It stays while shims are in it, whose engine was started so.

    end: until when (monotonic) to wait for the zygote and the last shims, which may still be on their way out.
    """
    for root in _CGROUP_ROOTS:
        own = root / "ambi" / "engine"
        try:
            if str(os.getpid()) in (own / "cgroup.procs").read_text().split():
                (root / "cgroup.procs").write_text(str(os.getpid()))
                _remove_when_left(own, end)
                own.parent.rmdir()
        except OSError:  # no such hierarchy, or instances still run in it
            continue


def _remove_when_left(cgroup: Path, end: float) -> None:
    """Remove it once nobody is in it; OSError when somebody stays."""
    while True:
        try:
            cgroup.rmdir()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
