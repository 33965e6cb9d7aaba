"""The zygote: a small single-threaded process that has every module of a shim loaded and forks one on a message.

`python -I -m ambi.shim.zygote RUN_ROOT SOCKET_FD`, started by `launch.py`. It moves into the layers namespace (see
PROTOCOL.md), forks itself away from its starter, which thus learns that it is ready, and serves until `stop` or SIGTERM.

What runs here must not start threads: the children go on after fork without exec.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

from ambi.core.errors import AmbiError, Internal, InvalidRequest, from_os_error
from ambi.core.loop import POLLIN, Loop
from ambi.linux import mount, process, unix
from ambi.shim import drivers, parking, record, shim

MAX_CONNECTIONS = 64  # of engines; there is one, and whoever looks at us with a test
PARKED_ISOLATION = "container"
PARK_RETRY_SECONDS = 2.0  # after one has died; its successor removes what it left
PARK_AGAIN_SECONDS = 0.03  # after a spawn: not in the way of the start that it was for
SPAWN_FIELDS = ("id", "isolation", "data_dir", "run_dir", "run_root")


class Zygote:
    """Serves requests on `listener`. `home` is a descriptor of the mount namespace that engines live in."""

    def __init__(self, run_root: str, listener: socket.socket, home: int) -> None:
        self.run_root = run_root
        self.home = home
        self._listener = listener
        self._loop = Loop()
        self._connections: dict[int, socket.socket] = {}
        self._stopped = False
        self._parked: parking.Parked | None = None
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def serve(self) -> None:
        """Answer requests and reap shims until told to stop."""
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self._on_term)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        self._listener.setblocking(False)
        self._loop.watch(self._wake_read, POLLIN, self._on_signal)
        self._loop.watch(self._listener.fileno(), POLLIN, self._accept)
        self._park()
        self._loop.run(lambda: self._stopped)
        if self._parked is not None:
            self._parked.end()
        driver = drivers.parkable(PARKED_ISOLATION)
        if driver is not None:
            driver.unpark()  # of one that was killed

    def _on_term(self, *_: object) -> None:
        self._stopped = True

    def _on_signal(self, _revents: int) -> None:
        try:
            while os.read(self._wake_read, 512):
                pass
        except BlockingIOError:
            pass
        self._reap()

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if self._parked is not None and self._parked.pid == pid:
                self._parked.close()
                self._parked = None
                self._loop.later(PARK_RETRY_SECONDS, self._park)
            if status != 0:
                report(f"shim {pid} ended with {os.waitstatus_to_exitcode(status)}")

    def _accept(self, _revents: int) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:  # the peer has gone again, or we are out of descriptors: it will be asked again
            return
        if len(self._connections) >= MAX_CONNECTIONS or unix.peer(sock).uid != os.geteuid():
            sock.close()
            return
        sock.setblocking(False)
        self._connections[sock.fileno()] = sock
        self._loop.watch(sock.fileno(), POLLIN, lambda _: self._request(sock))

    def _drop(self, sock: socket.socket) -> None:
        self._loop.unwatch(sock.fileno())
        self._connections.pop(sock.fileno(), None)
        sock.close()

    def _request(self, sock: socket.socket) -> None:
        """Read and answer one request; what cannot be read, or an answer that cannot be sent, ends the connection."""
        try:
            message = unix.receive(sock)
            if message is None:
                self._drop(sock)
                return
        except BlockingIOError:
            return
        except (AmbiError, OSError):
            self._drop(sock)
            return
        answer: dict[str, Any] = {"seq": message.body.get("seq")}
        try:
            answer["ok"] = self._handle(message)
        except AmbiError as error:
            answer["error"] = error.to_wire()
        except OSError as error:
            answer["error"] = from_os_error(f"zygote cannot do '{message.body.get('op')}'", error).to_wire()
        except Exception as error:  # a bug must cost one request, not every later start
            report(f"{type(error).__name__} in request {message.body.get('op')!r}: {error}")
            answer["error"] = Internal(f"zygote failed: {type(error).__name__}: {error}").to_wire()
        finally:
            message.close()
        try:
            unix.send(sock, answer)
        except (AmbiError, OSError):
            self._drop(sock)

    def _handle(self, message: unix.Message) -> dict[str, Any]:
        body = message.body
        match body.get("op"):
            case "ping":
                return {"pid": os.getpid(), "version": record.VERSION}
            case "spawn":
                return {"pid": self._spawn(message)}
            case "forget":
                return {"dropped": self._forget(body.get("layers"))}
            case "stop":
                self._stopped = True
                return {}
            case other:
                raise InvalidRequest(f"zygote knows no operation {other!r}")

    def _spawn(self, message: unix.Message) -> int:
        body = message.body
        for name in SPAWN_FIELDS:
            value = body.get(name)
            if not isinstance(value, str) or not value or (name.endswith(("_dir", "_root")) and not value.startswith("/")):
                raise InvalidRequest(f"spawn: '{name}' is {value!r}")
        if len(message.fds) != 1:
            raise InvalidRequest(f"spawn: wants one descriptor, not {len(message.fds)}")
        drivers.find(body["isolation"])
        wanted = {name: body[name] for name in SPAWN_FIELDS}
        if body["isolation"] == PARKED_ISOLATION and body.get("starts", True):
            self._loop.later(PARK_AGAIN_SECONDS, self._park)
            parked, self._parked = self._parked, None
            if parked is not None and parked.give(wanted, message.fds[0]):
                return parked.pid
        return self._fork(lambda: shim.supervise(shim.Spec(**wanted, home=self.home), socket.socket(fileno=message.fds[0])))

    def _park(self) -> None:
        """Have a shim ready for the next start, where the driver can prepare something."""
        driver = drivers.parkable(PARKED_ISOLATION) if self._parked is None else None
        if driver is None or self._stopped:
            return
        try:
            ours, theirs = unix.pair()
            pid = self._fork(lambda: parking.wait(driver, ours, theirs, self.run_root, self.home))
        except OSError as error:  # no memory, process or descriptor to spare: starts do without
            report(f"cannot park a shim: {error.strerror}")
            return
        theirs.close()
        self._parked = parking.Parked(pid, ours)

    def _fork(self, life: Callable[[], int]) -> int:
        """A child that has nothing of the zygote's and lives `life`; its result is the exit status. Returns the pid."""
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            for sock in (self._listener, *self._connections.values()):
                sock.close()
            if self._parked is not None:
                self._parked.close()
            os.close(self._wake_read)
            os.close(self._wake_write)
            set_name("ambi-shim")
            status = life()
        except BaseException as error:
            shim.trace(error)
        finally:
            os._exit(status)

    def _forget(self, layers: Any) -> list[str]:
        """Unmount what nobody reads any more; a layer that is busy stays."""
        if not isinstance(layers, list) or not all(_is_name(name) for name in layers):
            raise InvalidRequest(f"forget: 'layers' is {layers!r}, not a list of names")
        dropped = []
        for name in layers:
            path = os.path.join(self.run_root, "layers", name)
            try:
                mount.umount(path, mount.UMOUNT_NOFOLLOW)
            except OSError as error:
                if isinstance(error, PermissionError) or error.errno == 16:  # EBUSY: still read from
                    continue
            dropped.append(name)
            try:
                os.rmdir(path)
            except OSError:  # an empty directory in memory, which the next mount of that layer uses
                pass
        return dropped


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value not in ("", ".", "..") and "/" not in value and "\0" not in value


def set_name(name: str) -> None:
    """What `ps` and `top` call this process."""
    with open("/proc/self/comm", "wb", buffering=0) as file:
        file.write(name.encode())


def report(line: str) -> None:
    """One line for zygote.log, which is our standard error."""
    try:
        os.write(2, f"zygote[{os.getpid()}]: {line}\n".encode(errors="replace"))
    except OSError:  # the log's disk is full: there is nowhere else to say so
        pass


def enter_layers_namespace(run_root: str) -> None:
    """Join the mount namespace of a living shim of this run root, or make a fresh one that only follows the host's."""
    for living in record.living(run_root):
        try:
            namespace = os.open(f"/proc/{living.pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # it has ended since it was listed
            continue
        try:
            if living.alive():  # else the descriptor may be that of a stranger with the same pid
                process.setns(namespace, process.CLONE_NEWNS)
                return
        except OSError as error:
            report(f"cannot join the mount namespace of shim {living.pid}: {error}")
        finally:
            os.close(namespace)
    process.unshare(process.CLONE_NEWNS)
    mount.mount(None, "/", None, mount.MS_SLAVE | mount.MS_REC)
    os.makedirs(os.path.join(run_root, "layers"), 0o700, exist_ok=True)


def main(argv: list[str]) -> int:
    """Set up, fork away from the starter and serve. The starter's child exits 0 when the zygote is ready."""
    run_root, number = argv[1], int(argv[2])
    if number > 3:
        process.close_range(3, number - 1)
    process.close_range(number + 1)
    listener = socket.socket(fileno=number)
    listener.set_inheritable(False)
    os.chdir("/")
    os.umask(0o022)
    process.set_dumpable(False)
    set_name("ambi-zygote")
    home = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    enter_layers_namespace(run_root)
    for isolation, why in drivers.preload().items():
        report(f"no driver for {isolation}: {why}")
    if os.fork():
        os._exit(0)
    gc.collect()
    gc.freeze()
    Zygote(run_root, listener, home).serve()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv))
    except (AmbiError, OSError) as error:
        report(f"cannot start: {error}")
        sys.exit(1)
